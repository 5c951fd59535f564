"""Audio that a GPU decodes in a second, by a roofline of continuous decoding.

B clips that fill a window, each of P prompt and audio positions and n new tokens, take

    B F / products + n (w + B (P + n / 2) k) / bandwidth

for FLOPs F of a forward pass over a clip, w bytes of the language model's weights, which each step of decoding reads
once, and k bytes of keys and values of a position. Rates are those that the GPU sustains. It is a bound for steps that
are CUDA graphs (docs/design.md, "Continuous batching"), not yet measured.
"""

from __future__ import annotations

from voxtral_dist.estimate.estimator import Estimator
from voxtral_dist.estimate.gpus import Gpu
from voxtral_dist.estimate.workload import clips
from voxtral_dist.model.flops import BatchShape


def decoding_rate(estimator: Estimator, gpu: Gpu) -> float:
    """Seconds of audio that a GPU with whole weights decodes in a second."""
    config, model = estimator.config, estimator.model
    rows, window = config.evaluation.batch_size, estimator.window_sizes.seconds
    clip = clips(1, estimator.window_sizes)
    shape = BatchShape.needed(1, [clip.num_positions], clip.num_target_tokens)
    flops = rows * sum(estimator.flops.forward(shape).values())
    size, text = int(model.lm_head.weight.element_size()), model.config.text_config
    layers = (model.model.language_model.layers, model.lm_head)
    weights: int = size * sum(one.numel() for layer in layers for one in layer.parameters())
    of_position: int = size * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    positions = clip.num_positions - clip.num_target_tokens / 2
    steps = clip.num_target_tokens * (weights + rows * positions * of_position)
    products = gpu.peak_flops(config.model.precision) * gpu.products
    seconds = flops / products + steps / (gpu.bandwidth * gpu.sustained_bandwidth)
    return rows * window / seconds
