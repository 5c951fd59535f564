"""A part of a corpus that is held out as a development set: whole speakers, whole recordings, or utterances."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Literal

from voxtral_dist.errors import UserError
from voxtral_dist.output.counting import counted
from voxtral_dist.shards.corpus.corpus import Corpus
from voxtral_dist.shards.corpus.utterances import Line, Utterance

SPEAKER_FIELDS = ("speaker", "speaker_id", "client_id", "spk_id", "spk", "speaker_name")
HeldOutBy = Literal["speaker", "utterance"]


@dataclass(frozen=True)
class HeldOut:
    """What is held out.

    fraction: of the utterances. by: None takes speakers where all utterances have one, else recordings.
    speaker_field: column of the speaker; None tries the usual ones. seed: another one draws other groups.
    """

    fraction: float
    by: HeldOutBy | None = None
    speaker_field: str | None = None
    seed: int = 0

    def digest(self, group: str) -> int:
        """What decides whether a group is drawn: those with the smallest digests are."""
        # Without a key, the digests of the default seed are those of earlier versions, whose packings resume.
        key = str(self.seed).encode()[:64] if self.seed else b""
        return int.from_bytes(blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest(), "big")

    @property
    def speaker_fields(self) -> tuple[str, ...]:
        """The columns that may hold the speaker; the first one with a value counts."""
        return SPEAKER_FIELDS if self.speaker_field is None else (self.speaker_field,)


@dataclass(frozen=True)
class Division:
    """A corpus in two parts, and a sentence about them."""

    train: Corpus
    dev: Corpus
    sentence: str


def divide(corpus: Corpus, held_out: HeldOut) -> Division:
    """Divide a corpus; it is read once, without its audio, to count its groups.

    Groups are drawn in the order of a digest of their names, so a corpus that grows keeps most of them where they are.
    No group is in both parts. Unusable utterances belong to the training part.

    Raises:
        UserError: it has one group only, or utterances without a speaker.
    """
    group_of, counts = _counted(corpus, held_out)
    chosen = _drawn(counts, held_out.fraction * counts.total())
    if not chosen or len(chosen) == len(counts):
        what = _NAMES[group_of]
        raise UserError(
            f"`--dev` needs at least two {what}, but the corpus has {len(counts)}: pass --dev-by utterance, or pack "
            "another corpus as development set."
        )

    def is_dev(line: Line) -> bool:
        return isinstance(line, Utterance) and held_out.digest(group_of(line, held_out)) in chosen

    sentence = f"dev: {sum(counts[group] for group in chosen)} of {counted(counts.total(), 'utterance')}"
    if group_of is not _utterance:
        sentence += f", {len(chosen)} of {len(counts)} {_NAMES[group_of]}"
    train = _part(corpus, "train", held_out, lambda line: not is_dev(line))
    return Division(train, _part(corpus, "dev", held_out, is_dev), sentence)


def _part(corpus: Corpus, name: str, held_out: HeldOut, keeps: Callable[[Line], bool]) -> Corpus:
    part: dict[str, object] = {
        "part": name,
        "fraction": held_out.fraction,
        "by": held_out.by,
        "fields": list(held_out.speaker_fields),
    }
    if held_out.seed:
        part["seed"] = held_out.seed
    return replace(corpus, identity=corpus.identity | part, keeps=keeps)


def _counted(corpus: Corpus, held_out: HeldOut) -> tuple[_Grouping, Counter[int]]:
    """How utterances are grouped, and the number of utterances of each group by its digest."""
    groupings = (_utterance,) if held_out.by == "utterance" else (_speaker, _recording)
    counts: dict[_Grouping, Counter[int]] = {grouping: Counter() for grouping in groupings}
    without_speaker: Utterance | None = None
    for line in corpus.lines():
        if not isinstance(line, Utterance):
            continue
        if _speaker in groupings and not _speaker(line, held_out):
            without_speaker = without_speaker or line
        for grouping in groupings:
            counts[grouping][held_out.digest(grouping(line, held_out))] += 1
    if held_out.by == "speaker" and without_speaker is not None:
        raise UserError(
            f"{without_speaker.place}: the utterance {without_speaker.key} has no speaker: it needs one of the fields "
            f"{', '.join(held_out.speaker_fields)}, or name the field by --speaker-field, or pass --dev-by utterance."
        )
    chosen = next(grouping for grouping in groupings if grouping is not _speaker or without_speaker is None)
    return chosen, counts[chosen]


def _drawn(counts: Counter[int], wanted: float) -> set[int]:
    """Groups with about the wanted number of utterances: at least one group, and never much more than wanted."""
    chosen: set[int] = set()
    total = 0
    for group in sorted(counts):
        if total + counts[group] <= max(wanted, 1):
            chosen.add(group)
            total += counts[group]
    return chosen or set(sorted(counts, key=lambda group: (counts[group], group))[:1])


def _speaker(line: Utterance, held_out: HeldOut) -> str:
    found = (line.extra.get(name) for name in held_out.speaker_fields)
    return next((str(value) for value in found if value not in (None, "")), "")


def _recording(line: Utterance, held_out: HeldOut) -> str:
    """The recording of a segment; other utterances are recordings of their own."""
    return line.audio.location if line.audio.is_part else line.key


def _utterance(line: Utterance, held_out: HeldOut) -> str:
    return line.key


_Grouping = Callable[[Utterance, HeldOut], str]
_NAMES: dict[_Grouping, str] = {_speaker: "speakers", _recording: "recordings", _utterance: "utterances"}
