"""The estimate's list of pinned memory is what DeepSpeed pins, byte by byte, and the engine gives back what it can."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from voxtral_dist.config import EngineConfig, Fsdp2Config, RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.estimate import zero_host_memory
from voxtral_dist.estimate.fsdp2_memory import pinned_states, pinned_weights
from voxtral_dist.estimate.host_ledger import HostLedger
from voxtral_dist.estimate.phases import ModelSizes, Setting
from voxtral_dist.estimate.sharding import ZeroSharding, zero_sharding
from voxtral_dist.estimate.zero_host_memory import play_building
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.voxtral import DTYPES, trained_meta_model

from cpu_adam import install_cpu_adam
from fake_streams import install_streams
from pinned import CachingHostAllocator, PinnedLog, install_fsdp2_pinning, install_pinning
from ranks import run_ranks
from runs import run_config

ON_CPU = {"device": "cpu"}
PAGEABLE = {"device": "cpu", "pin_memory": False}
# Sub-groups of several parameters each, and parameters that would stay on a GPU.
STAGE_3 = {"stage": 3, "sub_group_size": 100_000, "stage3_param_persistence_threshold": 1000}
ADAPTERS = {"trainable": {"lora": {"rank": 2}}}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "everything": ({"stage": 3} | {"offload_optimizer": ON_CPU, "offload_param": ON_CPU}, {}),
    "float32": (STAGE_3 | {"offload_optimizer": ON_CPU, "offload_param": ON_CPU}, {"precision": "float32"}),
    "adapters": (STAGE_3 | {"offload_optimizer": ON_CPU, "offload_param": ON_CPU}, ADAPTERS),
    "the optimizer": (STAGE_3 | {"offload_optimizer": ON_CPU}, {}),
    "a pageable optimizer": (STAGE_3 | {"offload_optimizer": PAGEABLE, "offload_param": ON_CPU}, {}),
    "pageable weights": (STAGE_3 | {"offload_optimizer": ON_CPU, "offload_param": PAGEABLE}, {}),
    "the optimizer of stage 2": ({"stage": 2, "offload_optimizer": ON_CPU}, {}),
}
# torch rounds everything up and keeps it, or does so with the blocks up to this size.
LIMITS = (None, 2**15)


def build_all(world: World, configs: dict[str, RunConfig]) -> dict[str, PinnedLog]:
    """What each engine pins, one after the other, because imports take longer than building."""
    from voxtral_dist.engine.build import build_engine
    from voxtral_dist.engine.zero import engine as engine_module

    install_cpu_adam(install_streams())
    shared = install_pinning()
    engine_module._pins_states = lambda settings, world: engine_module.is_offloaded(settings)  # type: ignore[attr-defined]
    engine_module.pin_large_tensors_exactly = lambda: shared.note("exact")  # type: ignore[attr-defined]
    engine_module.return_unused_pinned_memory = lambda: shared.note("return")  # type: ignore[attr-defined]
    logs = {}
    for name, config in configs.items():
        shared.sizes.clear()
        shared.events.clear()
        engine = build_engine(config, LogMel.from_pretrained(config.model.path, world.device), world)
        logs[name] = PinnedLog(list(shared.sizes), list(shared.events))
        del engine
        # The hooks of engines form reference cycles.
        gc.collect()
    return logs


def build_fsdp2(world: World, config: RunConfig) -> PinnedLog:
    """What FSDP2 pins before the first forward pass."""
    from voxtral_dist.engine.build import build_engine

    log = install_fsdp2_pinning()
    engine: Any = build_engine(config, LogMel.from_pretrained(config.model.path, world.device), world)
    engine._model._get_fsdp_state()._lazy_init()
    return log


@pytest.fixture(scope="module")
def configs(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name, (zero, changes) in VARIANTS.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps({"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}))
        tree = run_config(folder / name, tiny_model, shard_folder, num_steps=3).model_dump()
        tree["model"] |= {"precision": changes.get("precision", "bfloat16")}
        tree |= {key: value for key, value in changes.items() if key != "precision"}
        made[name] = RunConfig.model_validate(tree | {"engine": {"deepspeed": file}})
    return made


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2])
def logs_of_ranks(request: pytest.FixtureRequest, configs: dict[str, RunConfig]) -> list[dict[str, PinnedLog]]:
    return run_ranks(request.param, build_all, configs)


def estimated(name: str, config: RunConfig, num_ranks: int, limit: int | None, monkeypatch: Any) -> HostLedger:
    monkeypatch.setattr(zero_host_memory, "exact_pinned_bytes", lambda: limit)
    dtype = DTYPES[config.model.precision]
    sizes = ModelSizes.of(trained_meta_model(config.model, config.trainable, dtype), config.optimizer)
    sharding: ZeroSharding = zero_sharding(VARIANTS[name][0])
    return play_building(sharding, sizes, Setting("gpu", num_ranks, 1, dtype.itemsize))


@pytest.mark.parametrize("name", VARIANTS)
def test_pins_what_is_estimated(name, logs_of_ranks, configs, monkeypatch):
    for log in (of_rank[name] for of_rank in logs_of_ranks):
        assert len(log.sizes) > 2
        assert log.sizes == estimated(name, configs[name], len(logs_of_ranks), None, monkeypatch).pinned


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", VARIANTS)
def test_what_torch_takes_for_it_is_estimated(name, limit, logs_of_ranks, configs, monkeypatch):
    ledger = estimated(name, configs[name], len(logs_of_ranks), limit, monkeypatch)
    for log in (of_rank[name] for of_rank in logs_of_ranks):
        allocator = CachingHostAllocator(limit)
        allocator.play(log)
        assert allocator.held == ledger.pinned_bytes
        assert allocator.peak == ledger.peak_pinned_bytes


@pytest.mark.parametrize("name", VARIANTS)
def test_large_tensors_are_exact_from_the_first_on_and_unused_blocks_are_returned_after_the_last(name, logs_of_ranks):
    for log in (of_rank[name] for of_rank in logs_of_ranks):
        names = [event for event, _ in log.events]
        assert names.index("exact") < names.index("pin")
        assert names.index("return") > max(place for place, event in enumerate(names) if event == "pin")


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_weights_of_fsdp2_are_pinned_one_by_one(num_ranks, configs):
    config = configs["adapters"].model_copy(update={"engine": EngineConfig(fsdp2=Fsdp2Config(cpu_offload=True))})
    sizes = ModelSizes.of(trained_meta_model(config.model, config.trainable, DTYPES["float32"]), config.optimizer)
    setting = Setting("gpu", num_ranks, 1, DTYPES[config.model.precision].itemsize)
    expected = pinned_weights(sizes, setting, num_ranks)
    for log in run_ranks(num_ranks, build_fsdp2, config):
        assert sorted(log.sizes) == sorted(expected)
        allocator = CachingHostAllocator(None)
        allocator.play(log)
        assert allocator.held == pinned_states(sizes, setting, num_ranks)["weights"]
