"""The base class of all sections of the configuration, and value types that they share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints


class Section(BaseModel):
    """A part of the configuration: immutable, strict about unknown keys, and documented field by field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


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
