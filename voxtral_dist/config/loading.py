"""Reading configurations from YAML and `section.key=value` overrides, and writing them back."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from voxtral_dist.config.builtin import recipe_or_file, recipes
from voxtral_dist.config.run import RunConfig
from voxtral_dist.config.yaml_text import parse_yaml
from voxtral_dist.errors import UserError, lower_first
from voxtral_dist.output.masking import masked


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated configuration from a YAML file and `section.key=value` overrides, whose values are YAML.

    Raises:
        UserError: there is no file or no YAML in it, a key is unknown, or a value is out of range; the message names
            the key.

    Example:
        >>> from pathlib import Path
        >>> from voxtral_dist import load_config
        >>> config = load_config(Path("run.yaml"), ["optimizer.learning_rate=1e-5"])
        >>> config.optimizer.learning_rate
        1e-05
    """
    if path is None:
        raise UserError(
            "No configuration was given: pass `--config FILE`, or the name of a recipe (`voxtral-dist recipes`)."
        )
    path = recipe_or_file(path)
    tree = read_yaml(path)
    for override in overrides:
        _apply_override(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_blamed(error, path, overrides)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = f" The recipes of the package are {', '.join(recipes())}." if not path.exists() else ""
        raise UserError(f"The configuration {path} cannot be read: {error.strerror}.{known}") from error
    except ValueError as error:
        raise UserError(f"The configuration {path} is not valid YAML: {error}.") from error
    if not isinstance(tree, dict):
        raise UserError(f"The configuration {path} must be a mapping of keys to values, but is {_kind(tree)} instead.")
    return tree


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, from which `load_config` gives an equal one, apart from masked secrets."""
    return yaml.safe_dump(_masked(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _masked(value: Any) -> Any:
    """A value without secrets in its texts, keys included."""
    match value:
        case str():
            return masked(value)
        case dict():
            return {_masked(key): _masked(inner) for key, inner in value.items()}
        case list():
            return [_masked(inner) for inner in value]
    return value


def config_schema() -> str:
    """The JSON schema of `RunConfig`, for completion and validation in editors."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise UserError(
            f"`--set {override}` must be of the form section.key=value, such as optimizer.learning_rate=1e-5."
        )
    *parents, leaf = dotted.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"`--set {override}`: `{parent}` holds {_kind(child)}, so it has no key `{leaf}`.")
        tree = child
    try:
        # YAML 1.1 reads 1e-5 as text, for want of a dot; pydantic converts such text where the field is a number.
        tree[leaf] = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"`--set {override}`: the value is not valid YAML ({error}).") from error


def _blamed(error: ValidationError, path: Path, overrides: Sequence[str]) -> str:
    """What is wrong, after the override that is to blame, or the file."""
    in_file = _mistakes(read_yaml(path)) if overrides else []
    sentences: dict[str, list[str]] = {}
    for detail in _details(error):
        is_in_file = not overrides or _identity(detail) in in_file
        place = str(path) if is_in_file else " and ".join(f"`--set {one}`" for one in _culprits(detail, overrides))
        sentences.setdefault(place, []).append(_sentence(detail))
    return "; ".join(f"{place}: {'; '.join(found)}" for place, found in sentences.items())


def _mistakes(tree: dict[str, Any]) -> list[Any]:
    try:
        RunConfig.model_validate(tree)
    except ValidationError as error:
        return [_identity(detail) for detail in error.errors()]
    return []


def _identity(detail: ErrorDetails) -> tuple[Any, ...]:
    return detail["loc"], detail["type"], detail["msg"]


def _culprits(detail: ErrorDetails, overrides: Sequence[str]) -> Sequence[str]:
    """The overrides of the place of a mistake; of several in one section, those that its message names."""
    place = _keys(detail["loc"])
    keys = {override: override.partition("=")[0].split(".") for override in overrides}
    near = [one for one, path in keys.items() if all(a == b for a, b in zip(place, path, strict=False))]
    exact = [one for one in near if len(keys[one]) <= len(place)]
    named = [one for one in near if keys[one][-1] in detail["msg"]]
    # A later override of a key wins.
    return exact[-1:] or named or near or overrides


def _details(error: ValidationError) -> Iterator[ErrorDetails]:
    for detail in error.errors():
        # A value that is neither `auto` nor valid is wrong as what it looks like.
        if not str(detail["loc"][-1:]).startswith('("literal['):
            yield detail


def _sentence(detail: ErrorDetails) -> str:
    location, found = ".".join(_keys(detail["loc"])), reprlib.repr(detail["input"])
    match detail["type"]:
        case "extra_forbidden":
            return _unknown_key(detail)
        case "missing":
            return f"`{location}` is missing"
        case "value_error":
            return detail["msg"].removeprefix("Value error, ")
        case "tuple_type" | "list_type":
            such = f", such as [{detail['input']}]" if isinstance(detail["input"], str | float | int) else ""
            return f"`{location}` must be a list{such}, but is {found} instead"
        case "dict_type" | "model_type":
            return f"`{location}` must be a mapping of keys to values, but is {found} instead"
    return f"`{location}`: {lower_first(detail['msg'])}, but is {found} instead"


def _keys(place: Sequence[int | str]) -> list[str]:
    """The keys on the way to a value, without the types between them that may have been meant."""
    return [str(part) for part in place if part != "bool" and not str(part).endswith("Config")]


def _unknown_key(detail: ErrorDetails) -> str:
    *parents, key = _keys(detail["loc"])
    known = _known_keys(parents)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"known keys are {', '.join(known)}"
    place = ".".join([*parents, key])
    return f"`{place}` is not a known key; {hint}"


def _known_keys(parents: Sequence[str]) -> list[str]:
    """The keys of the section at a path of keys, which may lead through lists and mappings of sections."""
    section: type[BaseModel] = RunConfig
    for part in parents:
        field = section.model_fields.get(part)
        if field is not None:
            section = _section_in(field.annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_section_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((section for section in found if section is not None), None)


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"
