"""A report as one HTML file with styles, script, charts and audio inside, which loads nothing else.

Jinja, which torch installs anyway, escapes everything that is put into its templates, so that no transcript, key or
name can become markup. The page's content security policy allows one script, by its hash, and no requests.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from voxtral_dist.reporting.cards import shortened
from voxtral_dist.reporting.contents import ReportContents
from voxtral_dist.reporting.statistics import MIN_UTTERANCES, Column, other_columns, points
from voxtral_dist.reporting.test_set_section import TestSetSection
from voxtral_dist.scoring.deciding_rate import ERROR_UNITS
from voxtral_dist.scoring.results import percent
from voxtral_dist.scoring.tables import format_audio, format_interval

_TEMPLATES = Path(__file__).with_name("templates")
_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n\r"
}


def render_html(report: ReportContents) -> str:
    """The HTML of a report."""
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "behaviour.js"))
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            style=Markup(style),
            style_hash=_source_hash(style),
            script=Markup(script),
            script_hash=_source_hash(script),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, finalize=_printable
    )
    environment.globals |= {"min_utterances": MIN_UTTERANCES, "error_units": ERROR_UNITS}
    environment.filters |= {
        "percent": percent,
        "interval": format_interval,
        "signed_interval": _signed_interval,
        "points": points,
        "audio": format_audio,
        "shortened": shortened,
        "other_columns": _other_columns,
        "with_code": _with_code,
    }
    return environment


def _printable(value: object) -> object:
    """Replace the control characters that HTML forbids; bytes of a tokenizer may decode to them."""
    return value.translate(_CONTROLS) if type(value) is str else value


def _source_hash(source: str) -> str:
    """A hash as content security policies write it."""
    return f"sha256-{b64encode(hashlib.sha256(source.encode('utf-8')).digest()).decode('ascii')}"


def _signed_interval(interval: tuple[float, float] | None) -> str:
    return format_interval(interval, "+.2f")


def _other_columns(test_sets: Sequence[TestSetSection]) -> list[Column]:
    return other_columns([one.result for one in test_sets])


def _with_code(sentence: str) -> Markup:
    """A sentence with the parts between backticks set as code."""
    parts = enumerate(sentence.translate(_CONTROLS).split("`"))
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part) for place, part in parts
    )
