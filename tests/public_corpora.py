"""Look-alikes of public speech corpora: the files, configurations, splits and columns of the real ones, with tones.

Taken from the cards of the datasets on the hub, from openslr.org, and from releases of Common Voice, in November 2026.
The text of an utterance ends with its number in its corpus, and its tone tells it, too.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import yaml
from written import RATE, clip, write, write_clip

# Utterances of training, development and test sets.
SIZES = (3, 2, 1)
Split = tuple[str, Sequence[int]]
_COMMON_VOICE = (
    "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tdown_votes\tage\tgender\taccents\tvariant\t"
    "locale\tsegment"
)


def splits(*names: str) -> list[Split]:
    """The names of a corpus's splits for training, development and test, with the numbers of their utterances."""
    numbers = iter(range(sum(SIZES)))
    return [(name, [next(numbers) for _ in range(size)]) for name, size in zip(names, SIZES, strict=True)]


def audio(number: int, name: str, file_format: str, subtype: str | None = None) -> dict[str, Any]:
    contents = io.BytesIO()
    samples = clip(number) / np.float32(2**15)
    soundfile.write(contents, samples, RATE, format=file_format, subtype=subtype)
    return {"bytes": contents.getvalue(), "path": name}


def multimed() -> dict[str, bytes]:
    """`leduckhai/MultiMed`: five configurations; the splits of Vietnamese have other names."""
    names = {"Chinese": "eval", "English": "eval", "French": "eval", "German": "eval", "Vietnamese": "dev"}
    files, configurations = {}, {}
    for config, dev in names.items():
        configurations[config] = {split: f"{config}/{split}-*" for split in ("train", dev, "test")}
        for split, numbers in splits("train", dev, "test"):
            rows = [
                {"audio": audio(n, f"{n}.mp3", "MP3"), "text": f"{config} Text, Nummer {n}", "duration": 0.5}
                for n in numbers
            ]
            features = {"audio": _audio(), "text": _value("string"), "duration": _value("float64")}
            files[f"{config}/{split}-00000-of-00001.parquet"] = parquet(rows, features)
    return files | {"README.md": card(configurations)}


def librispeech() -> dict[str, bytes]:
    """`openslr/librispeech_asr`: splits of the configuration `clean` have dots in their names."""
    features = {
        "file": _value("string"),
        "audio": _audio(),
        "text": _value("string"),
        "speaker_id": _value("int64"),
        "chapter_id": _value("int64"),
        "id": _value("string"),
    }
    files = {}
    for split, numbers in splits("train.100", "validation", "test"):
        rows = []
        for n in numbers:
            name = f"374-180298-{n:04d}"
            row = {"file": f"{name}.flac", "audio": audio(n, f"{name}.flac", "FLAC"), "text": f"CHAPTER ONE {n}"}
            rows.append(row | {"speaker_id": 374, "chapter_id": 180298, "id": name})
        files[f"clean/{split}/0000.parquet"] = parquet(rows, features)
    configuration = {split: f"clean/{split}/*.parquet" for split in ("train.100", "validation", "test")}
    return files | {"README.md": card({"clean": configuration})}


def fleurs() -> dict[str, bytes]:
    """`google/fleurs`: two texts, the language by its English name, and audio in 32-bit floats."""
    features = {
        "id": _value("int32"),
        "num_samples": _value("int32"),
        "path": _value("string"),
        "audio": _audio(),
        "transcription": _value("string"),
        "raw_transcription": _value("string"),
        "gender": _label("male", "female", "other"),
        "lang_id": _label("af_za", "de_de", "fr_fr"),
        "language": _value("string"),
        "lang_group_id": _label("western_european_we", "eastern_european_ee"),
    }
    files, configurations = {}, {}
    for number, (config, language) in enumerate({"de_de": "German", "fr_fr": "French"}.items(), 1):
        folder = f"parquet-data/{config}"
        configurations[config] = {split: f"{folder}/{split}-*" for split in ("train", "validation", "test")}
        for split, numbers in splits("train", "validation", "test"):
            rows = [
                {
                    "id": 1500 + n // 2,
                    "num_samples": RATE // 2,
                    "path": f"{split}/{10**15 + n}.wav",
                    "audio": audio(n, f"{10**15 + n}.wav", "WAV", "FLOAT"),
                    "transcription": f"ein satz {n}",
                    "raw_transcription": f"Ein Satz: {n}",
                    "gender": n % 2,
                    "lang_id": number,
                    "language": language,
                    "lang_group_id": 0,
                }
                for n in numbers
            ]
            files[f"{folder}/{split}-00000-of-00001.parquet"] = parquet(rows, features)
    return files | {"README.md": card(configurations)}


