"""Hugging Face datasets as utterances: streamed from the hub, from a folder or from files. Audio stays encoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError, unusable_on_failure
from voxtral_dist.data.stored.placeholders import HEAD_BYTES, placeholder_reason
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.errors import UserError, first_line
from voxtral_dist.shards.corpus.arrays import encoded_array
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.fields import FieldNames, checked_language, checked_text, first_of
from voxtral_dist.shards.corpus.importer import CorpusContents, Importer
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.rows import segment_of
from voxtral_dist.shards.corpus.suffixes import AUDIO_FILE_SUFFIXES
from voxtral_dist.shards.corpus.tar_files import TarFile
from voxtral_dist.shards.corpus.utterances import Line, Refusal, Utterance, key_of
from voxtral_dist.shards.tars.files import is_tar_pattern

HUB_PREFIX = "hf:"
# Types of values that are stored, alone or in lists; others, such as arrays and dates, are not.
_STORABLE = (str, int, float, bool)
_PARQUET = ".parquet"
_MANY_CONFIGURATIONS = 300


@dataclass(frozen=True)
class HubDataset:
    """An open dataset.

    audio: the column with the audio. place: name of the dataset, for messages. labels: names of class labels by column.
    num_rows: None if unknown. fingerprint: of the contents; empty for datasets that are streamed.
    """

    rows: Iterable[Mapping[str, Any]]
    audio: str
    names: FieldNames
    place: str
    labels: Mapping[str, Sequence[str]]
    num_rows: int | None
    fingerprint: str

    def lines(self) -> Iterator[Line]:
        """The rows in their order.

        Raises:
            UserError: reading a row fails.
        """
        number = 0
        rows = iter(self.rows)
        while True:
            number += 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                # Readers of file formats raise errors of any type.
                what = f"{type(error).__name__}: {first_line(error)}"
                raise UserError(f"The dataset {self.place} cannot be read at row {number} ({what}).") from error
            yield _line(row, self, f"{self.place}:{number}", number)


def open_dataset(source: str, split: str | None, config: str | None, names: FieldNames) -> HubDataset:
    """Open a dataset of the hub (`hf:NAME`), of `save_to_disk`, parquet files, or a folder that `load_dataset` reads.

    Raises:
        UserError: the dataset, configuration, split or column does not exist.
    """
    rows = _chosen_split(_opened_or_refused(source, config), split, source)
    if rows.features is None:
        rows = rows._resolve_features()
    audio = _audio_column(rows.features, names, source)
    _refuse_without_text(rows.features, names, source)
    return HubDataset(
        rows=_undecoded(rows, audio),
        audio=audio,
        names=names,
        place=source,
        labels={name: feature.names for name, feature in rows.features.items() if hasattr(feature, "int2str")},
        num_rows=getattr(rows, "num_rows", None),
        fingerprint=str(getattr(rows, "_fingerprint", "")) if not source.startswith(HUB_PREFIX) else "",
    )


def dataset_files(source: str, names: FieldNames) -> Iterator[TarFile | Refusal]:
    """The audio of all splits of a dataset, named by the column of `names`, or by its path.

    Raises:
        UserError: the dataset cannot be read.
    """
    opened = _opened_or_refused(source, None)
    for split in opened.values() if isinstance(opened, dict) else [opened]:
        rows = split if split.features is not None else split._resolve_features()
        audio = _audio_column(rows.features, FieldNames(), source)
        named = next((name for name in names.audio if name in rows.features and name != audio), None)
        for number, row in enumerate(_undecoded(rows, audio), 1):
            place = f"{source}:{number}"
            try:
                with unusable_on_failure():
                    parts = _parts(row[audio])
                    name = str(row[named]) if named is not None else Path(parts["path"] or f"{number:09d}").name
                    yield TarFile(_with_suffix(name), _location(parts, row, name).found().read(), place)
            except UnusableError as error:
                yield Refusal(place, "", error.cause, f"the row {error}")


def _with_suffix(name: str) -> str:
    """A name that has the suffix of audio, as the files of tars have."""
    return name if Path(name).suffix.lower() in AUDIO_FILE_SUFFIXES else f"{name}.audio"


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` made the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _opened(source: str, config: str | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    if not source.startswith(HUB_PREFIX) and is_saved_dataset(Path(source)):
        return datasets.load_from_disk(source)
    if source.lower().endswith(_PARQUET):
        builder = datasets.load_dataset_builder("parquet", data_files=Storage().expand(source))
    else:
        builder = datasets.load_dataset_builder(source.removeprefix(HUB_PREFIX), config)
    # Threads that decode ahead would decode audio, which stays encoded here.
    if hasattr(builder.config, "decode_num_threads"):
        builder.config.decode_num_threads = 0
    # Streaming copies nothing into a cache.
    return builder.as_streaming_dataset()


def _opened_or_refused(source: str, config: str | None) -> Any:
    try:
        return _opened(source, config)
    except UserError:
        raise
    except Exception as error:
        # Builders of datasets raise errors of any type.
        raise _not_opened(source, config, error) from error


def _not_opened(source: str, config: str | None, error: Exception) -> UserError:
    configurations = _configurations(source) if config is None and "onfig" in str(error) else []
    if len(configurations) > 1:
        named = ", ".join(configurations[:_MANY_CONFIGURATIONS])
        return UserError(f"The dataset {source} has several configurations: pass one of them by --config: {named}.")
    reason = _placeholder_below(Path(source))
    what = f"{type(error).__name__}: {first_line(error)}" if reason is None else reason
    return UserError(f"The dataset {source} cannot be opened ({what}).")


def _configurations(source: str) -> list[str]:
    import datasets

    try:
        return [str(name) for name in datasets.get_dataset_config_names(source.removeprefix(HUB_PREFIX))]
    except Exception:
        # The first error is the one to report.
        return []


def _placeholder_below(path: Path) -> str | None:
    """Why a parquet file cannot be read that stands for another; None if there is none."""
    for file in [path] if path.is_file() else sorted(path.rglob(f"*{_PARQUET}")) if path.is_dir() else []:
        with file.open("rb") as opened:
            if (reason := placeholder_reason(opened.read(HEAD_BYTES))) is not None:
                return f"{file.name} {reason}"
    return None


def _chosen_split(opened: Any, split: str | None, source: str) -> Any:
    if not isinstance(opened, dict):
        if split is not None:
            raise UserError(f"The dataset {source} has no splits: omit --split.")
        return opened
    if split is None and len(opened) == 1:
        return next(iter(opened.values()))
    if split not in opened:
        wrong = "must be given" if split is None else f"must be one of its splits, but is {split!r} instead"
        raise UserError(f"`--split` of {source} {wrong}: it has {', '.join(map(str, opened))}.")
    return opened[split]


def _audio_column(features: Mapping[str, Any], names: FieldNames, source: str) -> str:
    import datasets

    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    found = next((name for name in (*names.audio, *typed) if name in features), None)
    if found is None:
        raise UserError(
            f"The dataset {source} has no column with audio, only {', '.join(features)}: name it by --audio-field."
        )
    return found


def _refuse_without_text(features: Mapping[str, Any], names: FieldNames, source: str) -> None:
    if not set(names.text) & set(features):
        raise UserError(
            f"The dataset {source} has no column with text, only {', '.join(features)}: name it by --text-field."
        )


def _undecoded(rows: Any, audio: str) -> Any:
    import datasets

    media = {name for name, feature in rows.features.items() if isinstance(feature, (datasets.Audio, datasets.Image))}
    for name in media - {audio}:
        rows = rows.remove_columns(name)
    if audio not in media:
        return rows
    if isinstance(rows, datasets.IterableDataset):
        # Examples of generators are encoded by their features before a cast, and `Audio` needs torchcodec for that.
        rows.info.features = datasets.Features({**rows.features, audio: _encoded_audio()})
        return rows
    return rows.cast_column(audio, datasets.Audio(decode=False))


def _encoded_audio() -> Any:
    """The feature of audio that is encoded already."""
    import datasets

    class EncodedAudio(datasets.Audio):  # type: ignore[misc]
        def encode_example(self, value: Any) -> dict[str, Any]:
            return _parts(value)

    return EncodedAudio(decode=False)


def _parts(value: Any) -> dict[str, Any]:
    """The bytes, path or array of a value with audio."""
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value), "path": None}
    if isinstance(value, (str, os.PathLike)):
        return {"bytes": None, "path": os.fspath(value)}
    if isinstance(value, Mapping):
        return {"bytes": value.get("bytes"), "path": value.get("path")} | dict(value)
    return {"bytes": None, "path": None, "array": value}


def _line(row: Mapping[str, Any], dataset: HubDataset, place: str, number: int) -> Line:
    name = f"{number:09d}"
    try:
        with unusable_on_failure():
            audio = _parts(row.get(dataset.audio))
            name = audio["path"] or name
            return _utterance(row, dataset, _location(audio, row, name), place)
    except UnusableError as error:
        return Refusal(place, key_of(name), error.cause, f"the utterance {name} {error}")


def _location(audio: Mapping[str, Any], row: Mapping[str, Any], name: str) -> AudioLocation:
    if audio["bytes"] is not None:
        return AudioLocation(name, audio["bytes"])
    if audio.get("array") is not None:
        rate = audio.get("sampling_rate", row.get("sampling_rate"))
        return AudioLocation(f"{Path(name).name}.flac", encoded_array(audio["array"], rate))
    if not audio["path"]:
        raise UnusableError(Cause.NO_AUDIO, "names no audio")
    return AudioLocation(name)


def _is_storable(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, _STORABLE) for part in value)
    return isinstance(value, _STORABLE)


def _utterance(row: Mapping[str, Any], dataset: HubDataset, audio: AudioLocation, place: str) -> Utterance:
    extra = {key: value for key, value in dataset.names.extra(row).items() if _is_storable(value)}
    extra.pop(dataset.audio, None)
    # Most datasets hold clips that were cut, and keep the times of their source.
    segment = replace(segment_of(row), or_whole=True)
    return Utterance(
        # Folders are those of the machine that made the dataset.
        key=segment.key(key_of(Path(audio.location).name)),
        audio=segment.part_of(audio),
        text=checked_text(first_of(row, dataset.names.text), dataset.names.text),
        language=checked_language(_label(row, dataset)),
        place=place,
        claimed_seconds=segment.claimed_seconds,
        extra=extra,
    )


def _label(row: Mapping[str, Any], dataset: HubDataset) -> Any:
    """The language of a row; class labels are numbers, so their names are looked up."""
    name = next((name for name in dataset.names.language if row.get(name) not in (None, "")), None)
    if name is None:
        return None
    labels = dataset.labels.get(name)
    return labels[row[name]] if labels else row[name]


def is_dataset(source: str) -> bool:
    """Whether a source is a dataset of the hub or on disk."""
    if source.startswith(HUB_PREFIX):
        return not source.startswith(f"{HUB_PREFIX}//")
    if source.lower().endswith(_PARQUET):
        return True
    folder = Path(source)
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    if is_saved_dataset(folder) or any(name.endswith(_PARQUET) for name in names):
        return True
    return not any(map(is_tar_pattern, names)) and next(folder.glob(f"*/*{_PARQUET}"), None) is not None


def _open(source: str, options: CorpusOptions) -> CorpusContents:
    opened = open_dataset(source, options.split, options.config, options.names)
    identity = {"split": options.split, "config": options.config, "fingerprint": opened.fingerprint}
    return CorpusContents(identity, opened.num_rows, opened.lines)


HUGGINGFACE = Importer("huggingface", is_dataset, _open, is_labels=True)
