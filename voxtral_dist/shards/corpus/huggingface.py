"""Hugging Face datasets as utterances: streamed from the hub, or from a folder. Audio stays encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError, unusable_on_failure
from voxtral_dist.errors import UserError, first_line
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.fields import FieldNames, checked_language, checked_seconds, checked_text, first_of
from voxtral_dist.shards.corpus.utterances import Refusal, Utterance, key_of

HUB_PREFIX = "hf:"
# Types of values that are stored, alone or in lists; others, such as arrays and dates, are not.
_STORABLE = (str, int, float, bool)


@dataclass(frozen=True)
class HubDataset:
    """An open dataset.

    audio: the column with the audio. place: name of the dataset, for messages. labels: names of class labels by column.
    num_rows: None if unknown. fingerprint: of the contents; empty for datasets of the hub.
    """

    rows: Iterable[Mapping[str, Any]]
    audio: str
    names: FieldNames
    place: str
    labels: Mapping[str, Sequence[str]]
    num_rows: int | None
    fingerprint: str

    def lines(self) -> Iterator[Utterance | Refusal]:
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
    """Open a dataset of the hub (`hf:NAME`), of `save_to_disk`, or a folder that `load_dataset` reads.

    Raises:
        UserError: the dataset, split or column does not exist.
    """
    try:
        opened = _open(source, config)
    except Exception as error:
        # Builders of datasets raise errors of any type.
        raise UserError(
            f"The dataset {source} cannot be opened ({type(error).__name__}: {first_line(error)})."
        ) from error
    rows = _chosen_split(opened, split, source)
    if rows.features is None:
        rows = rows._resolve_features()
    audio = _audio_column(rows.features, names, source)
    return HubDataset(
        rows=_undecoded(rows, audio),
        audio=audio,
        names=names,
        place=source,
        labels={name: feature.names for name, feature in rows.features.items() if hasattr(feature, "int2str")},
        num_rows=getattr(rows, "num_rows", None),
        fingerprint=str(getattr(rows, "_fingerprint", "")) if not source.startswith(HUB_PREFIX) else "",
    )


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` made the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _open(source: str, config: str | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    if source.startswith(HUB_PREFIX):
        return datasets.load_dataset(source.removeprefix(HUB_PREFIX), config, streaming=True)
    if is_saved_dataset(Path(source)):
        return datasets.load_from_disk(source)
    # Streaming copies nothing into a cache.
    return datasets.load_dataset(source, config, streaming=True)


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
    if not set(names.text) & set(features):
        raise UserError(
            f"The dataset {source} has no column with text, only {', '.join(features)}: name it by --text-field."
        )
    return found


def _undecoded(rows: Any, audio: str) -> Any:
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, (datasets.Audio, datasets.Image)) and name != audio:
            rows = rows.remove_columns(name)
    return rows.cast_column(audio, datasets.Audio(decode=False))


def _line(row: Mapping[str, Any], dataset: HubDataset, place: str, number: int) -> Utterance | Refusal:
    name = f"{number:09d}"
    try:
        with unusable_on_failure():
            audio = row.get(dataset.audio)
            if not audio or (audio.get("bytes") is None and audio.get("path") is None):
                raise UnusableError(Cause.NO_AUDIO, "names no audio")
            name = audio.get("path") or name
            return _utterance(row, dataset, name, place)
    except UnusableError as error:
        return Refusal(place, key_of(name), error.cause, f"the utterance {name} {error}")


def _is_storable(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, _STORABLE) for part in value)
    return isinstance(value, _STORABLE)


def _utterance(row: Mapping[str, Any], dataset: HubDataset, name: str, place: str) -> Utterance:
    contents = row[dataset.audio].get("bytes")
    extra = {key: value for key, value in dataset.names.extra(row).items() if _is_storable(value)}
    extra.pop(dataset.audio, None)
    return Utterance(
        # Folders are those of the machine that made the dataset.
        key=key_of(Path(name).name),
        audio=AudioLocation(name, contents),
        text=checked_text(first_of(row, dataset.names.text), dataset.names.text),
        language=checked_language(_label(row, dataset)),
        place=place,
        claimed_seconds=checked_seconds(row, "duration"),
        extra=extra,
    )


def _label(row: Mapping[str, Any], dataset: HubDataset) -> Any:
    """The language of a row; class labels are numbers, so their names are looked up."""
    name = next((name for name in dataset.names.language if row.get(name) not in (None, "")), None)
    if name is None:
        return None
    labels = dataset.labels.get(name)
    return labels[row[name]] if labels else row[name]
