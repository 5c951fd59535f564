"""What to change in a configuration that does not fit, and what each change gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from voxtral_dist.config import ActivationCheckpointingConfig, LoraConfig, RunConfig, TrainableConfig
from voxtral_dist.estimate.activations import MicroBatchShape
from voxtral_dist.estimate.estimator import Estimator
from voxtral_dist.estimate.sharding import STANDARD_SHARDINGS, Sharding, ZeroSharding

_ALL_BLOCKS = ActivationCheckpointingConfig(encoder=1, language_model=1)
_STAGES = [one for one in STANDARD_SHARDINGS if isinstance(one, ZeroSharding)]
_ZERO3 = next(one for one in _STAGES if one.stage == 3 and one.optimizer_place == "device")
_OFFLOAD = next(one for one in _STAGES if one.weights_place == "host")
_FILES = {2: "ds_configs/zero2.json", 3: "ds_configs/zero3.json"}


@dataclass(frozen=True)
class Change:
    """Something to set, and what a GPU and the host memory of a node then hold at their peaks, in bytes."""

    change: str
    device_bytes: float
    host_bytes_of_node: float
    fits: bool


@dataclass(frozen=True)
class _State:
    """A changed run. changes: what was set."""

    estimator: Estimator
    sharding: Sharding
    changes: tuple[str, ...] = ()

    def judged(self) -> Change:
        row = self.estimator.row(self.estimator.estimate(self.sharding, self.estimator.largest_shape(self.sharding)))
        return Change("; ".join(self.changes), row.device_bytes, row.host_bytes_of_node, bool(row.fits))

    def named(self, change: str, estimator: Estimator | None = None, sharding: Sharding | None = None) -> _State:
        return _State(estimator or self.estimator, sharding or self.sharding, (*self.changes, change))


def advise(estimator: Estimator, sharding: Sharding) -> list[Change]:
    """Single changes, the cheapest in time and quality first; where none is enough, as many as it takes together.

    Changes of the sharding keep what is computed; checkpoints cost a third more time; smaller micro-batches use a GPU
    less well; offloading is slow; adapters are another training.
    """
    start = _State(estimator, sharding)
    changes = [state.judged() for step in _STEPS for state in step(start)]
    if not any(change.fits for change in changes):
        changes += _together(start)
    return changes


def _together(state: _State) -> list[Change]:
    for step in (_shard_more, _checkpoint, _fewer_windows, _offload, _adapters):
        state = next(reversed(list(step(state))), state)
        judged = state.judged()
        if judged.fits and len(state.changes) > 1:
            return [judged]
    return []


def _shard_more(state: _State) -> Iterator[_State]:
    if not isinstance(state.sharding, ZeroSharding):
        return
    for one in _STAGES:
        if one.optimizer_place == "device" and one.stage > max(1, state.sharding.stage):
            yield state.named(f"engine.deepspeed: {_FILES[one.stage]}", sharding=one)


def _checkpoint(state: _State) -> Iterator[_State]:
    config = state.estimator.config
    if config.model.activation_checkpointing != _ALL_BLOCKS:
        model = config.model.model_copy(update={"activation_checkpointing": _ALL_BLOCKS})
        changed = _estimator(state, config.model_copy(update={"model": model}))
        yield state.named("model.activation_checkpointing: {encoder: 1, language_model: 1}", changed)


def _fewer_windows(state: _State) -> Iterator[_State]:
    """The largest halving of the windows that fits, or a single window where none does."""
    windows = max(shape.num_windows for shape in state.estimator.workload.candidates)
    changed = None
    while windows > 1 and not (changed and changed.judged().fits):
        windows //= 2
        slots = state.estimator.config.train_data.slots_per_step
        text = f"train_data.max_windows: {windows} (with more slots_per_step than {slots} for as large a batch)"
        changed = state.named(text, _estimator(state, state.estimator.config, max_windows=windows))
    if changed:
        yield changed


def _offload(state: _State) -> Iterator[_State]:
    if not isinstance(state.sharding, ZeroSharding) or state.sharding.weights_place == "device":
        yield state.named("engine.deepspeed: ds_configs/zero3_offload.json", sharding=_OFFLOAD)


def _adapters(state: _State) -> Iterator[_State]:
    if state.estimator.config.trainable.lora is None:
        config = state.estimator.config.model_copy(update={"trainable": TrainableConfig(lora=LoraConfig())})
        yield state.named("trainable.lora: {} (adapters alone are trained)", _estimator(state, config))


_STEPS: tuple[Callable[[_State], Iterator[_State]], ...] = (
    _shard_more,
    _checkpoint,
    _fewer_windows,
    _offload,
    _adapters,
)


def _estimator(state: _State, config: RunConfig, max_windows: int | None = None) -> Estimator:
    workload = state.estimator.workload
    if max_windows is not None:
        workload = replace(workload, candidates=tuple(_cut(shape, max_windows) for shape in workload.candidates))
    return Estimator(config, state.estimator.machine, workload)


def _cut(shape: MicroBatchShape, max_windows: int) -> MicroBatchShape:
    """A micro-batch with so many windows at most, and examples in proportion; these stay as long as they are."""
    if shape.num_windows <= max_windows:
        return shape
    examples = max(1, shape.num_examples * max_windows // shape.num_windows)
    targets = -(-shape.num_target_tokens * examples // shape.num_examples)
    return replace(shape, num_windows=max_windows, num_examples=examples, num_target_tokens=targets)
