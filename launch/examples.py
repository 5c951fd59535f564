#!/usr/bin/env python3
"""Write the examples of launch/kubernetes and launch/slurm: the output of `voxtral-dist launch`."""

import contextlib
import io
import sys
from pathlib import Path

from voxtral_dist.cli.main import main

HERE = Path(__file__).resolve().parent
# Full fine-tuning of Voxtral Mini on 2 nodes of 8 GPUs, whose checkpoint of 56 GB takes about a minute.
_RUN = "--config voxtral_mini_full --nodes 2 --gpus 8 --save-seconds 65"
_POD = f"{_RUN} --image voxtral-dist:0.1.0 --config-map voxtral-config"
_BATCH = f"{_RUN} --time 24:00:00"
_MOUNTS = "--mounts /lustre/data:/data /lustre/runs:/runs /lustre/hub:/hub"
EXAMPLES = {
    "kubernetes/indexed-job.yaml": f"kubernetes --kind indexed-job {_POD}",
    "kubernetes/jobset.yaml": f"kubernetes --kind jobset {_POD}",
    "kubernetes/pytorchjob.yaml": f"kubernetes --kind pytorchjob {_POD}",
    "kubernetes/storage.yaml": "claims --data-size 2Ti --runs-size 1Ti",
    "kubernetes/trainjob.yaml": f"kubernetes --kind trainjob {_POD}",
    "slurm/apptainer.sbatch": f"slurm {_BATCH} --container apptainer --image voxtral-dist.sif {_MOUNTS}",
    "slurm/enroot.sbatch": f"slurm {_BATCH} --container enroot --image voxtral-dist {_MOUNTS}",
    "slurm/pyxis.sbatch": f"slurm {_BATCH} --container pyxis --image voxtral-dist.sqsh {_MOUNTS}",
    "slurm/venv.sbatch": f"slurm {_BATCH} --venv .venv",
}


def rendered(command: str) -> str:
    """What `voxtral-dist launch` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(["launch", *command.split()])
    return out.getvalue()


if __name__ == "__main__":
    for name, command in EXAMPLES.items():
        (HERE / name).parent.mkdir(exist_ok=True)
        (HERE / name).write_text(rendered(command), encoding="utf-8")
        print(f"launch/{name}", file=sys.stderr)
