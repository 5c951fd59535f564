"""What the model reads and learns of one sample, token by token, as `shards show --tokens` prints it.

Draws of a run are keyed by the number of the sample in all shards of the run: so there the sample is looked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from voxtral_dist.config import RunConfig, load_config
from voxtral_dist.data.examples.bad_utterance import UtteranceError
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.micro_batch import IGNORED_LABEL, collate
from voxtral_dist.data.examples.prompting import training_word_list
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.stored.index import ShardIndex, read_index
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.training_set import training_reader
from voxtral_dist.errors import UserError
from voxtral_dist.model.prompts import VoxtralPrompts


@dataclass(frozen=True)
class TokenView:
    """Makes the example of a sample as a run would, or with a tokenizer alone: language told, text as it is."""

    prompts: VoxtralPrompts
    config: RunConfig | None
    epoch_index: int

    @classmethod
    def of(cls, model: str | None, config: Path | None, epoch_index: int = 0) -> TokenView:
        """A viewer for the samples of a run, or for a model.

        Raises:
            UserError: neither or both are given, or they cannot be read.
        """
        if (model is None) == (config is None):
            raise UserError("`--tokens` needs a tokenizer: give either `--model PATH` or the `--config FILE` of a run.")
        run = None if config is None else load_config(config)
        path = run.model.path if run is not None else str(model)
        return cls(VoxtralPrompts.from_pretrained(path), run, epoch_index)

    def lines(self, index: ShardIndex, utterance_id: int, storage: Storage) -> Iterator[str]:
        """A line for each token: its position, id and piece, and what the model learns to say after it.

        Raises:
            UserError: the sample cannot be used; the sentence says why.
        """
        try:
            example = self._example(index, utterance_id, storage)
        except UtteranceError as error:
            raise UserError(f"The {error}.") from error
        batch = collate([example], self.prompts.pad_id, self.prompts.window_samples)
        yield from self._summary(example, batch.num_target_tokens)
        yield "      position      id  token                 learns to say"
        ids = batch.input_ids[0].tolist()
        labels = [IGNORED_LABEL] * (len(ids) - batch.labels.shape[1]) + batch.labels[0].tolist()
        yield from self._token_lines(ids, labels)

    def _example(self, index: ShardIndex, utterance_id: int, storage: Storage) -> Example:
        if self.config is None:
            return UtteranceReader(index, self.prompts, None, storage).example(utterance_id)
        train_data = self.config.train_data
        patterns = [pattern for patterns in train_data.named_sets.values() for pattern in patterns]
        drawn_from = read_index(patterns, storage)
        drawn = drawn_from.find(index.span(utterance_id))
        if drawn is None:
            raise UserError(
                f"The sample is not in the shards of the run ({', '.join(patterns)}): correct the folder or `--config`."
            )
        words = training_word_list(train_data.context)
        reader = training_reader(train_data, drawn_from, self.prompts, storage, words)
        key = (self.config.seed, self.epoch_index)
        return reader.join([reader.load(drawn, key)], key)

    def _summary(self, example: Example, num_target_tokens: int) -> Iterator[str]:
        num_positions = len(example.prompt) + len(example.completion) - 1
        yield (
            f"{num_positions} positions of {self.prompts.max_positions}: {example.num_windows} windows of audio with "
            f"{example.num_windows * self.prompts.audio_tokens_per_window} tokens, and {num_target_tokens} targets"
        )
        if self.config is not None and self.config.train_data.packing and example.is_transcription:
            yield "The run may pack it with others into one example; here it is alone."

    def _token_lines(self, ids: list[int], labels: list[int]) -> Iterator[str]:
        """The same piece many times, as for audio, takes one line."""
        pieces = self.prompts.pieces(ids)
        rows = list(enumerate(zip(ids, pieces, labels, strict=True)))
        for (token, piece, label), run in groupby(rows, key=lambda row: row[1]):
            positions = [position for position, _ in run]
            where = str(positions[0]) if len(positions) == 1 else f"{positions[0]} to {positions[-1]}"
            learned = "" if label == IGNORED_LABEL else f"{self.prompts.pieces([label])[0]} ({label})"
            yield f"{where:>14}  {token:>6}  {piece:<20}  {learned}".rstrip()
