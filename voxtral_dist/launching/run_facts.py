"""What the machines of a run must offer, by its configuration."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from voxtral_dist.config import RunConfig, deepspeed_file, deepspeed_files
from voxtral_dist.data.stored.storage.storage import is_remote
from voxtral_dist.errors import UserError
from voxtral_dist.model.folders import refuse_wrong_model

# A shared file system that is slower makes runs wait in other places too.
_BYTES_PER_SECOND = 1e9
_SECONDS_BEFORE_A_SAVE = 60
_MARGIN = 3


@dataclass(frozen=True)
class RunFacts:
    """What a run reads and writes outside of its processes.

    run_dir: as configured. shards: locations of all training and test sets. cache_dir: `storage.cache_dir`.
    cache_gigabytes: its limit, in 10^9 bytes. nvme_dir: `engine.nvme_dir`. prometheus_port: `metrics.prometheus_port`.
    """

    run_dir: PurePosixPath
    shards: tuple[str, ...]
    cache_dir: PurePosixPath | None
    cache_gigabytes: float
    nvme_dir: PurePosixPath | None
    prometheus_port: int | None

    @classmethod
    def of(cls, config: RunConfig) -> RunFacts:
        """The facts of a configuration."""
        train = [location for shards in config.train_data.named_sets.values() for location in shards]
        tests = [test_set.shards for test_set in config.evaluation.test_sets.values()]
        cache, nvme = config.storage.cache_dir, config.engine.nvme_dir
        return cls(
            run_dir=PurePosixPath(config.run_dir),
            shards=(*train, *tests),
            cache_dir=None if cache is None else PurePosixPath(cache),
            cache_gigabytes=config.storage.cache_gigabytes,
            nvme_dir=None if nvme is None else PurePosixPath(nvme),
            prometheus_port=config.metrics.prometheus_port,
        )

    @property
    def local_shards(self) -> list[str]:
        """Locations that are folders."""
        return [location for location in self.shards if not is_remote(location)]


def measured_save_seconds(run_dir: Path) -> float | None:
    """The longest save that a run has recorded in `metrics.jsonl`; None without one that can be read here."""
    longest = None
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("kind") == "checkpoint" and isinstance(row.get("seconds"), int | float):
            longest = max(longest or 0.0, float(row["seconds"]))
    return longest


def planned_save_seconds(config: RunConfig) -> float:
    """The time to write a checkpoint at 1 GB/s.

    Raises:
        UserError: the shape of the model is not known here.
    """
    refuse_wrong_model(config.model.path)
    # Imports torch and transformers.
    from voxtral_dist.estimate.estimator import meta_model_of
    from voxtral_dist.estimate.sharding import Fsdp2Sharding, Sharding, ZeroSharding
    from voxtral_dist.estimate.state_bytes import checkpoint_bytes

    # Which bytes a value has depends on the engine alone.
    sharding: Sharding = ZeroSharding(1) if config.engine.fsdp2 is None else Fsdp2Sharding()
    model = meta_model_of(config.model, config.trainable)
    return checkpoint_bytes(model, config.optimizer, sharding) / _BYTES_PER_SECOND


def save_seconds(config: RunConfig) -> tuple[float, str]:
    """The time of a save, and where it comes from: measured by an earlier part of the run, else planned."""
    measured = measured_save_seconds(config.run_dir)
    if measured is not None:
        return measured, "measured"
    return planned_save_seconds(config), "planned for 1 GB/s"


def grace_seconds(save: float, *, uploads: bool) -> int:
    """The time between a request to stop and SIGKILL, in whole minutes.

    A minute for the step that is under way, and three times a save; as much again for an upload, for which runs wait.
    """
    parts = _MARGIN * save * (2 if uploads else 1)
    return 60 * math.ceil((_SECONDS_BEFORE_A_SAVE + parts) / 60)


def own_deepspeed_file(config: RunConfig) -> Path | None:
    """DeepSpeed's file of a run if it is not one of the package, which all machines have."""
    if config.engine.deepspeed is None:
        return None
    path = deepspeed_file(config.engine.deepspeed)
    packaged = deepspeed_files().get(path.stem)
    return None if packaged is not None and path.resolve() == packaged.resolve() else path


def refuse_outside(what: str, location: str, folders: tuple[str, ...], remedy: str) -> None:
    """Refuse a path that is in none of the folders that all machines have.

    Raises:
        UserError: it is in none.
    """
    path = PurePosixPath(location)
    if ".." in path.parts or not any(path.is_relative_to(folder) for folder in folders):
        raise UserError(f"`{what}` must be below {' or '.join(folders)}, but is {location} instead: {remedy}")
