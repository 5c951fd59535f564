"""Start a run: `deepspeed --num_accelerators 2 launch/train.py --config launch/recipes/demo.yaml`."""

import sys

from voxtral_dist.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
