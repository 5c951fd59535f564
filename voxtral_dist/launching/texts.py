"""Texts that schedulers take, checked when they are given."""

from __future__ import annotations

import re

from pydantic import AfterValidator


def matching(pattern: str, sentence: str) -> AfterValidator:
    """A validator of texts all of which a pattern matches; `sentence` says what others must be."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(sentence)
        return text

    return AfterValidator(check)
