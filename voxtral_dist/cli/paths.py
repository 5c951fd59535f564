"""Checks of the paths of a run or a model before torch is imported, so that a wrong one is said within a second."""

from __future__ import annotations

from pathlib import Path

from voxtral_dist.config import RunConfig, refuse_missing_deepspeed_file
from voxtral_dist.model.folders import refuse_unknown_name, refuse_wrong_model


def refuse_missing_paths(config: RunConfig) -> None:
    """Refuse a run whose model, DeepSpeed file, shard sets or word lists are missing on this machine.

    Raises:
        UserError: one of them is; URLs are not looked up.
    """
    from voxtral_dist.data.stored.index_files import refuse_missing_sets
    from voxtral_dist.text.word_list import WordList

    refuse_wrong_model(config.model.path)
    if config.engine.deepspeed is not None:
        refuse_missing_deepspeed_file(config.engine.deepspeed)
    for patterns in config.train_data.named_sets.values():
        refuse_missing_sets(patterns)
    if config.train_data.context is not None and config.train_data.context.words is not None:
        WordList.read(config.train_data.context.words, "train_data.context.words")
    for name, test_set in config.evaluation.test_sets.items():
        refuse_missing_sets([test_set.shards])
        if test_set.context is not None:
            WordList.read(test_set.context.words, f"evaluation.test_sets.{name}.context.words")
    # Last, because it needs the network.
    refuse_unknown_name(config.model.path)


def refuse_missing_source(source: str) -> None:
    """Refuse what is neither a run, nor a checkpoint, nor a model's folder or name.

    Raises:
        UserError: there is no such folder, and no such name on the hub.
    """
    if not (Path(source) / "config.yaml").is_file():
        refuse_wrong_model(source, "SOURCE", takes_checkpoints=True)
        refuse_unknown_name(source, "SOURCE")
