"""Train on several GPUs: `deepspeed --num_accelerators 2 launch/train.py --config launch/recipes/demo.yaml`."""

import sys

from voxtral_dist.cli.main import console

if __name__ == "__main__":
    console(["train", *sys.argv[1:]])
