"""Voxtral: its prompts and features, its modules and weights, and what is trained of it.

- `prompts`: prompts and completions as token ids;
- `features`: log-mel features;
- `voxtral`: the modules on the meta device, and the loss of targets;
- `attention`, `blocks`: attention kernels, and what is wrapped around transformer blocks;
- `encoder`: the encoder in chunks of windows;
- `trainable`, `adapters`: the choice of trained parameters, and the export of adapters;
- `weights`: initial weights from checkpoints;
- `flops`: floating point operations of training;
- `tiny`: small models for tests and demos.

Nothing here uses process groups.
"""

from voxtral_dist.model.missing_kernels import ignore_missing_kernels

ignore_missing_kernels()
