"""What to change in a configuration that does not fit, and the memory after each change."""

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
_OFFLOAD_OPTIMIZER = next(one for one in _STAGES if one.stage == 2 and one.optimizer_place == "host")
_FILES = {2: "ds_configs/zero2.json", 3: "ds_configs/zero3.json"}


@dataclass(frozen=True)
class Change:
    """A change of the configuration, and the peaks after it: bytes of a GPU, and of a node's host memory."""

    change: str
    device_bytes: float
    host_bytes_of_node: float
    fits: bool


@dataclass(frozen=True)
class _Variant:
    """The configured run with some changes."""

    estimator: Estimator
    sharding: Sharding
    changes: tuple[str, ...] = ()

    def outcome(self) -> Change:
        """The changes as one, and the peaks after them."""
        _, memory = self.estimator.largest(self.sharding)
        row = self.estimator.row(memory)
        return Change("; ".join(self.changes), row.device_bytes, row.host_bytes_of_node, bool(row.fits))

    def changed(self, change: str, estimator: Estimator | None = None, sharding: Sharding | None = None) -> _Variant:
        return _Variant(estimator or self.estimator, sharding or self.sharding, (*self.changes, change))


def advise(estimator: Estimator, sharding: Sharding) -> list[Change]:
    """Single changes, the cheapest first; if none is enough, a combination that fits.

    Cheap is what costs little time and quality. Other shardings compute the same; checkpoints take a third more time;
    smaller micro-batches use a GPU less well; offloading is slow; training adapters is another method.
    """
    start = _Variant(estimator, sharding)
    changes = [variant.outcome() for step in _STEPS for variant in step(start)]
    if not any(change.fits for change in changes):
        changes += _together(start)
    return changes


def _together(variant: _Variant) -> list[Change]:
    for step in (_shard_more, _checkpoint, _fewer_windows, _offload, _adapters):
        variant = next(reversed(list(step(variant))), variant)
        outcome = variant.outcome()
        if outcome.fits and len(variant.changes) > 1:
            return [outcome]
    return []


def _shard_more(variant: _Variant) -> Iterator[_Variant]:
    if not isinstance(variant.sharding, ZeroSharding):
        return
    for one in _STAGES:
        if one.optimizer_place == "device" and one.stage > max(1, variant.sharding.stage):
            yield variant.changed(f"engine.deepspeed: {_FILES[one.stage]}", sharding=one)


def _checkpoint(variant: _Variant) -> Iterator[_Variant]:
    config = variant.estimator.config
    if config.model.activation_checkpointing != _ALL_BLOCKS:
        model = config.model.model_copy(update={"activation_checkpointing": _ALL_BLOCKS})
        changed = _estimator(variant, config.model_copy(update={"model": model}))
        yield variant.changed("model.activation_checkpointing: {encoder: 1, language_model: 1}", changed)


def _fewer_windows(variant: _Variant) -> Iterator[_Variant]:
    """Halve the windows of a micro-batch until it fits; a single window if none fits."""
    windows = max(shape.num_windows for shape in variant.estimator.workload.candidates)
    changed = None
    while windows > 1 and not (changed and changed.outcome().fits):
        windows //= 2
        slots = variant.estimator.config.train_data.slots_per_step
        text = f"train_data.max_windows: {windows} (raise slots_per_step above {slots} to keep the batch size)"
        changed = variant.changed(text, _estimator(variant, variant.estimator.config, max_windows=windows))
    if changed:
        yield changed


def _offload(variant: _Variant) -> Iterator[_Variant]:
    is_on_device = not isinstance(variant.sharding, ZeroSharding) or variant.sharding.weights_place == "device"
    if is_on_device and getattr(variant.sharding, "optimizer_place", "device") == "device":
        yield variant.changed("engine.deepspeed: ds_configs/zero2_offload.json", sharding=_OFFLOAD_OPTIMIZER)
    if is_on_device:
        yield variant.changed("engine.deepspeed: ds_configs/zero3_offload.json", sharding=_OFFLOAD)


def _adapters(variant: _Variant) -> Iterator[_Variant]:
    if variant.estimator.config.trainable.lora is None:
        config = variant.estimator.config.model_copy(update={"trainable": TrainableConfig(lora=LoraConfig())})
        yield variant.changed("trainable.lora: {} (train only adapters)", _estimator(variant, config))


_STEPS: tuple[Callable[[_Variant], Iterator[_Variant]], ...] = (
    _shard_more,
    _checkpoint,
    _fewer_windows,
    _offload,
    _adapters,
)


def _estimator(variant: _Variant, config: RunConfig, max_windows: int | None = None) -> Estimator:
    workload = variant.estimator.workload
    if max_windows is not None:
        workload = replace(workload, candidates=tuple(_limited(shape, max_windows) for shape in workload.candidates))
    return Estimator(config, variant.estimator.machine, workload)


def _limited(shape: MicroBatchShape, max_windows: int) -> MicroBatchShape:
    """A micro-batch cut down to a number of windows, with examples in proportion, each as long as before."""
    if shape.num_windows <= max_windows:
        return shape
    examples = max(1, shape.num_examples * max_windows // shape.num_windows)
    targets = -(-shape.num_target_tokens * examples // shape.num_examples)
    return replace(shape, num_windows=max_windows, num_examples=examples, num_target_tokens=targets)
