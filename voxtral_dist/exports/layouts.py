"""The layouts of exports: the full model for transformers or vLLM, and adapters alone for peft or vLLM."""

from __future__ import annotations

from typing import Literal

Layout = Literal["hf", "mistral"]
AdapterLayout = Literal["peft", "vllm-lora"]
ExportLayout = Literal["hf", "mistral", "peft", "vllm-lora"]
ADAPTER_LAYOUTS: tuple[AdapterLayout, ...] = ("peft", "vllm-lora")
