"""Examples of docs/python.md: they run from top to bottom, and the API page describes each public name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import yaml

import voxtral_dist
from voxtral_dist.model.tiny import build_tiny_voxtral

from corpora import TINY_SHAPE, pack_manifest, write_speech_manifest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "python.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the page says that its examples need."""
    build_tiny_voxtral(tmp_path / "models" / "tiny", TINY_SHAPE)
    pack_manifest(write_speech_manifest(tmp_path, 8), tmp_path / "shards" / "train", 2**20, skip_bad=False)
    audio, rate = soundfile.read(next(tmp_path.glob("audio/*")))
    for name in ("one", "two"):
        soundfile.write(tmp_path / "audio" / f"{name}.wav", audio, rate)
    run = {
        "run_dir": "runs/first",
        "num_steps": 2,
        "model": {"path": "models/tiny", "precision": "float32"},
        "train_data": {"shards": ["shards/train"], "slots_per_step": 1, "max_examples": 4, "num_workers": 0},
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 0},
        "engine": {"deepspeed": str(ROOT / "ds_configs" / "zero1.json")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    return tmp_path


def without_ranks(environment):
    """An environment without what a launcher, or a test before, says of ranks."""
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in environment.items() if name not in names}


def test_the_examples_run_from_top_to_bottom(folder):
    assert len(BLOCKS) > 8
    checks = "\nassert str(total.rate) == '0.0' and errors.errors == 0 and trainer.state.global_step == 1\n"
    script = folder / "page.py"
    script.write_text("\n".join(BLOCKS) + checks, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=without_ranks(os.environ) | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "substitutions=1" in ran.stdout


def test_the_api_page_describes_every_public_name_once():
    named = re.findall(
        r"^::: voxtral_dist\.(\w+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(named) == sorted(voxtral_dist.__all__)
