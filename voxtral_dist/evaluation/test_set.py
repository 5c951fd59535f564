"""A test set: its utterances, and the batches in which they are decoded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from voxtral_dist.data.examples.bad_utterance import UtteranceError
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.stored.index import ShardIndex
from voxtral_dist.errors import RankError
from voxtral_dist.evaluation.decoding_memory import DecodingShape
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.text.word_list import WordList

# Utterance ids that a rank decodes together.
Batch = tuple[int, ...]


@dataclass(frozen=True)
class TestSet:
    """The utterances of one index, and how they are read and decoded.

    Attributes:
        batches: every utterance once, expensive batches first.
        decoding_shapes: the different sizes of the batches.
        has_answers: whether its texts are answers to instructions, not transcripts.
        words: the listed words of the B-WER; None without a list.
        num_distractors: of the lists in prompts; None where prompts have no list.
        grouping: fields of slices and speakers.
    """

    __test__ = False  # keeps pytest from collecting it

    name: str
    index: ShardIndex
    reader: UtteranceReader
    batches: tuple[Batch, ...]
    decoding_shapes: tuple[DecodingShape, ...]
    has_answers: bool = False
    words: WordList | None = None
    num_distractors: int | None = None
    grouping: Grouping = field(default_factory=Grouping)

    @property
    def fingerprint(self) -> str:
        """A hash of the utterances and listed words."""
        shards = [(part.fingerprint, len(part.records)) for part in self.index.sets]
        words = "" if self.words is None else self.words.fingerprint
        return hashlib.sha256(repr((shards, len(self.index), words)).encode()).hexdigest()

    def read(self, batch: Batch) -> list[Example]:
        """Read the examples of a batch.

        Raises:
            RankError: an utterance is unusable. Skipping it would change the test set.
            ReadError: the storage of the shards fails.
        """
        try:
            return [self.reader.example(utterance_id) for utterance_id in batch]
        except UtteranceError as error:
            raise RankError(
                f"The test set `{self.name}` has an unusable utterance: {error}. Fix or remove it, then pack the set "
                "again."
            ) from error
