"""The README's five steps run as written, with a tiny model in the place of the published one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import yaml

from voxtral_dist.model.tiny import build_tiny_voxtral

from corpora import TINY_SHAPE, write_speech_manifest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def five_steps() -> list[str]:
    """Commands of the section on a user's own audio."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own audio in five steps")[2]
    (block,) = re.findall(r"^```bash\n(.*?)^```", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    return [line for line in block.splitlines() if line and not line.startswith("source ")]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The folders that the commands name, with a recipe that two cores can run."""
    for name in ("launch", "ds_configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    build_tiny_voxtral(tmp_path / "models" / "tiny", TINY_SHAPE)
    manifest = write_speech_manifest(tmp_path, 8)
    for name in ("train", "dev"):
        shutil.copyfile(manifest, tmp_path / f"{name}.jsonl")
    first = json.loads(manifest.read_text(encoding="utf-8").splitlines()[0])
    audio, rate = soundfile.read(tmp_path / first["audio_filepath"])
    soundfile.write(tmp_path / "clip.wav", audio, rate)
    recipe = tmp_path / "launch" / "recipes" / "voxtral_mini_lora.yaml"
    run = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    run["num_steps"] = 2
    run["model"] |= {"path": "models/tiny", "precision": "float32"}
    run["optimizer"]["warmup_steps"] = 1
    run["train_data"]["num_workers"] = 0
    run["evaluation"]["max_tokens_per_second"] = 1.0
    recipe.write_text(yaml.safe_dump(run), encoding="utf-8")
    return tmp_path


def test_the_five_steps_run_as_written(clone):
    steps = five_steps()
    assert len(steps) == 7
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    for step in steps:
        ran = subprocess.run(
            ["bash", "-c", step], cwd=clone, env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, f"{step}\n{ran.stdout[-2000:]}\n{ran.stderr[-3000:]}"
    run = clone / "runs" / "voxtral-mini-lora"
    for name in ("report.html", "metrics.jsonl", "checkpoints", "evaluations", "export/config.json", "summary.json"):
        assert (run / name).exists(), name
