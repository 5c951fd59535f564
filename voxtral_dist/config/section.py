"""The base class of all sections of the configuration, and value types that they share."""

from __future__ import annotations

import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationInfo, field_validator


class Section(BaseModel):
    """A part of the configuration: immutable, strict about unknown keys, and documented field by field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _takes_one_text_for_a_list(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and info.field_name and _is_list(cls.model_fields[info.field_name].annotation):
            return (value,)
        return value


def _is_list(annotation: Any) -> bool:
    """Whether a type is a list of any length, or none at all."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _is_list(arguments[0])
    if origin in (Union, UnionType):
        return all(one is NoneType or _is_list(one) for one in arguments)
    return origin is tuple and arguments[-1:] == (...,)


Argument = float | int | str | bool
TextStep = Literal["lower_case", "no_punctuation"]
Component = Literal["encoder", "projector", "language_model"]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]

_HUB_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$"
HubName = Annotated[str, StringConstraints(pattern=_HUB_NAME)]


def is_hub_name(text: str) -> bool:
    """Whether a text has the form USER/NAME of a repository on the Hugging Face hub."""
    return re.fullmatch(_HUB_NAME, text) is not None


def sorted_set(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sort the values and drop duplicates, so that their order in a file does not matter."""
    return tuple(sorted(set(values)))
