"""Each rank's output is in a file of its own; of ranks other than the first, the terminal shows errors only."""

import logging
import os
from pathlib import Path
from typing import NoReturn

import pytest

from voxtral_dist.output.console import say, set_up_logging
from voxtral_dist.output.rank_log import open_rank_log, rank_log_closed
from voxtral_dist.progress import ProgressDisplay

from ranks import Ended, run_programs


def _program(rank: int, folder: str, ends_with_error: bool) -> NoReturn:
    set_up_logging()
    say("before")
    try:
        with rank_log_closed():
            open_rank_log(Path(folder), rank, 2)
            say(f"said by {rank}")
            os.write(1, b"printed in C\n")
            logging.getLogger("voxtral_dist.data").warning("one utterance is bad")
            logging.getLogger("transformers").warning("a library warns")
            ProgressDisplay("step", 3).say("step 2: saved")
            if ends_with_error:
                raise ValueError
    except ValueError:
        say("Traceback", to_errors=True)
    say("after")
    os._exit(0)


def log(folder: Path, rank: int) -> str:
    text = (folder / f"rank-{rank:05d}.txt").read_text()
    header, _, rest = text.lstrip().partition("\n")
    assert header.startswith(f"--- rank {rank} of 2 on ")
    return rest


def test_ranks_have_files_and_the_terminal_shows_the_first_one_and_errors(tmp_path):
    first, second = run_programs(2, _program, str(tmp_path), False, limit_seconds=30)
    assert first == Ended(
        0,
        "before\nsaid by 0\nprinted in C\none utterance is bad\n[transformers] a library warns\nstep 2: saved\nafter\n",
    )
    assert second == Ended(0, "before\n[rank 1] one utterance is bad\nafter\n")
    assert log(tmp_path, 0) == "said by 0\none utterance is bad\nstep 2: saved\n"
    assert (
        log(tmp_path, 1)
        == "said by 1\nprinted in C\none utterance is bad\n[transformers] a library warns\nstep 2: saved\n"
    )


def test_after_an_error_the_file_has_the_end_too(tmp_path):
    _, second = run_programs(2, _program, str(tmp_path), True, limit_seconds=30)
    assert second.output == "before\n[rank 1] one utterance is bad\n[rank 1] Traceback\n"
    assert log(tmp_path, 1).endswith("Traceback\nafter\n")


def test_a_process_without_others_has_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with rank_log_closed():
        open_rank_log(tmp_path, 0, 1)
        say("here")
    assert capsys.readouterr().out == "here\n"
    assert not list(tmp_path.iterdir())
