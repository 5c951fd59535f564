"""One utterance token by token, as `shards show --tokens` prints it: the model's input and its targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from voxtral_dist.config import TrainDataConfig, load_config
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
from voxtral_dist.output.counting import counted


@dataclass(frozen=True)
class TokenView:
    """Shows the example that a run makes of an utterance, or a plain one.

    prompts: makes token ids.
    train_data: the training data of the run; None puts the language into the prompt and keeps the text as it is.
    seed, epoch_index: key of the run's draws, such as augmentation.
    """

    prompts: VoxtralPrompts
    train_data: TrainDataConfig | None = None
    seed: int = 0
    epoch_index: int = 0

    @classmethod
    def of(cls, model: str | None, config: Path | None, epoch_index: int = 0) -> TokenView:
        """The view of the run with this configuration file, or of a model's tokenizer alone.

        Raises:
            UserError: neither or both are given, or they cannot be read.
        """
        if config is not None and model is None:
            run = load_config(config)
            prompts = VoxtralPrompts.from_pretrained(run.model.path, run.model.max_positions)
            return cls(prompts, run.train_data, run.seed, epoch_index)
        if model is not None and config is None:
            return cls(VoxtralPrompts.from_pretrained(model), epoch_index=epoch_index)
        raise UserError("`--tokens` needs a tokenizer: give either `--model PATH` or the `--config FILE` of a run.")

    def lines(self, index: ShardIndex, utterance_id: int, storage: Storage) -> Iterator[str]:
        """Yield a summary, and a line for each input token: position, id, piece, and the target that follows it.

        Raises:
            UserError: the utterance is unusable, or not part of the run's training data.
        """
        try:
            example = self._example(index, utterance_id, storage)
        except UtteranceError as error:
            raise UserError(f"The {error}.") from error
        batch = collate([example], self.prompts)
        yield from self._summary(example, batch.num_target_tokens)
        yield "      position      id  token                 target"
        ids = batch.input_ids[0].tolist()
        labels = batch.labels[0].tolist()
        yield from self._token_lines(ids, labels)

    def _example(self, index: ShardIndex, utterance_id: int, storage: Storage) -> Example:
        if self.train_data is None:
            return UtteranceReader(index, self.prompts, None, storage).example(utterance_id)
        # The draws of a run are seeded by the number of the utterance in all shards of the run.
        patterns = [pattern for patterns in self.train_data.named_sets.values() for pattern in patterns]
        run_index = read_index(patterns, storage)
        id_in_run = run_index.find(index.span(utterance_id))
        if id_in_run is None:
            raise UserError(
                f"The utterance is not in the shards of the run ({', '.join(patterns)}): correct the folder or "
                "`--config`."
            )
        word_list = training_word_list(self.train_data.context)
        reader = training_reader(self.train_data, run_index, self.prompts, storage, word_list)
        key = (self.seed, self.epoch_index)
        return reader.join([reader.load(id_in_run, key)], key)

    def _summary(self, example: Example, num_target_tokens: int) -> Iterator[str]:
        num_positions = len(example.prompt) + len(example.completion) - 1
        yield (
            f"{counted(num_positions, 'position')} of {self.prompts.max_positions}: "
            f"{counted(example.num_windows, 'window')} of audio with "
            f"{counted(example.num_windows * self.prompts.audio_tokens_per_window, 'token')}, and "
            f"{counted(num_target_tokens, 'target')}"
        )
        if self.train_data is not None and self.train_data.packing and example.is_transcription:
            yield "The run may pack this utterance with others into one example; here it is alone."

    def _token_lines(self, ids: list[int], labels: list[int]) -> Iterator[str]:
        """A line for each token; a run of equal tokens, such as those of audio, takes one line."""
        pieces = self.prompts.pieces(ids)
        rows = list(enumerate(zip(ids, pieces, labels, strict=True)))
        for (token, piece, label), run in groupby(rows, key=lambda row: row[1]):
            positions = [position for position, _ in run]
            where = str(positions[0]) if len(positions) == 1 else f"{positions[0]} to {positions[-1]}"
            target = "" if label == IGNORED_LABEL else f"{self.prompts.pieces([label])[0]} ({label})"
            yield f"{where:>14}  {token:>6}  {piece:<20}  {target}".rstrip()
