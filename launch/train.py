"""Train on several GPUs: `deepspeed --num_accelerators 2 launch/train.py --config launch/recipes/demo.yaml`."""

import sys

from voxtral_dist.distributed.launchers import watch_launcher
from voxtral_dist.training.signals import stop_signals

if __name__ == "__main__":
    # Before imports that take seconds: neither a signal to stop nor the end of the launcher must be lost.
    with stop_signals(ends_process=True):
        watch_launcher()
        from voxtral_dist.cli.main import console

        console(["train", *sys.argv[1:]])
