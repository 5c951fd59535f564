"""What a GPU is and how fast its products are, and what cuDNN's attention does at the language model's shapes.

torch 2.11 to 2.14 prefer cuDNN's attention on Hopper and Blackwell, also with masks. Its backward pass has given NaN
gradients for explicit masks at some lengths (pytorch/pytorch#196678), and it builds a plan for every new shape.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from voxtral_dist.distributed.devices import known_peak_flops
from voxtral_dist.distributed.world import alone
from voxtral_dist.model.published import MINI, published_settings

NUM_PRODUCTS, NUM_WARM_UP_PRODUCTS = 20, 5
COPIED_BYTES = 4 * 2**30
# `length % 128 == 64` is where NaN was reported; the last length is a control.
MASKED_LENGTHS = (448, 576, 512)
# Rows' logsumexp must be below -88.7 for it. Scores around -120 are of heads with massive activations.
LOW_SCORE = -120.0
NEW_LENGTHS = (409, 413, 421, 427)


@dataclass(frozen=True)
class _Shape:
    """Shape of the language model's attention: B rows, heads, and heads of keys, of a width."""

    rows: int
    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def published(cls, device: torch.device, is_quick: bool) -> _Shape:
        """The published shape at a micro-batch of 8; tiny for a quick run."""
        if is_quick:
            return cls(2, 4, 2, 16, torch.float32, device)
        model = published_settings(MINI)["text_config"]
        heads, kv_heads, width = (int(model[key]) for key in _HEADS)  # type: ignore[call-overload]
        return cls(8, heads, kv_heads, width, torch.bfloat16, device)

    def random(self, heads: int, length: int) -> Tensor:
        """Random values `(B, heads, T, width)` that require a gradient."""
        values = torch.randn(self.rows, heads, length, self.width, device=self.device, dtype=self.dtype)
        return values.requires_grad_()


_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")


def device_facts() -> dict[str, Any]:
    """This machine's accelerator, its driver, and its rates of products of large random matrices and of copies."""
    device = alone().device
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    copied = torch.zeros(COPIED_BYTES if on_gpu else 2**20, dtype=torch.uint8, device=device)
    return {
        "type": device.type,
        "name": name,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else 0,
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "matmul_flops_per_second": 2 * size**3 / _median_seconds(lambda: left @ right, device),
        "matmul_size": size,
        "matmul_precision": str(dtype).removeprefix("torch."),
        "data_sheet_flops_per_second": known_peak_flops(name, "bfloat16") if on_gpu else None,
        # Read and written.
        "copied_bytes_per_second": 2 * copied.nbytes / _median_seconds(copied.clone, device),
    }


def attention_facts(is_quick: bool) -> dict[str, Any]:
    """Whether gradients of attention are finite, and what a new shape costs, with cuDNN's kernel and without."""
    shape = _Shape.published(alone().device, is_quick)
    torch.manual_seed(0)
    lengths = (32, 64) if is_quick else MASKED_LENGTHS
    masked = product(lengths, (0.0, LOW_SCORE), (True,), (True, False))
    causal = product(lengths[:1], (0.0, LOW_SCORE), (False,), (True, False))
    return {
        "gradients": [_or_error(_kernel_gradients, shape, *case) for case in (*masked, *causal)],
        "language_model": [_or_error(_model_gradients, shape, is_quick, with_cudnn) for with_cudnn in (True, False)],
        "new_shapes": [
            _or_error(_new_shapes, shape, (33, 37) if is_quick else NEW_LENGTHS, *case)
            for case in product((False, True), (True, False))
        ],
    }


