"""The kernels of a micro-batch, recorded from its real forward and backward pass on tensors without storage.

torch's `FakeTensorMode` computes shapes alone, so a model of any size runs in a second and without weights. A dispatch
mode sees what autograd and the modules call. FLOPs of products are those of `torch.utils.flop_counter`; attention is

    4 H D pairs in the forward pass, and 10 H D pairs in the backward pass, which recomputes the scores

for H heads of width D and all pairs of positions, half of them where attention is causal (Dao, arXiv 2307.08691). Bytes
are those of all inputs and outputs: what stays in caches between kernels is not modelled. Of an embedding, and of other
selections, only what is selected counts. Log-mel features, a thousandth of the time, are not traced.

Of blocks that are alike (same shapes, same trained parameters, checkpointed or not, with or without a gradient before
them) one is traced and counts for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from voxtral_dist.config import Component, ModelConfig, TrainableConfig
from voxtral_dist.estimate.activations import MicroBatchShape
from voxtral_dist.estimate.estimator import meta_model_of
from voxtral_dist.estimate.kernels import Kernel, Kind, Phase
from voxtral_dist.model.blocks import blocks_of, is_checkpointed
from voxtral_dist.model.encoder import ChunkedEncoder
from voxtral_dist.model.voxtral import (
    FRAMES_PER_POSITION,
    audio_tokens_per_window,
    initialize_buffers,
    set_tensor,
)

_aten = torch.ops.aten
# The attention that torch chooses on a CPU has the same arguments as FlashAttention on a GPU.
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLOAT8_PRODUCT = _aten._scaled_mm
_NO_KERNEL = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten._unsafe_view,
    _aten._local_scalar_dense,
    _aten.lift_fresh,
}
# What reads as much as it writes, from a larger tensor; and what writes all of its first argument without reading it.
_SELECTIONS = {_aten.embedding, _aten.index_select, _aten.index, _aten.gather}
_OVERWRITES = {_aten.copy_, _aten.fill_, _aten.zero_}
_REDUCTIONS = {_aten.sum, _aten.mean, _aten.amax}
_UNFUSED = _SELECTIONS | {_aten.embedding_dense_backward, _aten.index_put, _aten.index_copy, _aten.index_fill}


class StepTracer:
    """Traces micro-batches of one configured model.

    model: has the blocks that are traced, and no others.
    """

    def __init__(self, config: ModelConfig, trainable: TrainableConfig, *, keeps_all_blocks: bool = False) -> None:
        """Build the model without weights; its attention is `eager` if that is configured, and else `sdpa`.

        Args:
            config: section `model` of the configuration.
            trainable: section `trainable`.
            keeps_all_blocks: trace every block, which takes some 10 s for the published models.

        Raises:
            UserError: the path is not a Voxtral checkpoint, or the configuration does not fit it.
        """
        self._config = config
        self.model = meta_model_of(config, trainable)
        self._blocks, self._counts = self._reduced(keeps_all_blocks)
        self._fake = FakeTensorMode()
        with self._fake:
            for name, parameter in list(self.model.named_parameters()):
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                set_tensor(self.model, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
            initialize_buffers(self.model, torch.device("cpu"))
        ChunkedEncoder(self.model, config.encoder_windows_per_chunk)

    def trace(self, shape: MicroBatchShape) -> list[Kernel]:
        """The kernels of a forward and a backward pass, in the order in which they run."""
        recorder = _Recorder(self._counts)
        hooks = [hook for number, block in enumerate(self._blocks) for hook in recorder.watch(number, block)]
        try:
            with self._fake, recorder:
                loss = self._summed_loss(shape)
                recorder.is_backward = True
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()
            self.model.zero_grad(set_to_none=True)
        return recorder.kernels

    def _reduced(self, keeps_all: bool) -> tuple[list[nn.Module], list[int]]:
        """Leave one block of each kind in the model: these blocks, and for how many each stands."""
        model, every = self.model, self._config.checkpointing
        blocks: list[nn.Module] = []
        counts: list[int] = []
        reached = False
        places: tuple[tuple[Component, nn.Module, tuple[str, ...]], ...] = (
            ("encoder", model.model.audio_tower, ("conv1", "conv2", "embed_positions")),
            ("language_model", model.model.language_model, ("embed_tokens",)),
        )
        for component, owner, front in places:
            reached = reached or any(_is_trained(owner.get_submodule(name)) for name in front)
            kinds: dict[Any, int] = {}
            kept: list[nn.Module] = []
            for number, block in enumerate(blocks_of(model)[component]):
                parameters = tuple((name, one.requires_grad) for name, one in block.named_parameters())
                kind = (parameters, is_checkpointed(number, getattr(every, component)), reached, keeps_all and number)
                reached = reached or _is_trained(block)
                if kind not in kinds:
                    kinds[kind] = 0
                    kept.append(block)
                kinds[kind] += 1
            owner.layers = nn.ModuleList(kept)
            blocks += kept
            counts += kinds.values()
            reached = reached or (component == "encoder" and _is_trained(model.model.multi_modal_projector))
        return blocks, counts

    def _summed_loss(self, shape: MicroBatchShape) -> Tensor:
        """The loss of a micro-batch of a shape, as `LossOfMicroBatch` calls the model."""
        config = self.model.config.audio_config
        frames = config.max_source_positions * FRAMES_PER_POSITION
        num_audio_tokens = shape.num_windows * audio_tokens_per_window(self.model.config)
        loss: Tensor = self.model(
            input_ids=torch.zeros((shape.num_examples, shape.num_positions), dtype=torch.int64),
            input_features=torch.empty((shape.num_windows, config.num_mel_bins, frames)),
            audio_places=torch.zeros(num_audio_tokens, dtype=torch.int64),
            target_ids=torch.zeros(shape.num_target_tokens, dtype=torch.int64),
            target_places=torch.zeros(shape.num_target_tokens, dtype=torch.int64),
            chunk_tokens=self._config.loss_chunk_tokens,
        )
        return loss


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records a kernel for each operation that a GPU would compute.

    is_backward: whether the backward pass has begun.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []
        self.is_backward = False
        self._counts = counts
        self._block: int | None = None
        self._last_output: Tensor | None = None
        # Storages stay until the end, so that no two have the same address.
        self._storages: list[Any] = []

    def watch(self, number: int, block: nn.Module) -> list[Any]:
        """Follow when a block is computed: its forward pass, and its backward pass from the gradient of its output on.

        Autograd runs what was computed last first, so all of a block comes before what was computed before it.
        """
        outside: list[int | None] = []

        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            outside.append(self._block)
            if inputs[0] is not self._last_output:
                self._at_gradient_of(inputs[0], None)
            self._block = number

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            self._block = outside.pop()
            self._last_output = output[0] if isinstance(output, tuple) else output
            self._at_gradient_of(self._last_output, number)

        return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]

    def _at_gradient_of(self, value: Tensor, block: int | None) -> None:
        def reached(_: Tensor) -> None:
            self._block = block

        if value.requires_grad:
            value.register_hook(reached)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            # torchao's tensors of values and scales: what they call is seen instead.
            return NotImplemented
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        outputs = _tensors(output)
        if outputs and not (func.namespace == "prim" or func.is_view or func.overloadpacket in _NO_KERNEL):
            self.kernels.append(self._kernel(func.overloadpacket, inputs, outputs, output, args, kwargs))
        return output

    def _kernel(
        self, operation: Any, inputs: list[Tensor], outputs: list[Tensor], output: Any, args: Any, kwargs: Any
    ) -> Kernel:
        kind: Kind = "memory"
        flops = 0.0
        if operation in flop_registry:
            kind, flops = "product", flop_registry[operation](*args, **kwargs, out_val=output)
            if operation is _FLOAT8_PRODUCT:
                kind = "float8 product"
        elif operation is _ATTENTION:
            kind, flops = "attention", 4 * _pair_values(args[0], args[1], len(args) > 4 and args[4])
        elif operation is _ATTENTION_BACKWARD:
            kind, flops = "attention backward", 10 * _pair_values(args[1], args[2], args[7])
        most = sum(map(_num_bytes, outputs)) if operation in _SELECTIONS else None
        return Kernel(
            name=operation.__name__,
            kind=kind,
            phase=self._phase(),
            block=self._block,
            count=1 if self._block is None else self._counts[self._block],
            flops=flops,
            reads=self._bytes(inputs[1:] if operation in _OVERWRITES else inputs, most),
            writes=self._bytes(outputs),
            fuses=kind == "memory" and operation not in _UNFUSED and not _reduces_over_rows(operation, args),
        )

    def _phase(self) -> Phase:
        if not self.is_backward:
            return "forward"
        # A checkpoint recomputes a forward pass under hooks that collect what was kept. It also turns gradients on, but
        # they are off inside of an operation that brings a backward pass of its own.
        is_recomputing = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        return "recomputation" if is_recomputing else "backward"

    def _bytes(self, tensors: list[Tensor], most: int | None = None) -> dict[int, int]:
        """Bytes of tensors by storage; at most `most` of each."""
        found: dict[int, int] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages.append(storage)
            size = _num_bytes(tensor)
            found[storage._cdata] = found.get(storage._cdata, 0) + (size if most is None else min(size, most))
        return found


def _is_trained(module: nn.Module) -> bool:
    return any(one.requires_grad for one in module.parameters())


def _tensors(tree: Any) -> list[Tensor]:
    """The different tensors in a tree of arguments or results."""
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def _num_bytes(tensor: Tensor) -> int:
    """Bytes that a kernel touches: a dimension that is expanded is read once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def _pair_values(query: Tensor, key: Tensor, is_causal: bool) -> float:
    """Multiplications of one product of attention: `(B, H, T, D)` queries, `(B, K, S, D)` keys."""
    batch, heads, length, width = query.shape
    return batch * heads * length * key.shape[2] * width / (2 if is_causal else 1)


def _reduces_over_rows(operation: Any, args: Sequence[Any]) -> bool:
    """Whether an operation sums over other values than those of a row in memory, as gradients of biases do."""
    if operation not in _REDUCTIONS or len(args) < 2 or not args[1]:
        return False
    return not any(args[0].stride(dimension) == 1 for dimension in args[1])
