"""Rows of metrics as scalars of TensorBoard, where its package is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from voxtral_dist.training.metrics_file import scalars_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def open_writer(run_dir: Path, first_step: int) -> SummaryWriter | None:
    """A writer for a run that continues after `first_step` updates; None where the package tensorboard is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # Hides the later steps of an earlier process, whose rows are dropped too.
    purge_step = first_step + 1 if first_step else 0
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)


def write_scalars(writer: SummaryWriter, kind: str, step: int, values: dict[str, Any]) -> None:
    """Write the numbers of a row of kind `train` or `evaluation`; other kinds have none."""
    scalars = scalars_of({"kind": kind, **values})
    for name, value in scalars.items():
        writer.add_scalar(name, value, step)
    if not scalars:
        return
    # So that a killed process leaves as many scalars as rows.
    writer.flush()
