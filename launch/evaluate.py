"""Evaluate a model on several GPUs: `deepspeed launch/evaluate.py RUN/export SHARDS...`."""

import sys

from voxtral_dist.cli.main import console

if __name__ == "__main__":
    console(["evaluate", *sys.argv[1:]])
