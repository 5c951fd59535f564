"""FSDP2 with any settings on any number of ranks trains like one plain process on the full batch, in float32."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from voxtral_dist.config import ModelConfig, RunConfig
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.build import check_engine
from voxtral_dist.engine.loss_scale import LossScale
from voxtral_dist.errors import UserError
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.tiny import build_tiny_voxtral
from voxtral_dist.model.weights import load_voxtral

from corpora import TINY_SHAPE
from ranks import run_ranks
from runs import run_config
from test_equations import (
    CHECKPOINTED,
    IN_CHUNKS,
    NUM_STEPS,
    OFFLOADED,
    SMOOTHED,
    Curve,
    Weights,
    assert_equal_plain,
    assert_same,
    train_plainly,
    train_sharded,
    with_averages,
)
from workloads.peak_memory import forget_peak, status_bytes

FROZEN = {"frozen": ("encoder",)}
# Fewer rows than ranks: some ranks hold no row of an adapter.
ADAPTERS = {"lora": {"rank": 2, "targets": {"language_model": ("q_proj", "down_proj"), "projector": ("linear_2",)}}}
DORA = {"lora": {**ADAPTERS["lora"], "use_dora": True, "trained_whole": ("encoder",)}}

# By number of ranks and name: settings of FSDP2, of section `model`, and of section `trainable`.
VARIANTS: dict[tuple[int, str], tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    (1, "alone"): ({"cpu_offload": True}, IN_CHUNKS, {}),
    (1, "alone with adapters"): ({}, {}, ADAPTERS),
    (2, "defaults"): ({}, {}, {}),
    (2, "in chunks and offloaded"): ({"reshard_after_forward": False}, OFFLOADED | IN_CHUNKS, {}),
    (2, "offloaded replicas"): ({"ranks_per_replica": 1, "cpu_offload": True}, {}, {}),
    (2, "DoRA and a trained encoder"): ({}, CHECKPOINTED | IN_CHUNKS, DORA),
    (3, "adapters"): ({}, IN_CHUNKS, ADAPTERS),
    (4, "frozen encoder in chunks"): ({}, CHECKPOINTED | IN_CHUNKS, FROZEN),
    (4, "smoothed labels"): ({}, OFFLOADED | IN_CHUNKS | SMOOTHED, {}),
    (4, "replicas"): ({"ranks_per_replica": 2}, IN_CHUNKS, {}),
}


def variant(config: RunConfig, key: tuple[int, str]) -> RunConfig:
    return with_sections(config, *VARIANTS[key])


def with_sections(
    config: RunConfig, engine: dict[str, Any], model: dict[str, Any], trainable: dict[str, Any]
) -> RunConfig:
    tree = config.model_dump()
    changed = {"engine": {"fsdp2": engine}, "model": tree["model"] | model, "trainable": trainable}
    return RunConfig.model_validate(tree | changed)


@pytest.fixture(scope="module")
def config(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    # 5 slots do not divide evenly over 2 or 3 ranks, so one rank runs a micro-batch of weight zero.
    run = run_config(tmp_path_factory.mktemp("run"), tiny_model, shard_folder, num_steps=NUM_STEPS, slots_per_step=5)
    return with_averages(run)


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), 2, 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_fsdp2_equals_one_plain_process(config: RunConfig, world_size: int) -> None:
    keys = [key for key in VARIANTS if key[0] == world_size]
    assert_equal_plain(world_size, {key[1]: variant(config, key) for key in keys})


COMPILED: dict[str, Any] = {"compile_blocks": True, "activation_checkpointing": {"encoder": 0, "language_model": 2}}


@dataclass(frozen=True)
class Compiled:
    """What a run with compiled blocks gave, its graphs and breaks, and the different shapes of its inputs."""

    trained: tuple[Curve, Weights]
    num_graphs: int
    breaks: dict[str, int]
    num_shapes: int


def train_compiled(world: World, config: RunConfig, backend: str) -> Compiled:
    graphs = CompileCounterWithBackend(backend)
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, NUM_STEPS, world.rank, world.size)
    shapes = {batch.input_ids.shape for batches in loader.starting_at(0) for batch in batches.micro_batches}
    # Past its limit, torch would leave blocks uncompiled without a word.
    with (
        mock.patch("torch.compile", partial(torch.compile, backend=graphs)),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
    ):
        trained = train_sharded(world, config)
    return Compiled(trained, graphs.frame_count, dict(counters["graph_break"]), len(shapes))


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_blocks_equal_one_plain_process_with_few_graphs_for_all_lengths(
    config: RunConfig, backend: str
) -> None:
    compiled = with_sections(config, {}, COMPILED, {})
    expected = train_plainly(compiled)
    for found in run_ranks(2, train_compiled, compiled, backend):
        assert_same(found.trained, expected)
        assert not found.breaks
        # Encoder and language model, for several examples and for one.
        assert 2 <= found.num_graphs < found.num_shapes


# 30 million parameters, 119 MB: far more than libraries allocate on the side.
LARGER_SHAPE = replace(TINY_SHAPE, text_width=1024, text_heads=8, text_kv_heads=8, text_ffn_width=3072)
NUM_PARTITIONS = 8
# Memory of a rank besides its partition: 20 MB were measured.
MODULES_BYTES = 32 * 2**20


def peak_of_building(small: RunConfig, large: RunConfig, rank: int, num_ranks: int) -> int:
    """Bytes that building the larger model adds to a rank at its peak; all libraries are loaded before."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from voxtral_dist.engine.build import build_engine

    torch.set_num_threads(1)
    # Sends and receives nothing: anything that needed other ranks would end up with garbage.
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    world = World(rank, num_ranks, 0, torch.device("cpu"))
    log_mel = LogMel.from_pretrained(small.model.path, world.device)
    build_engine(small, log_mel, world)
    forget_peak()
    before = status_bytes("VmRSS")
    engine = build_engine(large, log_mel, world)
    peak = status_bytes("VmHWM") - before
    assert engine.parameter_shapes()
    return peak


