"""Check all hosts of a run: `docker/entrypoint doctor --config FILE` on each of them, as for training."""

import sys

from voxtral_dist.cli.main import console

if __name__ == "__main__":
    console(["doctor", "--distributed", *sys.argv[1:]])
