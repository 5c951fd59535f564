"""The hosts, the runs that all others are compared with, and the table of what happened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from host_table import store_row
from network import Network, NoNamespacesError
from training_runs import Reference, TrainingRun

from runs import ROOT

ROWS = ROOT / "build" / "hosts.json"


@pytest.fixture(scope="session")
def _network() -> Iterator[Network]:
    try:
        network = Network()
    except NoNamespacesError as error:
        pytest.skip(str(error))
    yield network
    network.clear()
    network.close()


@pytest.fixture
def network(_network: Network) -> Iterator[Network]:
    """Three hosts on which nothing runs."""
    yield _network
    _network.clear()


@pytest.fixture(scope="session")
def _forks(_network: Network, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The process that forks ranks has imported libraries, which is no part of any time."""
    _network.fork(0, os.getpid, folder=tmp_path_factory.mktemp("first") / "log")


@pytest.fixture
def new_run(
    network: Network, _forks: None, tmp_path: Path, tiny_model: Path, shard_folder: Path
) -> Callable[..., TrainingRun]:
    def build(**sections: object) -> TrainingRun:
        return TrainingRun(network, tmp_path, tiny_model, shard_folder, **sections)

    return build


@pytest.fixture(scope="session")
def reference(
    _network: Network, _forks: None, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, shard_folder: Path
) -> Callable[[str], Reference]:
    """The unbroken run of an engine: three ranks on one host."""
    made: dict[str, Reference] = {}

    def of(engine: str) -> Reference:
        if engine not in made:
            folder = tmp_path_factory.mktemp(engine)
            made[engine] = TrainingRun(_network, folder, tiny_model, shard_folder, engine=engine).as_reference()
        return made[engine]

    return of


@pytest.fixture
def record() -> Callable[[str, str, str, str], None]:
    """Adds a row to the table: what was done, the engine, what happened, and after which time."""

    def add(situation: str, engine: str, happened: str, seconds: str) -> None:
        store_row(ROWS, situation, engine, happened, seconds)

    return add
