"""Adapters as vLLM serves them beside the model that training started from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from voxtral_dist.config import LoraConfig
from voxtral_dist.errors import UserError
from voxtral_dist.model.adapters import ADAPTER_WEIGHTS, adapter_config
from voxtral_dist.model.saving import save_tensors
from voxtral_dist.model.trainable import ADAPTER_NAME, is_adapter

# vLLM's modules have the names of transformers 4. It compares them with those of a file, and ignores what it does not
# find without a word, so that the base model would answer.
_OURS, _VLLM = "model.language_model.", "base_model.model.language_model.model."


def vllm_refusal(lora: LoraConfig) -> str | None:
    """Why vLLM cannot serve adapters of this configuration beside their base model; None if it can."""
    others = sorted({*lora.targets, *lora.trained_whole} - {"language_model"})
    if lora.use_dora:
        return "vLLM does not serve DoRA adapters (`trainable.lora.use_dora`)"
    if others or lora.trained_whole:
        where = " and ".join(others) or "language_model, trained whole"
        return f"vLLM serves adapters of the language model only, and this run trains the {where} too"
    return None


def refuse_unservable(lora: LoraConfig) -> None:
    """Refuse to write adapters for vLLM that it would not serve.

    Raises:
        UserError: see `vllm_refusal`.
    """
    refusal = vllm_refusal(lora)
    if refusal is not None:
        raise UserError(
            f"{refusal}: serve the merged model instead, by `voxtral-dist export SOURCE OUT --layout mistral`."
        )


def write_vllm_adapter(trained: Mapping[str, Tensor], lora: LoraConfig, model_path: str, folder: Path) -> None:
    """Write trained adapters for vLLM's `--lora-modules`; its `--max-lora-rank` must be at least their rank.

    Args:
        trained: all trained parameters by name.
        lora: section `trainable.lora` of the run.
        model_path: the model that training started from.
        folder: is created.

    Raises:
        UserError: vLLM cannot serve them.
    """
    refuse_unservable(lora)
    leaves = sorted({name.partition(".lora_A.")[0].rpartition(".")[2] for name in trained if ".lora_A." in name})
    folder.mkdir(parents=True, exist_ok=True)
    adapter_config(lora, leaves, model_path).save_pretrained(folder)
    tensors = {vllm_name(name): value.contiguous() for name, value in trained.items()}
    save_tensors(tensors, folder / ADAPTER_WEIGHTS)


def vllm_name(name: str) -> str:
    """The name in vLLM's adapter file of an adapter's parameter in the language model."""
    assert name.startswith(_OURS), name
    return _VLLM + name.removeprefix(_OURS).replace(f".{ADAPTER_NAME}.", ".")


def refuse_without_effect(trained: Mapping[str, Tensor]) -> None:
    """Refuse trained parameters that leave the model as it was.

    Raises:
        UserError: every adapter adds zero, and nothing else is trained.
    """
    others = [name for name in trained if not is_adapter(name) or ".lora_magnitude_vector." in name]
    added = [value for name, value in trained.items() if ".lora_B." in name]
    if not others and not any(torch.count_nonzero(value) for value in added):
        raise UserError(
            "The adapters change nothing: every matrix B is zero, as before training. Check the learning rate and the "
            "number of steps of the run."
        )
