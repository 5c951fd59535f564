"""Signals that ask a run to stop are remembered from the start of its process on."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import voxtral_dist.train
from voxtral_dist.training.signals import StopRequest, stop_signals

from commands import run_command
from runs import ROOT, run_config, write_config

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_a_request_inside_of_the_context_only(number):
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) is before
    with stop_signals() as again:
        assert not again.requested


def test_a_context_inside_of_another_one_has_its_request():
    with stop_signals() as outer:
        os.kill(os.getpid(), signal.SIGUSR1)
        with stop_signals() as inner:
            assert inner is outer
            assert inner.requested
        os.kill(os.getpid(), signal.SIGTERM)
    assert isinstance(outer, StopRequest)


@pytest.fixture
def interrupts_of_python() -> Iterator[None]:
    """Python's own handler: a shell starts programs in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts_of_python")
def test_a_second_interrupt_in_a_notebook_does_what_it_did_before(capfd):
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert capfd.readouterr().err == (
            "Stopping: the state is saved after this step. Ctrl-C again leaves without that.\n"
        )
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_interrupt_ends_a_command_whatever_it_waits_for():
    program = (
        "import os, signal, ctypes\n"
        "from voxtral_dist.training.signals import stop_signals\n"
        "with stop_signals(ends_process=True) as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop.requested\n"
        "    print('goes on', flush=True)\n"
        "    ctypes.PyDLL(None).sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"goes on\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT


@pytest.fixture
def config(tiny_model, shard_folder, tmp_path) -> Path:
    run = run_config(tmp_path / "run", tiny_model, shard_folder, num_steps=4, engine={"fsdp2": {}})
    return write_config(run)


@pytest.mark.parametrize("when", ["before the model is loaded", "while it is loaded"])
def test_a_run_that_is_asked_early_ends_before_training(config, tmp_path, capsys, monkeypatch, when):
    build = voxtral_dist.train.build_engine

    def asked_meanwhile(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*arguments)

    with stop_signals() as stop:
        if when == "while it is loaded":
            monkeypatch.setattr(voxtral_dist.train, "build_engine", asked_meanwhile)
        else:
            stop.requested = True
        result = run_command(capsys, "train", "--config", config)
    assert result.code == 75
    assert "Stopped by a signal before training began: rerun the same command to resume." in result.out
    assert not any((tmp_path / "run").glob("checkpoints/*"))
    assert not (tmp_path / "run" / "evaluations").exists()


def test_launch_train_listens_before_it_imports(tmp_path):
    """To signals, and for the end of its launcher."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys, threading\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'voxtral_dist.cli.main':\n"
        "            assert 'launcher-watch' in [thread.name for thread in threading.enumerate()]\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    ended = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), "--config", "nowhere.yaml"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "RANK": "0", "WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2, ended
    assert "nowhere.yaml cannot be read" in ended.stderr
