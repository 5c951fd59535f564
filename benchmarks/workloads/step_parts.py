"""Time of a training step by parts of the model (wall time) and by kinds of operations.

Hooks of torch see modules and gradients pass, so nothing of the engine is known here. A part ends where the next one
begins; what an engine sends over the network during a part belongs to it, and is also counted as communication.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile

from voxtral_dist.engine.engine import Engine

# What torch's profiler calls operations; the first kind that fits counts.
_KINDS = {
    "attention": ("scaled_dot_product",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "convolution"),
    "communication": ("gloo:", "c10d::"),
    "optimizer": ("_fused_adamw", "aten::addcdiv", "aten::lerp", "aten::addcmul", "aten::sqrt"),
}


class StepParts:
    """Profiler of one step of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seconds: Counter[str] = Counter()
        self._last = 0.0

    def of(self, next_batches: Callable[[], Any], train_step: Callable[[Any], object]) -> dict[str, Any]:
        """Wall seconds of each part, and seconds of each kind of operation, of one step."""
        removable = [register_module_forward_pre_hook(self._enters), register_module_forward_hook(self._leaves)]
        self._end_with("backward", "encoder, backward")
        self._end_with("step", "optimizer", before="loss over ranks")
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            self._last = time.perf_counter()
            batches = next_batches()
            self._mark("data")
            train_step(batches)
        for hook in removable:
            hook.remove()
        return {"parts": dict(self._seconds), "operations": _by_kind(profiled)}

    def _mark(self, part: str) -> None:
        """Attribute the time since the last mark to this part."""
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    def _end_with(self, method: str, part: str, before: str | None = None) -> None:
        original = getattr(self._engine, method)

        def measured(*arguments: Any, **named: Any) -> Any:
            if before:
                self._mark(before)
            result = original(*arguments, **named)
            self._mark(part)
            return result

        setattr(self._engine, method, measured)

    def _enters(self, module: nn.Module, _inputs: Any) -> None:
        match _published_class(module):
            case "VoxtralEncoder":
                self._mark("features and targets over ranks")
            case "LlamaModel":
                self._mark("embeddings")

    def _leaves(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        match _published_class(module):
            case "VoxtralMultiModalProjector":
                self._mark("encoder, forward")
                self._when_gradient_comes(output, "language model, backward")
            case "LlamaModel":
                self._mark("language model, forward")
                self._when_gradient_comes(output.last_hidden_state, "logits and loss, backward")
            case "TargetLogits":
                self._mark("logits and loss, forward")

    def _when_gradient_comes(self, tensor: Tensor, part: str) -> None:
        tensor.register_hook(lambda _gradient: self._mark(part))


def _published_class(module: nn.Module) -> str:
    # FSDP2 gives what it shards a class of its own, with its own name before the other.
    return type(module).__name__.removeprefix("FSDP")


def _by_kind(profiled: profile) -> dict[str, float]:
    seconds: Counter[str] = Counter()
    for event in profiled.key_averages():
        kind = next((kind for kind, names in _KINDS.items() if any(name in event.key for name in names)), "other")
        seconds[kind] += event.self_cpu_time_total / 1e6
    return dict(seconds)