def voxpopuli() -> dict[str, bytes]:
    """`facebook/voxpopuli`: the language is a class label, and the last row of each split has no `raw_text`."""
    features = {
        "audio_id": _value("string"),
        "language": _label("en", "de", "fr", "es", "pl"),
        "audio": _audio(),
        "raw_text": _value("string"),
        "normalized_text": _value("string"),
        "gender": _value("string"),
        "speaker_id": _value("string"),
        "is_gold_transcript": _value("bool"),
        "accent": _value("string"),
    }
    files = {}
    for split, numbers in splits("train", "validation", "test"):
        rows = []
        for n in [*numbers, 99]:
            name = f"20100210-0900-PLENARY-3-de_20100210-09:06:43_{n}"
            row = {"audio_id": name, "language": 1, "audio": audio(n % 90, f"{name}.wav", "WAV")}
            texts = {"raw_text": "" if n == 99 else f"Herr Präsident! {n}", "normalized_text": f"herr präsident {n}"}
            about = {"gender": "male", "speaker_id": "1122", "is_gold_transcript": True, "accent": "None"}
            rows.append(row | texts | about)
        files[f"de/{split}-00000-of-00001.parquet"] = parquet(rows, features)
    configuration = {split: f"de/{split}-*" for split in ("train", "validation", "test")}
    return files | {"README.md": card({"de": configuration, "multilang": {"train": "multilang/train-*"}})}


HUB = {
    "leduckhai/MultiMed": multimed,
    "openslr/librispeech_asr": librispeech,
    "google/fleurs": fleurs,
    "facebook/voxpopuli": voxpopuli,
}


def write_common_voice(folder: Path) -> None:
    """A language of a release of Common Voice, unpacked: tables beside a folder of MP3s at 48 kHz."""
    for split, numbers in splits("train", "dev", "test"):
        rows = [_COMMON_VOICE]
        for n in numbers:
            name = f"common_voice_de_{17298952 + n}.mp3"
            texts = [f"{n:064x}", name, f"{n:032x}", f'Er sagte "{n}", und zwar {n}', ""]
            rows.append("\t".join([*texts, "2", "0", "twenties", "", "Deutschland Deutsch", "", "de", ""]))
            contents = io.BytesIO()
            soundfile.write(contents, np.repeat(clip(n), 3), 3 * RATE, format="MP3")
            write(folder / "clips" / name, contents.getvalue())
        write(folder / f"{split}.tsv", "\n".join([*rows, ""]))


def write_openslr(folder: Path) -> None:
    """LibriSpeech as openslr.org has it: a file of texts for each chapter."""
    write(folder / "SPEAKERS.TXT", "; READER | SEX | SUBSET | MINUTES | NAME\n")
    for split, numbers in splits("train-clean-100", "dev-clean", "test-clean"):
        chapter = folder / split / "374" / "180298"
        for n in numbers:
            write_clip(chapter / f"374-180298-{n:04d}.flac", n)
        texts = "".join(f"374-180298-{n:04d} CHAPTER ONE {n}\n" for n in numbers)
        write(chapter / "374-180298.trans.txt", texts)


def parquet(rows: Sequence[Mapping[str, Any]], features: Mapping[str, Any]) -> bytes:
    """A file as `push_to_hub` writes it: the types of its columns are in its metadata."""
    table = pa.Table.from_pylist([dict(row) for row in rows])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    contents = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), contents)
    return contents.getvalue()


def card(configurations: Mapping[str, Mapping[str, str]]) -> bytes:
    """A README that says which files are the splits of each configuration."""
    return f"---\n{yaml.safe_dump({'configs': list(_listed(configurations))}, sort_keys=False)}---\n".encode()


def _listed(configurations: Mapping[str, Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    for name, patterns in configurations.items():
        files = [{"split": split, "path": pattern} for split, pattern in patterns.items()]
        yield {"config_name": name, "data_files": files}


def _audio() -> dict[str, Any]:
    return {"sampling_rate": RATE, "_type": "Audio"}


def _value(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "_type": "Value"}


def _label(*names: str) -> dict[str, Any]:
    return {"names": list(names), "_type": "ClassLabel"}