def _or_error(check: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a check finds; a kernel that refuses its inputs is a finding too."""
    try:
        return check(*arguments)
    except RuntimeError as error:
        return {"failed": f"{check.__name__}{arguments[1:]}: {error}"}


def _kernel_gradients(shape: _Shape, length: int, score: float, has_mask: bool, with_cudnn: bool) -> dict[str, Any]:
    """Whether gradients of attention are finite where all scores are near `score`: with the mask of left padding, or
    causal."""
    query, key, value = _inputs(shape, length)
    if score:
        # A common component of queries and keys shifts every score, which is divided by the root of the width.
        shift = (abs(score) / shape.width**0.5) ** 0.5
        query, key = (query + shift).detach().requires_grad_(), (key - shift).detach().requires_grad_()
    mask = _left_padded(shape, length)
    is_real = mask.diagonal(dim1=2, dim2=3)[:, 0] if has_mask else mask.new_ones(shape.rows, length)
    with _cudnn(with_cudnn):
        output = _attention(query, key, value, mask if has_mask else None)
        output.transpose(1, 2)[is_real].float().sum().backward()
    gradients = (query.grad, key.grad, value.grad)
    return {
        "length": length,
        "scores_near": score,
        "left_padding": has_mask,
        "cudnn": with_cudnn,
        "backward": type(output.grad_fn).__name__,
        "output_of_tokens_is_finite": _is_finite(output.transpose(1, 2)[is_real]),
        "gradients_are_finite": {name: _is_finite(one) for name, one in zip("qkv", gradients, strict=True)},
    }


def _model_gradients(shape: _Shape, is_quick: bool, with_cudnn: bool) -> dict[str, Any]:
    """Whether all gradients of two blocks of the language model are finite for rows that are padded on the left."""
    torch.manual_seed(0)
    sizes = published_settings(MINI)["text_config"] | {"num_hidden_layers": 2, "vocab_size": 1024}
    if is_quick:
        sizes |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"head_dim": 16}
    with shape.device:
        model = LlamaModel(LlamaConfig(**sizes, attn_implementation="sdpa")).to(shape.dtype)
    length = 64 if is_quick else MASKED_LENGTHS[0]
    is_real = _left_padded(shape, length).diagonal(dim1=2, dim2=3)[:, 0]
    ids = torch.randint(0, 1024, (shape.rows, length), device=shape.device)
    with _cudnn(with_cudnn):
        states = model(input_ids=ids, attention_mask=is_real.long()).last_hidden_state
        states[is_real].float().square().mean().backward()
    gradients = {name: one.grad for name, one in model.named_parameters()}
    return {
        "length": length,
        "cudnn": with_cudnn,
        "gradients_that_are_not_finite": [name for name, one in gradients.items() if not _is_finite(one)],
        "gradient_norm": float(torch.nn.utils.get_total_norm([one for one in gradients.values() if one is not None])),
    }


def _new_shapes(shape: _Shape, lengths: tuple[int, ...], has_mask: bool, with_cudnn: bool) -> dict[str, Any]:
    """Seconds of a forward and a backward pass of one layer's attention: the first of a length, and the next one."""
    first, again = [], []
    for length in lengths:
        mask = _left_padded(shape, length) if has_mask else None
        inputs = _inputs(shape, length)

        def both_passes(inputs: tuple[Tensor, ...] = inputs, mask: Tensor | None = mask) -> None:
            _attention(*inputs, mask).float().sum().backward()

        with _cudnn(with_cudnn):
            first.append(_seconds(both_passes, shape.device))
            again.append(_seconds(both_passes, shape.device))
    return {
        "mask": has_mask,
        "cudnn": with_cudnn,
        "first_seconds": statistics.median(first),
        "next_seconds": statistics.median(again),
    }


def _inputs(shape: _Shape, length: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(shape.random(heads, length) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))  # type: ignore[return-value]


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as transformers calls torch's: keys are repeated where there is a mask."""
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _left_padded(shape: _Shape, length: int) -> Tensor:
    """Causal mask `(B, 1, T, T)` of rows that begin with 0, 1, 2 and so on padding positions, which see nothing."""
    places = torch.arange(length, device=shape.device)
    is_token = places >= torch.arange(shape.rows, device=shape.device)[:, None]
    is_past = places <= places[:, None]
    return (is_past & is_token[:, None, :] & is_token[:, :, None])[:, None]


@contextmanager
def _cudnn(is_enabled: bool) -> Iterator[None]:
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(is_enabled)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def _is_finite(values: Tensor | None) -> bool:
    return values is not None and bool(values.isfinite().all())


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    seconds = [_seconds(call, device) for _ in range(NUM_WARM_UP_PRODUCTS + NUM_PRODUCTS)]
    return statistics.median(seconds[NUM_WARM_UP_PRODUCTS:])


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
