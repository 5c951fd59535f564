"""Reference pages written from the code as the site is built, so that they can't disagree with it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from voxtral_dist.cli.main import build_parser
from voxtral_dist.config import RunConfig

_ROOT = Path(__file__).resolve().parents[2]
# What argparse knows of a command beside its own options.
_SUBCOMMANDS = argparse._SubParsersAction


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference pages and those of the repository's root; called by MkDocs."""
    pages = {"configuration.md": configuration_page(), "command_line.md": command_line_page()}
    for name in ("changelog", "contributing"):
        text = (_ROOT / f"{name.upper()}.md").read_text(encoding="utf-8")
        # Seen from docs/, its pages are neighbours.
        pages[f"{name}.md"] = text.replace("](docs/", "](")
    for name, page in pages.items():
        files.append(File.generated(config, name, content=page))
    return files


def configuration_page() -> str:
    """Every key of a run's configuration: type, default, and the docstring of its field."""
    lines = [
        "# Configuration",
        "",
        "A run is described by one YAML file. Any value can be set on the command line too: "
        "`--set optimizer.learning_rate=1e-5`. Unknown keys are refused. `voxtral-dist config schema` prints the JSON "
        "schema for editors, and `voxtral-dist train --config FILE --print-config` the resolved configuration.",
        "",
    ]
    return "\n".join([*lines, *_section_lines(RunConfig, "")])


def _section_lines(section: type[BaseModel], path: str) -> Iterator[str]:
    yield f"## `{path}`" if path else "## The run itself"
    yield ""
    yield _one_paragraph(section.__doc__)
    yield ""
    nested = {name: found for name, field in section.model_fields.items() if (found := section_of(field.annotation))}
    for name, field in section.model_fields.items():
        key = f"{path}.{name}" if path else name
        yield f"### `{key}` {{: #{key.replace('.', '-')} }}"
        yield ""
        if name in nested:
            yield f"{type_text(field.annotation)}; its keys are [below](#{_anchor(_path_of(key, field))})."
        else:
            yield f"{type_text(field.annotation)}; {_default_text(field)}"
        yield ""
        yield _one_paragraph(field.description)
        yield ""
    for name, found in nested.items():
        yield from _section_lines(found, _path_of(f"{path}.{name}" if path else name, section.model_fields[name]))


def _path_of(key: str, field: FieldInfo) -> str:
    """Path of a section: `.NAME` stands for the keys of a mapping, `[]` for the items of a list."""
    origin = get_origin(_without_none(field.annotation))
    return f"{key}.NAME" if origin is dict else f"{key}[]" if origin is tuple else key


def _anchor(path: str) -> str:
    """Anchor that Python-Markdown's table of contents gives to the heading of a section."""
    return re.sub(r"[^\w\s-]", "", path).strip().lower()


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Section that a field holds, by itself or inside of a list, a mapping or an optional value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := section_of(argument))), None)


def type_text(annotation: Any) -> str:
    """Type of a field in words that a user of YAML knows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin in (Union, UnionType):
        kinds = [type_text(argument) for argument in arguments if argument is not NoneType]
        return " or ".join([*kinds, *(["null"] if NoneType in arguments else [])])
    if origin is Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if origin is tuple:
        items = arguments[:1] if len(arguments) == 2 and arguments[1] is Ellipsis else arguments
        return "list of " + ", ".join(dict.fromkeys(type_text(item) for item in items))
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"mapping of names to {type_text(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {"bool": "true or false", "int": "whole number", "float": "number", "str": "text", "Path": "path"}
    return names.get(getattr(annotation, "__name__", ""), "language code (ISO 639-1)")


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required."
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined or isinstance(default, BaseModel):
        return ""
    if isinstance(default, tuple | list):
        return f"default `[{', '.join(map(str, default))}]`."
    shown = (
        {None: "null", True: "true", False: "false"}.get(default, default) if not isinstance(default, dict) else default
    )
    return f"default `{shown}`."


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) is Annotated:
        return _without_none(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return next(argument for argument in get_args(annotation) if argument is not NoneType)
    return annotation


def _one_paragraph(text: str | None) -> str:
    without_example = re.split(r"\n\s*Example:\n", text or "")[0]
    paragraphs = re.split(r"\n\s*\n", without_example.strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def command_line_page() -> str:
    """Every command with its arguments, as `--help` prints them."""
    lines = ["# Command line", "", "Exit codes are listed in [Exit codes](exit_codes.md).", ""]
    return "\n".join([*lines, *_command_lines(build_parser())])


def _command_lines(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, _SUBCOMMANDS):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for name, command in action.choices.items():
                yield from _one_command(command, helps.get(name))
                yield from _command_lines(command)


def _one_command(command: argparse.ArgumentParser, summary: str | None) -> Iterator[str]:
    yield f"## {command.prog}"
    yield ""
    if summary:
        yield f"{summary[:1].upper()}{summary[1:]}."
        yield ""
    shown = [action for action in command._actions if not isinstance(action, _SUBCOMMANDS) and _is_shown(action)]
    if shown:
        yield "| argument | meaning |"
        yield "|---|---|"
        yield from (f"| {_argument_text(action)} | {_help_text(action, command)} |" for action in shown)
        yield ""


def _is_shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and "--help" not in action.option_strings


def _argument_text(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest.upper()}`"
    value = "" if action.nargs == 0 else f" {action.metavar or _choices(action) or action.dest.upper()}"
    return f"`{', '.join(action.option_strings)}{value}`".replace("|", "\\|")


def _choices(action: argparse.Action) -> str | None:
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None


def _help_text(action: argparse.Action, command: argparse.ArgumentParser) -> str:
    expanded = command._get_formatter()._expand_help(action) if action.help else ""
    return expanded.replace("|", "\\|")
