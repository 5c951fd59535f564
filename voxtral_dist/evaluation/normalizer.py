"""Named, versioned text normalization: the same for reference and hypothesis, and named in every report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from voxtral_dist.config import TextStep
from voxtral_dist.data.texts import apply_steps, even_spaces, fold


@dataclass(frozen=True)
class Normalizer:
    """A function on text, and the name and version that reports give it.

    target_text: the steps that were applied to the targets in training, which come before it.
    """

    name: str
    version: int
    function: Callable[[str], str]
    target_text: tuple[TextStep, ...] = ()

    @property
    def label(self) -> str:
        """Such as `basic-1`, or `lower_case+basic-1` after a step of target text."""
        return "+".join([*self.target_text, f"{self.name}-{self.version}"])

    def apply(self, text: str) -> str:
        """The text as it is compared."""
        return self.function(apply_steps(self.target_text, text))


def normalizer(name: Literal["none", "basic"], target_text: Sequence[TextStep] = ()) -> Normalizer:
    """The normalizer of a name, for references and hypotheses alike, behind the steps that targets went through.

    `none` only evens out white space. `basic` also applies Unicode NFKC, lower case, and turns every mark of
    punctuation and every symbol into a space, except an apostrophe inside a word. Format characters vanish.
    """
    match name:
        case "none":
            return Normalizer("none", 1, even_spaces, tuple(target_text))
        case "basic":
            return Normalizer("basic", 1, fold, tuple(target_text))
