"""The base class of all sections of the configuration, and value types that they share."""

from __future__ import annotations

import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError


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


TEXT_STEPS = ("lower_case", "no_punctuation")
_FUNCTION = r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*$"


def is_function_name(text: str) -> bool:
    """Whether a text has the form `module:function`, where both may have dots."""
    return re.fullmatch(_FUNCTION, text) is not None


def check_text_step(name: str) -> str:
    """The name of a text step, if it is one of `TEXT_STEPS`, or has the form `module:function`.

    Raises:
        PydanticCustomError: it is neither; a `ValueError` whose message continues the name of the setting.
    """
    if name in TEXT_STEPS or is_function_name(name):
        return name
    raise PydanticCustomError("text_step", f"must be {', '.join(TEXT_STEPS)}, or a function as `module:function`")


Argument = float | int | str | bool
TextStep = Annotated[
    str,
    AfterValidator(check_text_step),
    WithJsonSchema({"anyOf": [{"enum": list(TEXT_STEPS)}, {"pattern": _FUNCTION, "type": "string"}]}),
]
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
