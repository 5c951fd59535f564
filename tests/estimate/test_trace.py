"""The traced kernels of a micro-batch: FLOPs equal the formulas, and one block of a kind stands for all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from voxtral_dist.config import ModelConfig, TrainableConfig
from voxtral_dist.estimate import estimator
from voxtral_dist.estimate.activations import MicroBatchShape
from voxtral_dist.estimate.estimator import meta_model_of
from voxtral_dist.estimate.gpus import GPUS
from voxtral_dist.estimate.kernels import Kernel, Kind, Phase, compiled
from voxtral_dist.estimate.roofline import Roofline
from voxtral_dist.estimate.trace import StepTracer
from voxtral_dist.model.flops import BatchShape, TrainingFlops
from voxtral_dist.model.published import MINI, voxtral_config_for_estimates

# Three windows of two examples; the tiny model has 16 audio tokens in a window.
TINY = MicroBatchShape(num_windows=3, num_examples=2, num_positions=44, num_target_tokens=7)
CLIPS = MicroBatchShape(num_windows=8, num_examples=8, num_positions=445, num_target_tokens=480)
ATTENTION: tuple[Kind, ...] = ("attention", "attention backward")


def total_flops(kernels: Iterable[Kernel], *phases: Phase, kinds: Iterable[Kind] = ("product",)) -> float:
    """FLOPs of kernels of some kinds in some phases, in all if none is named."""
    return sum(one.flops * one.count for one in kernels if one.kind in kinds and (not phases or one.phase in phases))


ALL: dict[str, Any] = {}
FROZEN = {"frozen": ["encoder"]}
FIRST_FROZEN = {"frozen": ["model.audio_tower.conv*", "model.audio_tower.layers.0.*"]}
LORA = {"lora": {"rank": 3, "dropout": 0.1}}
CASES = [
    (ALL, 0, 16),
    (ALL, 1, 16),
    (ALL, 2, 2),
    (FROZEN, 1, 16),
    (FIRST_FROZEN, 2, 1),
    (LORA, 1, 16),
]


def configs(
    path: Path | str, trainable: dict[str, Any], checkpoint_every: int, per_chunk: int, attention: str = "auto"
) -> tuple[ModelConfig, TrainableConfig]:
    model = {
        "path": str(path),
        "attention": attention,
        "activation_checkpointing": {"encoder": checkpoint_every, "language_model": checkpoint_every},
        "encoder_windows_per_chunk": per_chunk,
    }
    return ModelConfig.model_validate(model), TrainableConfig.model_validate(trainable)


def formula(model: ModelConfig, trainable: TrainableConfig, shape: MicroBatchShape) -> float:
    num_chunks = -(-shape.num_windows // model.encoder_windows_per_chunk)
    computed = BatchShape.computed(
        shape.num_windows, shape.num_examples, shape.num_positions, shape.num_target_tokens, num_chunks
    )
    return TrainingFlops(meta_model_of(model, trainable), model).hardware(computed)


@pytest.mark.parametrize(("trainable", "checkpoint_every", "per_chunk"), CASES)
def test_products_have_the_flops_of_the_formulas(tiny_model, trainable, checkpoint_every, per_chunk):
    # Eager attention is made of products, so these are all FLOPs that the formulas count.
    model, trained = configs(tiny_model, trainable, checkpoint_every, per_chunk, "eager")
    assert total_flops(StepTracer(model, trained).trace(TINY)) == formula(model, trained, TINY)


def test_the_published_shape_has_the_flops_of_the_formulas():
    model, trained = configs(MINI, ALL, 0, 16, "eager")
    assert total_flops(StepTracer(model, trained).trace(CLIPS)) == formula(model, trained, CLIPS)


def with_float8(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"float8": "rowwise"})


@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_the_language_models_matrices_are_multiplied_in_float8(tiny_model, checkpoint_every):
    pytest.importorskip("torchao")
    # A multiple of 16 positions, because others are padded in gradients of weights.
    shape = replace(TINY, num_positions=48)
    model, trained = configs(tiny_model, ALL, checkpoint_every, 16, "eager")
    kernels = StepTracer(with_float8(model), trained).trace(shape)
    number = total_flops(kernels, kinds=["float8 product"])
    matrices = [
        one.numel()
        for name, one in meta_model_of(model, trained).named_parameters()
        if "language_model.layers" in name and one.dim() == 2
    ]
    # torch computes the last product of a checkpointed block again too, because torchao's layer is one operation.
    assert number == 2 * 2 * 48 * sum(matrices) * (3 + checkpoint_every)
    if not checkpoint_every:
        assert number + total_flops(kernels) == formula(model, trained, shape)
    num_casts, num_fused = (
        sum(one.kind == "memory" for one in _each(chosen)) for chosen in (kernels, compiled(kernels))
    )
    assert num_fused < 0.2 * num_casts
    recomputed = total_flops(kernels, "recomputation", kinds=["float8 product"])
    assert recomputed == checkpoint_every * total_flops(kernels, "forward", kinds=["float8 product"])


@pytest.mark.slow
def test_float8_gains_of_llama_3_8b_what_torchao_publishes(monkeypatch):
    """torchao's documentation: 6,768 tokens a second with rowwise scales, 6,150 in bfloat16, on H100s."""
    pytest.importorskip("torchao")

    def llama(path):
        config = voxtral_config_for_estimates(path)
        text, config.audio_config.num_hidden_layers = config.text_config, 1
        text.hidden_size, text.intermediate_size, text.num_hidden_layers = 4096, 14336, 32
        text.num_attention_heads, text.num_key_value_heads, text.vocab_size = 32, 8, 128256
        return config

    monkeypatch.setattr(estimator, "voxtral_config_for_estimates", llama)
    model, trained = configs(MINI, ALL, 0, 16)
    shape, roofline = MicroBatchShape(1, 1, 8192, 8192), Roofline(GPUS["H100"], "bfloat16")
    plain, float8 = (
        roofline.time(compiled(StepTracer(one, trained).trace(shape))).seconds for one in (model, with_float8(model))
    )
    assert plain / float8 == pytest.approx(6768 / 6150, abs=0.02)


