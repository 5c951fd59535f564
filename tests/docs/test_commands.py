"""Commands in the README and the documentation exist: programs, options, files and targets of make."""

import argparse
import contextlib
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from voxtral_dist.cli.main import build_parser
from voxtral_dist.config import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What the launchers run, and the command whose arguments it takes.
LAUNCHED = {
    "launch/train.py": ["train"],
    "launch/evaluate.py": ["evaluate"],
    "launch/doctor.py": ["doctor", "--distributed"],
    "docker/entrypoint": ["train"],
    "docker/entrypoint doctor": ["doctor", "--distributed"],
}
# What the user has; everything else that looks like a file of this repository must be one.
FOLDERS_OF_THE_REPOSITORY = ("launch/", "ds_configs/", "docker/", "benchmarks/")


def words_of(line: str) -> list[str]:
    """Words as a shell splits them; of a line that is no command, any."""
    with contextlib.suppress(ValueError):
        return shlex.split(line, comments=True)
    return line.split()


def block_lines(page: Path) -> list[str]:
    """Lines of the blocks that show commands, with continued lines joined."""
    text = page.read_text(encoding="utf-8")
    blocks = [body for language, body in FENCE.findall(text) if language in ("", "bash")]
    return [line for body in blocks for line in body.replace("\\\n", " ").splitlines()]


def inline_commands(page: Path) -> list[str]:
    """Commands inside of sentences, which may lack arguments."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"`((?:voxtral-dist|deepspeed|make|docker/entrypoint) [^`]+)`", text)
    return [" ".join(command.split()) for command in found]


def arguments_of(command: str) -> list[str] | None:
    """Arguments for the parser of `voxtral-dist`, or None for another program."""
    # Square brackets and dots around a word mean that it may be omitted or repeated.
    words = [word.strip("[]").removesuffix("...") for word in words_of(command)]
    # What follows is the shell's.
    words = list(itertools.takewhile(lambda word: word not in (">", "|"), words))
    if words[:1] == ["voxtral-dist"]:
        return words[1:]
    for number in range(len(words)):
        for length in (2, 1):
            program = " ".join(words[number : number + length])
            if program in LAUNCHED:
                return [*LAUNCHED[program], *words[number + length :]]
    return None


COMMANDS = [(page.name, line) for page in PAGES for line in block_lines(page) if line and arguments_of(line)]
IN_SENTENCES = [(page.name, command) for page in PAGES for command in inline_commands(page)]


def test_commands_are_found():
    assert len(COMMANDS) > 20
    assert len(IN_SENTENCES) > 10
    assert {"README.md", "tutorial.md", "data.md", "evaluation.md"} <= {page for page, _ in COMMANDS}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_parses(page, command, capsys):
    arguments = arguments_of(command)
    assert arguments is not None
    try:
        build_parser().parse_args(arguments)
    except SystemExit:
        pytest.fail(f"{page}: {command}: {capsys.readouterr().err}")


@pytest.mark.parametrize(("page", "command"), IN_SENTENCES)
def test_the_options_of_a_command_in_a_sentence_exist(page, command):
    arguments = arguments_of(command) or []
    parser, words = _parser_of(arguments)
    known = {option for action in parser._actions for option in action.option_strings}
    assert [word for word in words if word.startswith("--") and word not in known] == []
    if command.startswith("voxtral-dist"):
        assert parser.prog != "voxtral-dist", f"{page}: there is no command {command}"


def _parser_of(arguments: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    parser, words = build_parser(), list(arguments)
    while words and (chosen := _subcommands(parser).get(words[0])):
        parser, words = chosen, words[1:]
    return parser, words


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((dict(one.choices) for one in parser._actions if isinstance(one, argparse._SubParsersAction)), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_repository_that_a_command_names_are_there(page):
    words = [word for line in block_lines(page) for word in words_of(line)]
    named = [word for word in words if word.startswith(FOLDERS_OF_THE_REPOSITORY)]
    assert [name for name in named if not list(ROOT.glob(name))] == []


@pytest.mark.parametrize(
    ("page", "command"), [(page, line) for page, line in COMMANDS if "--config launch/recipes/" in line]
)
def test_overrides_fit_the_recipe(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = arguments_of(command)
    assert arguments is not None
    parsed = build_parser().parse_args(arguments)
    load_config(Path(parsed.config), parsed.set)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_overrides_in_sentences_are_of_existing_keys(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = re.findall(r"`(?:[^`]* )?--set ([a-z0-9_.]+=[^` ]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))
    for override in found:
        load_config(Path("launch/recipes/voxtral_mini_lora.yaml"), [override])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_make_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    assert set(_targets(page)) - known == set()


def _targets(page: Path) -> Iterator[str]:
    for line in [*block_lines(page), *inline_commands(page)]:
        words = words_of(line)
        if words[:1] == ["make"]:
            # `NAME=VALUE` sets a variable.
            yield from (word for word in words[1:] if "=" not in word)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_written_for_an_activated_environment(page):
    assert ".venv/bin/" not in page.read_text(encoding="utf-8").replace("source .venv/bin/activate", "")
