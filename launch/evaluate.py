"""Measure a model: `deepspeed launch/evaluate.py RUN/export SHARDS...`."""

import sys

from voxtral_dist.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
