"""Passwords and tokens, masked wherever something is printed or stored."""

from __future__ import annotations

import os
import re

MASK = "***"
# Of a URL. A password may hold an @ itself, and any character but those that end a location in a line or a JSON text.
_USER = re.compile(r"""(?<=://)[^/ \t\n"]*@""")
_SECRET_PARAMETER = re.compile(
    r"""([?&][\w.%-]*(?:sign|sig|token|key|secret|passw|auth|cred)[\w.%-]*=)[^& \t\n"'`#]+""", re.IGNORECASE
)
# Forms by which Hugging Face, AWS, GitHub, GitLab, Slack and OpenAI mark tokens, and JSON web tokens.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|A[KS]IA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|sk-[\w-]{20,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})"
)
_BEARER = re.compile(r"(\bBearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY)$")
# Shorter values are words that texts hold anyway.
_SHORTEST_SECRET = 12


def masked(text: str) -> str:
    """A text without the passwords of URLs, the secret parameters of their queries, and tokens.

    Tokens are what looks like one, and the values of environment variables that are named like one, such as
    `HF_TOKEN`.
    """
    for value in _secret_values():
        text = text.replace(value, MASK)
    text = _SECRET_PARAMETER.sub(rf"\1{MASK}", _USER.sub(f"{MASK}@", text))
    return _BEARER.sub(rf"\1{MASK}", _TOKEN.sub(MASK, text))


def _secret_values() -> list[str]:
    """The values of variables that are named like a secret, the longest first."""
    found = {
        value for name, value in os.environ.items() if len(value) >= _SHORTEST_SECRET and _SECRET_VARIABLE.search(name)
    }
    return sorted(found, key=len, reverse=True)