@pytest.mark.parametrize(("trainable", "checkpoint_every", "per_chunk"), CASES)
def test_one_block_of_a_kind_stands_for_all(tiny_model, trainable, checkpoint_every, per_chunk):
    model, trained = configs(tiny_model, trainable, checkpoint_every, per_chunk)
    reduced = StepTracer(model, trained).trace(TINY)
    whole = StepTracer(model, trained, keeps_all_blocks=True).trace(TINY)
    num_chunks = -(-TINY.num_windows // per_chunk)
    assert len(reduced) <= len(whole)
    assert {one.count for one in whole} == {1}
    assert _multiset(reduced) == _multiset(whole)
    assert _multiset(compiled(reduced, num_chunks)) == _multiset(compiled(whole, num_chunks))


def test_attention_counts_half_of_the_pairs_where_it_is_causal(tiny_model):
    model, trained = configs(tiny_model, ALL, 0, 16)
    tracer = StepTracer(model, trained)
    kernels = tracer.trace(TINY)
    audio, text = tracer.model.config.audio_config, tracer.model.config.text_config
    encoder = audio.num_hidden_layers * TINY.num_windows * audio.max_source_positions**2 * audio.hidden_size
    width = text.num_attention_heads * text.head_dim
    language_model = text.num_hidden_layers * TINY.num_examples * TINY.num_positions**2 * width
    assert total_flops(kernels, "forward", kinds=ATTENTION) == 4 * (encoder + language_model / 2)
    assert total_flops(kernels, "backward", kinds=ATTENTION) == 10 * (encoder + language_model / 2)


def test_checkpoints_recompute_the_forward_pass_of_their_blocks():
    kept, again = (StepTracer(*configs(MINI, ALL, every, 16)).trace(CLIPS) for every in (0, 1))
    for phase in ("forward", "backward"):
        assert _multiset(kept, phase) == _multiset(again, phase)
    for block in (0, 1):
        forward, recomputed = ([_what(k) for k in again if (k.block, k.phase) == (block, p)] for p in PHASES[:2])
        # torch stops at the last value that the backward pass needs: before the last product and what follows it.
        assert recomputed == forward[: len(recomputed)]
        assert len(forward) - len(recomputed) == 2
    # Compiled blocks are recomputed whole.
    fused = compiled(again)
    in_blocks = [one for one in fused if one.block is not None]
    for kinds in (("product",), ATTENTION):
        assert total_flops(in_blocks, "recomputation", kinds=kinds) == total_flops(in_blocks, "forward", kinds=kinds)


def test_torch_recomputes_a_compiled_block_whole():
    """What `compiled` assumes; an eager block is left before its last layer, whose result nobody needs."""
    finished = {"eager": 0, "compiled": 0}
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))

    def eager(values: torch.Tensor) -> torch.Tensor:
        output = layers(values)
        finished["eager"] += 1
        return output

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*inputs: Any) -> Any:
            outputs = graph(*inputs)
            finished["compiled"] += 1
            return outputs

        return make_boxed_func(run)

    backend = aot_autograd(fw_compiler=count, bw_compiler=lambda graph, _: make_boxed_func(graph))
    for block in (eager, torch.compile(lambda values: layers(values), backend=backend)):
        checkpoint(block, torch.randn(4, 8, requires_grad=True), use_reentrant=False).sum().backward()
    assert finished == {"eager": 1, "compiled": 2}


def test_numbers_of_kernels_of_the_published_model():
    kernels = StepTracer(*configs(MINI, ALL, 0, 16)).trace(CLIPS)
    # Seven layers of 30 blocks, six of 32, two of the projector, and logits twice: each once forward, twice backward.
    layers = 7 * 30 + 6 * 32 + 2 + 2
    products = Counter(one.phase for one in _each(kernels) if one.kind == "product")
    convolutions = 2
    assert products["forward"] + products["recomputation"] == layers + convolutions
    assert products["backward"] == 2 * (layers - 1) + convolutions
    assert sum(one.kind in ATTENTION for one in _each(kernels)) == 2 * (30 + 32)
    num_eager, num_compiled = (sum(one.count for one in some) for some in (kernels, compiled(kernels)))
    assert 4500 < num_eager < 5300
    assert 2000 < num_compiled < 2700


PHASES = ("forward", "recomputation", "backward")


def _what(kernel: Kernel) -> tuple[Any, ...]:
    return kernel.name, kernel.kind, kernel.flops, kernel.num_bytes


def _each(kernels: list[Kernel]) -> list[Kernel]:
    return [one for one in kernels for _ in range(one.count)]


def _multiset(kernels: list[Kernel], *phases: str) -> Counter[tuple[Any, ...]]:
    return Counter((one.phase, *_what(one)) for one in _each(kernels) if not phases or one.phase in phases)
