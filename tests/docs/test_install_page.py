"""The commands of docs/install.md run where only the wheel is installed, outside of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from corpora import write_speech_manifest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def commands() -> list[str]:
    """Commands of the section on a first run, without those that install."""
    section = (ROOT / "docs" / "install.md").read_text(encoding="utf-8").partition("## A first run without a clone")[2]
    (block,) = re.findall(r"^```bash\n(.*?)^```", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    return [line for line in block.replace("\\\n", " ").splitlines() if line]


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell in which the wheel is unpacked, and the other packages are those of the tests."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (points,) = site.glob("*.dist-info/entry_points.txt")
    assert "voxtral-dist = voxtral_dist.cli.main:console" in points.read_text()
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(site),
        "HF_HUB_OFFLINE": "1",
    }


def test_the_first_run_without_a_clone_runs_as_written(installed: Mapping[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    manifest = write_speech_manifest(folder, 12)
    for name in ("train", "test"):
        shutil.copyfile(manifest, folder / f"{name}.jsonl")

    def run(command: str) -> str:
        # No variables of the tests: the page has to name those that are needed.
        kept = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "OMP_NUM_THREADS")}
        ran = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=kept | installed, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout[-2000:]}\n{ran.stderr[-3000:]}"
        return ran.stdout

    assert run("python -c 'import voxtral_dist; print(voxtral_dist.__file__)'").startswith(str(tmp_path / "site"))
    said = [run(command) for command in commands()]
    assert "digits" in said[0]
    assert ": it fits" in "".join(said)
    summary = json.loads((folder / "runs" / "digits" / "summary.json").read_text())
    assert summary["num_utterances"] > 0
    for name in ("report.html", "export/config.json", "export-mistral/consolidated.safetensors"):
        assert (folder / "runs" / "digits" / name).exists(), name
