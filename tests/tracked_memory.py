"""Memory of training steps as torch's own MemTracker counts it, on fake tensors: shapes without values or storage.

Whatever the code allocates is counted, so a published model's step can be measured on any machine within seconds. Fake
tensors compute nothing, so only what reads values is replaced: files of weights, and log-mel features.

Not seen: what kernels allocate inside, rounding and fragmentation of a GPU's allocator, and libraries. Counted although
it does not exist: a third gradient of a weight that is used several times, which autograd adds up in place elsewhere
(`can_accumulate_inplace`), and in the update whole parameters whose shapes `DTensor` propagates. Compare neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from voxtral_dist.config import Fsdp2Config, ModelConfig, OptimizerConfig, TrainableConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.fsdp2 import engine as fsdp2_engine
from voxtral_dist.engine.fsdp2.moments import ShardedMoments
from voxtral_dist.estimate.activations import MicroBatchShape
from voxtral_dist.model.encoder import ChunkedEncoder, num_chunks
from voxtral_dist.model.voxtral import (
    DTYPES,
    audio_tokens_per_window,
    initialize_buffers,
    read_voxtral_config,
    set_tensor,
    trained_meta_model,
    window_samples,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class TrackedBytes:
    """Bytes of a rank.

    before: of model and optimizer. peak: of all tensors. after: of model, optimizer and gradients.
    """

    before: int
    peak: int
    after: int


class PassTracker(MemTracker):
    """torch's tracker for whole passes.

    It registers hooks on all parameters of a module, which torch refuses for frozen ones, and keeps a peak for each
    module: both are left out. It would not see what torchao's tensors of values and scales call, so it passes them on.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(one.__name__ == "Float8TrainingTensor" for one in types):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        sizes: tuple[int, int] = super()._track_module_params_and_buffers(module, install_grad_hooks=False)
        return sizes

    @property
    def now(self) -> int:
        """Bytes of all tensors that exist."""
        return int(self.get_tracker_snapshot("current")[CPU]["Total"])

    @property
    def peak(self) -> int:
        """The most bytes that existed at any time."""
        return int(self.get_tracker_snapshot("peak")[CPU]["Total"])


def plain_bytes(config: ModelConfig, trainable: TrainableConfig, shape: MicroBatchShape) -> TrackedBytes:
    """Memory of one forward and backward pass in one process without an engine: weights and gradients in one dtype."""
    dtype = DTYPES[config.precision]
    model = trained_meta_model(config, trainable, dtype)
    ChunkedEncoder(model, config.encoder_windows_per_chunk)
    with FakeTensorMode(), PassTracker() as tracker:
        for name, one in list(model.named_parameters()):
            set_tensor(model, name, nn.Parameter(torch.empty(one.shape, dtype=dtype), one.requires_grad))
        initialize_buffers(model, CPU)
        before = tracker.now
        batch = _micro_batch(config, shape)
        features = torch.empty(_features_shape(config, shape), dtype=dtype)
        inputs = tracker.now - before
        loss = model(
            input_ids=batch.input_ids,
            input_features=features,
            audio_places=batch.audio_places,
            target_ids=batch.target_ids,
            target_places=batch.target_places,
            chunk_tokens=config.loss_chunk_tokens,
        )
        loss.backward()
        return TrackedBytes(before, tracker.peak, tracker.now - inputs)


def fsdp2_bytes(
    config: ModelConfig,
    trainable: TrainableConfig,
    shape: MicroBatchShape,
    num_ranks: int,
    num_micro_batches: int,
    settings: Fsdp2Config,
) -> TrackedBytes:
    """Memory of rank 0 in all micro-batches of a step of a resumed run, up to the update.

    The engine is the real one; its collectives do nothing.
    """
    world = World(rank=0, size=num_ranks, local_rank=0, device=CPU)
    optimizer = OptimizerConfig(learning_rate=1e-5)

    def features(pcm: Tensor, windows_per_clip: Sequence[int]) -> Tensor:
        return torch.empty(_features_shape(config, shape))

    with _fake_ranks(num_ranks), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp2_engine, "InitialWeights", _WeightsWithoutValues)
        patch.setattr(fsdp2_engine, "read_partitions", lambda partitions, folder: None)
        patch.setattr(fsdp2_engine, "stored_names", lambda folder: [])
        patch.setattr(ShardedMoments, "read", lambda moments, folder, stored: None)
        for name in ("build_mesh", "trained_meta_model", "shard_model"):
            patch.setattr(fsdp2_engine, name, _not_faked(getattr(fsdp2_engine, name)))
        with FakeTensorMode(), PassTracker() as tracker:
            engine = fsdp2_engine.Fsdp2Engine(config, trainable, optimizer, settings, 0, features, world)
            engine.load_partitions(Path(), num_updates=1)
            before = tracker.now
            batch = _micro_batch(config, shape)
            inputs = tracker.now - before
            for number in range(num_micro_batches):
                # The tracker takes one forward pass of a model.
                tracker.reset_mod_stats()
                is_last = number == num_micro_batches - 1
                engine.backward(batch, num_micro_batches * shape.num_target_tokens, is_last=is_last)
            return TrackedBytes(before, tracker.peak, tracker.now - inputs)


@contextmanager
def _fake_ranks(size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _WeightsWithoutValues:
    """`InitialWeights` of a model whose weights nobody has."""

    def __init__(self, path: str, model: nn.Module, seed: int, quantizes_on: torch.device) -> None:
        self._shapes = {name: one.shape for name, one in model.named_parameters()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return torch.empty((stop - start, *self._shapes[name][1:]))


def _not_faked(function: Any) -> Any:
    """The function outside of the fake mode: meta tensors and the numbers of a mesh are real."""

    def called(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments)

    return called


def _features_shape(config: ModelConfig, shape: MicroBatchShape) -> tuple[int, int, int]:
    audio = read_voxtral_config(config.path).audio_config
    return shape.num_windows, int(audio.num_mel_bins), 2 * int(audio.max_source_positions)


def _micro_batch(config: ModelConfig, shape: MicroBatchShape) -> MicroBatch:
    """A micro-batch without values; every example has equally many windows."""
    voxtral_config = read_voxtral_config(config.path)
    windows_each = shape.num_windows // shape.num_examples

    def indices(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64)

    return MicroBatch(
        input_ids=indices(shape.num_examples, shape.num_positions),
        audio_places=indices(shape.num_windows * audio_tokens_per_window(voxtral_config)),
        target_places=indices(shape.num_target_tokens),
        target_ids=indices(shape.num_target_tokens),
        pcm=torch.zeros((shape.num_windows, window_samples(voxtral_config)), dtype=torch.int16),
        feature_masks=indices(0, 4),
        positions_per_example=(shape.num_positions,) * shape.num_examples,
        windows_per_example=(windows_each,) * shape.num_examples,
        audio_seconds=0.0,
        num_utterances=shape.num_examples,
        num_encoder_chunks=num_chunks(shape.num_windows, config.encoder_windows_per_chunk),
    )
