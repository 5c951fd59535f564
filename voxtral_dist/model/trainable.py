"""The choice of trained parameters by components, patterns and adapters, and the table of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from fnmatch import fnmatchcase
from typing import Any, get_args

from torch import nn

from voxtral_dist.config import Component, LoraConfig, TrainableConfig
from voxtral_dist.errors import UserError
from voxtral_dist.model.quantized_linear import quantized_layers

COMPONENTS: tuple[Component, ...] = get_args(Component)
# Prefixes of parameter names. All others belong to the language model, `lm_head` included.
_PREFIXES: dict[str, Component] = {"model.audio_tower.": "encoder", "model.multi_modal_projector.": "projector"}
# peft's names for the parameters that it adds to a layer, and for the adapter.
_ADAPTER_PARTS = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.")
ADAPTER_NAME = "default"


def component_of(parameter_name: str) -> Component:
    """The component of a Voxtral that a parameter belongs to, by its name."""
    return next((part for prefix, part in _PREFIXES.items() if parameter_name.startswith(prefix)), "language_model")


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter was added by LoRA or DoRA."""
    return any(part in parameter_name for part in _ADAPTER_PARTS)


def choose_trainable(model: nn.Module, config: TrainableConfig) -> None:
    """Add adapters and freeze all parameters that are not trained, in place.

    Raises:
        UserError: a pattern or layer name matches nothing, peft is not installed, or no parameter is trained.
    """
    if config.lora is not None:
        _add_adapters(model, config.lora)
    _freeze(model, config.frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("`trainable.frozen` leaves no parameter to train: freeze less.")


def _freeze(model: nn.Module, frozen: Sequence[str]) -> None:
    for what in frozen:
        chosen = [
            one for name, one in model.named_parameters() if what == component_of(name) or fnmatchcase(name, what)
        ]
        if not chosen:
            raise UserError(
                f"`trainable.frozen`: {what!r} is not one of {', '.join(COMPONENTS)} and matches no parameter, "
                f"such as {next(name for name, _ in model.named_parameters())!r}: correct the pattern."
            )
        for parameter in chosen:
            parameter.requires_grad_(False)


def _add_adapters(model: nn.Module, lora: LoraConfig) -> None:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "`trainable.lora` needs the package peft: install it by `pip install 'voxtral-dist[lora]'`."
        ) from error
    for name, parameter in model.named_parameters():
        if component_of(name) not in lora.trained_whole:
            parameter.requires_grad_(False)
    layers = [name for component in lora.targets for name in _target_layers(model, component, lora.targets[component])]
    whole = [one for name, one in model.named_parameters() if one.requires_grad]
    peft.inject_adapter_in_model(peft_config(lora, layers), model, ADAPTER_NAME)
    # peft freezes all parameters but those of adapters.
    for parameter in whole:
        parameter.requires_grad_(True)


def peft_config(lora: LoraConfig, layers: Sequence[str]) -> Any:
    """peft's configuration of adapters for these layers."""
    import peft

    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.use_dora,
        target_modules=list(layers),
    )


def _target_layers(model: nn.Module, component: Component, names: Sequence[str]) -> Iterator[str]:
    # `lm_head` computes losses of some positions only (`TargetLogits`), and an adapter around it would see all of them.
    linear = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"]
    inside = [name for name in linear if component_of(f"{name}.") == component]
    for wanted in names:
        chosen = [name for name in inside if name.rpartition(".")[2] == wanted]
        if not chosen:
            known = sorted({name.rpartition(".")[2] for name in inside})
            raise UserError(
                f"`trainable.lora.targets.{component}`: {wanted!r} is not one of its linear layers, "
                f"which are {', '.join(known)}."
            )
        yield from chosen


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a component: its own trained ones, those of adapters, and frozen ones."""

    trained: int = 0
    adapters: int = 0
    frozen: int = 0


def count_parameters(model: nn.Module) -> dict[Component, ParameterCount]:
    """Count the parameters of each component, of models on the meta device too."""
    counts = dict.fromkeys(COMPONENTS, ParameterCount())
    quantized = quantized_layers(model)
    for name, parameter in model.named_parameters():
        before = counts[component_of(name)]
        size = quantized[name].num_weights if name in quantized else parameter.numel()
        counts[component_of(name)] = ParameterCount(
            before.trained + size * (parameter.requires_grad and not is_adapter(name)),
            before.adapters + size * (parameter.requires_grad and is_adapter(name)),
            before.frozen + size * (not parameter.requires_grad),
        )
    return counts


def parameter_table(model: nn.Module) -> list[str]:
    """Lines of a table for the start of a run: trained, adapter and frozen parameters of each component."""
    counts = count_parameters(model)
    total = ParameterCount(*(sum(column) for column in zip(*map(astuple, counts.values()), strict=True)))
    rows = [["parameters", "trained", "adapters", "frozen"]]
    rows += [[name, *(f"{size:,}" for size in astuple(count))] for name, count in [*counts.items(), ("all", total)]]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]) for row in rows]
