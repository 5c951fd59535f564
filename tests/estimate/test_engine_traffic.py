"""Bytes that FSDP2 casts, copies and updates equal the formula."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from voxtral_dist.config import RunConfig
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.fsdp2.sharding import local_part
from voxtral_dist.estimate.engine_traffic import EngineTraffic, engine_traffic
from voxtral_dist.estimate.estimator import meta_model_of
from voxtral_dist.estimate.sharding import Fsdp2Sharding, ZeroSharding
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts

from ranks import run_ranks
from runs import run_config


class _Traffic(TorchDispatchMode):
    """Counts the bytes that kernels of FSDP2 and of the update read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "_foreach_copy_" or (name == "copy_" and _is_flat(args[0])):
            self.bytes[name] += _size(args[0]) + _size(args[1])
        elif name == "_to_copy" and _is_flat(output):
            self.bytes[name] += _size(args[0]) + _size(output)
        elif name == "all_gather_copy_in":
            self.bytes[name] += 2 * _size(args[0])
        elif name in ("split_with_sizes_copy", "chunk_cat"):
            self.bytes[name] += _size(args[0]) + _size(kwargs["out"])
        elif name == "_fused_adamw_":
            weights, gradients, first, second = ([local_part(one) for one in tensors] for tensors in args[:4])
            self.bytes[name] += _size(gradients) + 2 * sum(map(_size, (weights, first, second)))
        return output


def _is_flat(tensor: Tensor) -> bool:
    """Whether values are those of a parameter on its way to a buffer: activations have more dimensions."""
    return tensor.dim() == 1 and tensor.is_floating_point()


def _size(tree: Any) -> int:
    return sum(one.nbytes for one in tree_leaves(tree) if isinstance(one, Tensor))


def traffic_of_a_step(world: World, config: RunConfig) -> tuple[Counter[str], Counter[str]]:
    """What a backward pass moves, and what an update moves."""
    from voxtral_dist.engine.build import build_engine

    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, 1, world.rank, world.size)
    engine = build_engine(config, LogMel.from_pretrained(config.model.path, world.device), world)
    [batch, *_] = next(iter(loader.starting_at(0))).micro_batches
    with _Traffic() as moved:
        engine.backward(batch, batch.num_target_tokens, is_last=True)
    with _Traffic() as updated:
        engine.step(1e-3)
    return moved.bytes, updated.bytes


def in_bfloat16(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"precision": "bfloat16"})})


@pytest.mark.parametrize(
    ("trainable", "num_ranks"), [({}, 1), ({"lora": {"rank": 4}}, 1), ({}, 2), ({"frozen": ["encoder"]}, 2)], ids=str
)
def test_fsdp2_moves_what_the_formula_says(
    tiny_model: Path, shard_folder: Path, tmp_path: Path, trainable: dict[str, Any], num_ranks: int
) -> None:
    sections = {"trainable": trainable, "engine": {"fsdp2": {}}}
    config = in_bfloat16(run_config(tmp_path / "run", tiny_model, shard_folder, num_steps=3, **sections))
    model = meta_model_of(config.model, config.trainable)
    expected = engine_traffic(model, Fsdp2Sharding(), config.optimizer, num_ranks)
    of_ranks = run_ranks(num_ranks, traffic_of_a_step, config)
    if num_ranks > 1:
        # These are gloo's.
        of_ranks = [(moved - Counter({"copy_": moved["copy_"]}), updated) for moved, updated in of_ranks]
    # Rows of small parameters are divided unequally, and torch prefetches a frozen block that it does not need.
    moved, updated = (sum(sum(counts[which].values()) for counts in of_ranks) / num_ranks for which in (0, 1))
    assert moved == pytest.approx(expected.first_micro_batch, rel=0.03)
    # The norm reads gradients, clipping reads and writes them.
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert updated + trained * 12 / num_ranks == pytest.approx(expected.update, rel=0.02)


def test_ranks_share_casts_and_the_update_and_copy_the_rest(tiny_model: Path, tmp_path: Path, shard_folder: Path):
    config = in_bfloat16(run_config(tmp_path, tiny_model, shard_folder, num_steps=3))
    model = meta_model_of(config.model, config.trainable)
    values = sum(one.numel() for one in model.parameters())
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)

    def traffic(sharding: Any, num_ranks: int) -> EngineTraffic:
        return engine_traffic(model, sharding, config.optimizer, num_ranks)

    for sharding in (Fsdp2Sharding(), ZeroSharding(1), ZeroSharding(2), ZeroSharding(3)):
        assert traffic(sharding, 8).update == traffic(sharding, 1).update / 8
        assert traffic(sharding, 8).first_micro_batch >= 2 * trained
        found = traffic(sharding, 2)
        assert found.step_bytes(3) == found.first_micro_batch + 2 * found.later_micro_batch
    assert traffic(Fsdp2Sharding(), 1).update == trained * 40
    assert traffic(ZeroSharding(2), 1).update == trained * (40 + 8 + 4 + 2)
    # Offloaded states are updated on the host.
    assert traffic(ZeroSharding(3, optimizer_place="host"), 1).update == 0
    assert traffic(Fsdp2Sharding(is_offloaded=True), 1).update == 0
    # Weights that stay are gathered once.
    again = traffic(Fsdp2Sharding(), 2).first_micro_batch - traffic(Fsdp2Sharding(reshards=False), 2).first_micro_batch
    kept = model.model.language_model.embed_tokens.weight.numel() + model.lm_head.weight.numel()
    assert again == pytest.approx((values - kept) * (10 / 2 + 4), rel=0.02)
    single = traffic(ZeroSharding(3), 1).first_micro_batch
    assert single == traffic(ZeroSharding(2), 1).first_micro_batch, "a single rank gathers nothing"
    assert traffic(ZeroSharding(3), 2).first_micro_batch > single
