"""Labels of a micro-batch as text."""

from __future__ import annotations

from dataclasses import replace

from voxtral_dist.data.examples.micro_batch import collate
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.label_view import label_lines


def test_a_line_says_what_is_read_and_another_one_what_is_a_target(shard_index, prompts):
    reader = UtteranceReader(shard_index, prompts, max_target_tokens=None)
    # The shorter one of two is padded.
    examples = sorted(map(reader.example, range(6)), key=lambda example: len(example.completion))
    example = examples[0]
    batch = collate([examples[-1], example], prompts)
    summary, prompt, targets = label_lines(batch, 1, prompts)
    num_targets = len(example.completion)
    num_positions = len(example.prompt) + num_targets - 1
    assert summary.startswith(f"{example.key}: {example.duration_seconds:.2f} s of audio in ")
    assert summary.endswith(f", {num_positions} positions, {num_targets} targets")
    assert prompt.startswith("  no targets  <s> [INST] [BEGIN_AUDIO] [AUDIO] x ")
    assert prompt.endswith(" [TRANSCRIBE]")
    assert targets == f"  targets     {' '.join(prompts.pieces(example.completion))}"
    assert targets.endswith(" </s>")


def test_examples_without_targets_have_none(shard_index, prompts):
    example = UtteranceReader(shard_index, prompts, max_target_tokens=None).example(0)
    batch = collate([example], prompts)
    batch = replace(batch, target_places=batch.target_places[:0], target_ids=batch.target_ids[:0])
    summary, *lines = label_lines(batch, 0, prompts)
    assert summary.endswith("0 targets")
    assert len(lines) == 1
