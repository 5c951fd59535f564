"""What `--help` and shells' completion say of every command."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from voxtral_dist.cli import completion
from voxtral_dist.cli.main import build_parser


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of all its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


def commands_of(text: str) -> list[list[str]]:
    """Arguments of `voxtral-dist` in the examples at the end of a help."""
    examples = text[text.rindex("\nexample") :].splitlines()[2:]
    words = [shlex.split(line) for line in examples]
    starts = [line[line.index("voxtral-dist") + 1 :] for line in words]
    return [line[: line.index(">")] if ">" in line else line for line in starts]


def test_every_help_ends_with_examples_that_parse_and_are_of_that_command():
    program = build_parser()
    every = list(parsers(program))
    assert len(every) > 25
    for parser in every:
        found = commands_of(parser.format_help())
        assert found, parser.prog
        for arguments in found:
            assert ["voxtral-dist", *arguments][: len(parser.prog.split())] == parser.prog.split()
            assert callable(program.parse_args(arguments).run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--set", "a=1", "b=2"], None),
        (["tiny", "--set", "a=1", "out"], None),
        (["tiny", "out", "--set", "a=1", "b=2"], "b=2 (each KEY=VALUE follows a --set of its own)"),
        (["plan", "--gpus", "two"], "argument --gpus: must be a positive whole number, but is 'two' instead"),
        (["plan", "--mfu", "x"], "argument --mfu: must be a positive number below 1e9, but is 'x' instead"),
        (["shards", "pack", "a", "b", "--dev", "5 %x"], "must be a share below one half, such as 5%, but is '5 %x'"),
        (["transcribe", "m", "a", "--max-segment-seconds", "x"], "must be at least 1 second, but is 'x' instead"),
        (["report", "run", "--num-clips", "-1"], "must be a whole number that is not negative, but is '-1' instead"),
    ],
)
def test_arguments_are_taken_or_explained(capsys, arguments, message):
    if message is None:
        assert build_parser().parse_args(arguments).set == [one for one in arguments if "=" in one]
        return
    with pytest.raises(SystemExit):
        build_parser().parse_args(arguments)
    assert message in capsys.readouterr().err


def test_bash_completes_commands_options_and_choices(run, tmp_path):
    script = run("completion", "bash")
    assert (script.code, script.err) == (0, "")
    (tmp_path / "completion").write_text(script.out)
    ask = (
        "source completion; complete -p voxtral-dist >/dev/null || exit 1; function=$(complete -p voxtral-dist | "
        'sed -E "s/.*-F ([^ ]+).*/\\1/"); COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); '
        '"$function" voxtral-dist "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )

    def completed(words: str) -> list[str]:
        command = ask.format(words=words)
        ended = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env=os.environ,
        )
        return ended.stdout.split()

    assert completed("voxtral-dist tr") == ["train", "transcribe"]
    assert completed("voxtral-dist shards ver") == ["verify"]
    assert "--print-config" in completed("voxtral-dist train --pr")
    assert completed("voxtral-dist export run out --layout mis") == ["mistral"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_of_other_shells_name_every_command(run, shell, tmp_path):
    script = run("completion", shell).out
    assert all(name in script for name in ("train", "evaluate", "print-config", "vllm-lora"))
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", tmp_path / "script"], timeout=60, check=True)


def test_completion_without_its_package_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(completion, "find_spec", lambda name: None)
    assert "pip install 'voxtral-dist[completion]'" in run("completion", "bash").refusal()
