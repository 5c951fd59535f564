"""vLLM's own renaming rules for Voxtral, as tables, and the modules of its model.

Read from the released package vllm 0.33.0. `re.fullmatch` decides which rule applies, as there.
"""

from __future__ import annotations

import re

# vllm/model_executor/models/voxtral.py, `VoxtralForConditionalGeneration.load_weights`: `remapping_rules`.
MODEL_RULES = (
    (r"mm_streams_embeddings.embedding_module\.(.*)", r"\1"),
    (r"mm_whisper_embeddings\.(.*)", r"\1"),
    (r"audio_language_projection\.(.*)", r"audio_language_adapter.\1"),
    (r"audio_language_adapter\.0\.weight", r"audio_language_adapter.w_in.weight"),
    (r"audio_language_adapter\.2\.weight", r"audio_language_adapter.w_out.weight"),
)
# The same file, `VoxtralEncoderModel.mistral_remapping`, without its rules for the causal encoder of other models.
ENCODER_RULES = (
    (r"whisper_encoder\.conv_layers\.0\.(weight|bias)", r"whisper_encoder.conv1.\1"),
    (r"whisper_encoder\.conv_layers\.1\.(weight|bias)", r"whisper_encoder.conv2.\1"),
    (
        r"whisper_encoder\.transformer\.layers\.(\d+)\.attention\.w([qkv])\.(weight|bias)",
        r"whisper_encoder.layers.\1.self_attn.\2_proj.\3",
    ),
    (
        r"whisper_encoder\.transformer\.layers\.(\d+)\.attention\.wo\.(weight|bias)",
        r"whisper_encoder.layers.\1.self_attn.out_proj.\2",
    ),
    (
        r"whisper_encoder\.transformer\.layers\.(\d+)\.attention_norm\.(weight|bias)",
        r"whisper_encoder.layers.\1.self_attn_layer_norm.\2",
    ),
    (
        r"whisper_encoder\.transformer\.layers\.(\d+)\.feed_forward\.w1\.(weight|bias)",
        r"whisper_encoder.layers.\1.mlp.fc1.\2",
    ),
    (
        r"whisper_encoder\.transformer\.layers\.(\d+)\.feed_forward\.w2\.(weight|bias)",
        r"whisper_encoder.layers.\1.mlp.fc2.\2",
    ),
    (
        r"whisper_encoder\.transformer\.layers\.(\d+)\.ffn_norm\.(weight|bias)",
        r"whisper_encoder.layers.\1.final_layer_norm.\2",
    ),
    (r"whisper_encoder\.transformer\.norm\.(weight|bias)", r"whisper_encoder.layer_norm.\1"),
)
# vllm/model_executor/models/mistral.py, `MistralForCausalLM.mistral_mapping`, without its quantization scales. It maps
# parts of a name between its dots, in `maybe_remap_mistral`.
LANGUAGE_MODEL_PARTS = {
    "layers": "model.layers",
    "attention": "self_attn",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "attention_norm": "input_layernorm",
    "feed_forward": "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "norm": "model.norm",
}
_EMBEDDINGS, _PROJECTION = "mm_whisper_embeddings.tok_embeddings", "mm_whisper_embeddings.audio_language_projection"


def vllm_parameter(native: str) -> str:
    """The parameter of vLLM's model, before it packs q, k and v, that a native tensor is loaded into."""
    name = _renamed(native, MODEL_RULES)
    if native.startswith("mm_whisper_embeddings") and not native.startswith((_EMBEDDINGS, _PROJECTION)):
        return f"whisper_encoder.{_renamed(name, ENCODER_RULES)}"
    if name.startswith("audio_language_adapter."):
        return name
    for part in name.split("."):
        # vLLM looks whether the new part is there already, because it replaces anywhere in the name.
        if part in LANGUAGE_MODEL_PARTS and LANGUAGE_MODEL_PARTS[part] not in name:
            name = name.replace(part, LANGUAGE_MODEL_PARTS[part])
    return f"language_model.{name}"


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        if re.fullmatch(pattern, name):
            name = re.sub(pattern, replacement, name)
    return name


def vllm_adapter_module(name: str) -> str:
    """The module to which a tensor of an adapter's file belongs.

    vllm/lora/utils.py, `parse_fine_tuned_lora_name`; vLLM's Voxtral has no `hf_to_vllm_mapper` that would rename more.
    A module that its model does not have is left out without a word (vllm/lora/model_manager.py, `activate_adapter`).
    """
    *module, matrix, leaf = name.replace("base_model.model.", "").split(".")
    assert (matrix, leaf) in (("lora_A", "weight"), ("lora_B", "weight")), f"{name} is unsupported LoRA weight"
    return ".".join(module)


def vllm_parameters(num_encoder_blocks: int, num_blocks: int) -> set[str]:
    """The parameters of vLLM's model, before it packs q, k and v.

    vllm/model_executor/models/whisper.py (`WhisperEncoder`, k has no bias) and llama.py.
    """
    block = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    block |= {f"mlp.{name}_proj.weight" for name in ("gate", "down", "up")}
    block |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    encoder_layers = {"self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"}
    encoder_layers |= {"self_attn_layer_norm", "final_layer_norm"}
    encoder_block = {f"{name}.{leaf}" for name in encoder_layers for leaf in ("weight", "bias")}
    encoder_block.add("self_attn.k_proj.weight")
    encoder = "whisper_encoder.whisper_encoder"
    ends = {f"{encoder}.{name}.{leaf}" for name in ("conv1", "conv2", "layer_norm") for leaf in ("weight", "bias")}
    ends |= {f"language_model.{name}.weight" for name in ("lm_head", "model.norm", "model.embed_tokens")}
    ends |= {f"audio_language_adapter.{name}.weight" for name in ("w_in", "w_out")}
    blocks = {f"language_model.model.layers.{number}.{name}" for number in range(num_blocks) for name in block}
    return (
        ends
        | blocks
        | {f"{encoder}.layers.{number}.{name}" for number in range(num_encoder_blocks) for name in encoder_block}
    )
