"""Examples of a micro-batch as text: what the model reads, and which tokens are targets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from voxtral_dist.data.examples.micro_batch import IGNORED_LABEL, MicroBatch
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.output.console import one_line
from voxtral_dist.output.counting import counted


def label_lines(batch: MicroBatch, number: int, prompts: VoxtralPrompts) -> Iterator[str]:
    """Yield a summary of an example, and its tokens in order: a line for each run of targets or of other tokens.

    Args:
        batch: on the CPU.
        number: of the example in it, from 0.
        prompts: names the tokens.
    """
    num_positions = batch.positions_per_example[number]
    ids = batch.input_ids[number, :num_positions].tolist()
    labels = batch.labels[number, :num_positions].tolist()
    # The last target is a label, but never an input.
    tokens = [
        (ids[0], False),
        *(
            (label if label != IGNORED_LABEL else read, label != IGNORED_LABEL)
            for read, label in zip([*ids[1:], prompts.pad_id], labels, strict=True)
        ),
    ]
    if not tokens[-1][1]:
        tokens.pop()
    yield (
        f"{one_line(batch.keys[number])}: {batch.seconds_per_example[number]:.2f} s of audio in "
        f"{counted(batch.windows_per_example[number], 'window')}, {counted(num_positions, 'position')}, "
        f"{counted(sum(is_target for _, is_target in tokens), 'target')}"
    )
    for is_target, run in groupby(tokens, key=lambda token: token[1]):
        pieces = " ".join(_pieces([token for token, _ in run], prompts))
        yield f"  {'targets' if is_target else 'no targets':<12}{pieces}"


def _pieces(ids: list[int], prompts: VoxtralPrompts) -> Iterator[str]:
    """The tokens, texts in quotes; a run of equal ones, such as those of audio, once with its length."""
    for piece, run in groupby(prompts.pieces(ids)):
        count = len(list(run))
        yield piece if count == 1 else f"{piece} x {count}"