def in_fresh_process(*arguments: Any) -> int:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as one:
        return one.submit(peak_of_building, *arguments).result()


@pytest.mark.slow
def test_no_rank_ever_holds_more_than_its_partition_of_the_model(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "MALLOC_MMAP_THRESHOLD_", "65536")
    build_tiny_voxtral(tmp_path / "larger", LARGER_SHAPE)
    small = variant(config, (2, "defaults"))
    large = small.model_copy(update={"model": ModelConfig(path=str(tmp_path / "larger"), precision="float32")})
    num_bytes = (tmp_path / "larger" / "model.safetensors").stat().st_size
    # All rows, and the pages of the file that they were read from.
    alone = in_fresh_process(small, large, 0, 1)
    assert alone > num_bytes
    for rank in (0, NUM_PARTITIONS - 1):
        assert in_fresh_process(small, large, rank, NUM_PARTITIONS) < alone / NUM_PARTITIONS + MODULES_BYTES < num_bytes


def full_weights_alone(world: World, config: RunConfig) -> dict[str, torch.Tensor] | None:
    """Logits and weights of rank 0 by itself, after the other ranks have left the context."""
    from voxtral_dist.engine.build import build_engine

    engine = build_engine(config, LogMel.from_pretrained(config.model.path, world.device), world)
    with engine.full_weights() as model:
        assert not model.training
        if not world.is_first:
            return None
        logits = model(input_ids=torch.arange(300, 320)[None]).logits
        return {"logits": logits, **dict(model.named_parameters())}


def test_full_weights_need_no_other_rank(config: RunConfig) -> None:
    trainable = variant(config, (2, "DoRA and a trained encoder")).trainable
    expected = load_voxtral(config.model, trainable, config.seed).eval()
    adapted = variant(config, (2, "DoRA and a trained encoder"))
    found = run_ranks(2, full_weights_alone, adapted)[0]
    logits = expected(input_ids=torch.arange(300, 320)[None]).logits
    torch.testing.assert_close(found.pop("logits"), logits.detach())
    assert list(found) == [name for name, _ in expected.named_parameters()]
    for name, parameter in expected.named_parameters():
        assert torch.equal(found[name], parameter), name


def test_an_optimizer_that_does_not_support_sharded_parameters_is_refused(config: RunConfig) -> None:
    tree = variant(config, (2, "defaults")).model_dump()
    other = RunConfig.model_validate(tree | {"optimizer": tree["optimizer"] | {"algorithm": "muon"}})
    with pytest.raises(UserError, match=r"`optimizer.algorithm` must be `adamw` or `adamw_8bit` .* but is `muon`"):
        check_engine(other)


def test_bfloat16_weights_are_refused_with_float16_and_with_averages(config: RunConfig) -> None:
    tree = variant(config, (2, "defaults")).model_dump()
    averaged = {"optimizer": tree["optimizer"] | {"master_weights": False}}
    with pytest.raises(UserError, match=r"`optimizer.ema_decay` needs float32 weights"):
        check_engine(RunConfig.model_validate(tree | averaged))
    changed = {"optimizer": averaged["optimizer"] | {"ema_decay": None}}
    check_engine(RunConfig.model_validate(tree | changed))
    half = changed | {"model": tree["model"] | {"precision": "float16"}}
    with pytest.raises(UserError, match=r"`optimizer.master_weights: false` .* set `model.precision` to bfloat16 or"):
        check_engine(RunConfig.model_validate(tree | half))


def test_replicas_that_do_not_divide_the_ranks_are_refused_once_their_number_is_known(config: RunConfig) -> None:
    replicas = variant(config, (4, "replicas"))
    check_engine(replicas)
    check_engine(replicas, 4)
    with pytest.raises(UserError, match=r"must divide the number of ranks \(3\), but is 2 instead"):
        check_engine(replicas, 3)


def test_the_loss_scale_halves_on_overflow_doubles_after_good_steps_and_resumes() -> None:
    scale = LossScale(num_steps_to_growth=3)
    first = scale.value
    scale.update(is_finite=False)
    assert scale.value == first / 2
    for _ in range(2):
        scale.update(is_finite=True)
    restarted = LossScale(num_steps_to_growth=3)
    restarted.load_scalars(scale.scalars())
    for one in (scale, restarted):
        assert one.value == first / 2
        one.update(is_finite=True)
        assert one.value == first


def test_gradients_that_are_never_finite_exhaust_the_loss_scale() -> None:
    scale = LossScale()
    for _ in range(100):
        scale.update(is_finite=False)
    assert scale.is_exhausted
    assert scale.value == 1.0
