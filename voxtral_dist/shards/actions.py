"""What the command line does with shard sets: pack, index, inspect, verify, show."""

from __future__ import annotations

import io
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import soundfile
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from voxtral_dist.data.stored.checks import UnusableError
from voxtral_dist.data.stored.index import ShardIndex, read_index
from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.token_view import TokenView
from voxtral_dist.errors import UserError, first_line
from voxtral_dist.shards.indexing import index_tars
from voxtral_dist.shards.journal import count_finished_shards
from voxtral_dist.shards.lookup import find_utterance
from voxtral_dist.shards.packing import PackRules
from voxtral_dist.shards.sources import SourceOptions, open_source, tar_utterance
from voxtral_dist.shards.summary import (
    DURATION_EDGES_SECONDS,
    RATE_EDGES,
    SetSummary,
    histogram_lines,
    hours,
    summarize,
)
from voxtral_dist.shards.tars import parse_span
from voxtral_dist.shards.utterances import Utterance
from voxtral_dist.shards.verification import BrokenUtterance, verify
from voxtral_dist.shards.writing import PackOptions, pack

_SECONDS_BETWEEN_LINES = 30.0


class InterruptedPackingError(UserError):
    """The user stopped a command that can be gone on with."""

    exit_code = 130


def pack_shards(source: str, out_dir: Path, source_options: SourceOptions, options: PackOptions) -> int:
    """`shards pack`: shards of any source in a folder; prints what they hold and what was left out."""
    opened = open_source(source, source_options)
    try:
        with _progress(f"pack {out_dir.name}", opened.num_lines) as display:
            summary = pack(opened, out_dir, options, lambda at: display(at.num_lines, f"{at.num_skipped} left out"))
    except KeyboardInterrupt as error:
        finished = count_finished_shards(out_dir)
        raise InterruptedPackingError(
            f"Interrupted: {finished} shards are finished in {out_dir}. The same command goes on behind them."
        ) from error
    print("\n".join([f"{out_dir}:", *summary.lines()]))
    return 0


def index_shards(
    pattern: str, out_dir: Path | None, members: UtteranceLayout, rules: PackRules, num_workers: int
) -> int:
    """`shards index`: the index of tars that other tools made; prints what they hold and what is left out."""
    with _progress(f"index {pattern}", None) as display:
        summary = index_tars(
            pattern, out_dir, members, rules, num_workers, lambda done, total: display(done, f"of {total} shards")
        )
    print("\n".join([f"{pattern}:", *summary.lines()]))
    return 0


def inspect_shards(folders: Sequence[str]) -> int:
    """`shards inspect`: a table of sets and their languages, histograms of durations and of characters a second."""
    summaries = {folder: summarize(read_index([folder])) for folder in folders}
    # Without a terminal there is no width to keep to, and no name should be cut.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(_sets_table(summaries))
    for folder, summary in summaries.items():
        print(f"{folder}: {summary.num_utterances} utterances, {hours(summary.duration_seconds)}")
        console.print(_languages_table(summary))
        print("\n".join(_shape_lines(summary)))
    return 0


def verify_shards(folders: Sequence[str], num_workers: int, json_file: Path | None) -> int:
    """`shards verify`: every broken sample by shard, key and reason; 1 if there are any, 0 if all are well."""
    if json_file is not None:
        _check_writable(json_file)
    runs = {folder: _verify_one(folder, num_workers) for folder in folders}
    broken = {folder: found for folder, (_, found) in runs.items()}
    num_utterances = sum(count for count, _ in runs.values())
    everything = [found for of_folder in broken.values() for found in of_folder]
    print(f"{num_utterances} samples were read and decoded, {len(everything)} are broken{_by_cause(everything)}")
    if json_file is not None:
        _write_report(json_file, num_utterances, broken)
    return 1 if everything else 0


def _verify_one(folder: str, num_workers: int) -> tuple[int, list[BrokenUtterance]]:
    """The number of samples of a set, and the broken ones, each printed when it is found."""
    num_utterances = len(read_index([folder]))
    broken: list[BrokenUtterance] = []
    with _progress(f"verify {folder}", num_utterances) as display:
        for run in verify(folder, num_workers):
            for found in run.broken:
                print(f"{folder}: {found.shard}: {found.key}: {found.cause}: {found.reason}", flush=True)
            broken += run.broken
            display(run.last_id + 1, f"{len(broken)} broken")
    return num_utterances, broken


def show_utterance(folder: str, key: str, out: Path | None, viewer: TokenView | None = None) -> int:
    """`shards show`: what is stored of one sample; with `out` its clip is written, with a viewer its tokens follow."""
    storage = Storage()
    index = read_index([folder], storage)
    utterance_id = find_utterance(index, key, storage)
    span = index.span(utterance_id)
    try:
        sample = parse_span(storage.read(span))
        utterance = tar_utterance(sample, span.location, index.layout(utterance_id))
    except (UnusableError, OSError) as error:
        raise UserError(f"The sample {key} at byte {span.offset} of {span.location} {first_line(error)}.") from error
    tokens = ["", *viewer.lines(index, utterance_id, storage)] if viewer is not None else []
    written = _write_clip(utterance, out) if out is not None else None
    print("\n".join(_sample_lines(index, utterance_id, sample.key, utterance)))
    if written is not None:
        print(f"clip       {written}")
    if tokens:
        print("\n".join(tokens))
    return 0


def _sample_lines(index: ShardIndex, utterance_id: int, key: str, utterance: Utterance) -> Iterator[str]:
    span = index.span(utterance_id)
    yield f"key        {key}"
    yield f"number     #{utterance_id}"
    if utterance.instruction is not None:
        yield f"instruction {utterance.instruction}"
    yield f"text       {utterance.text}"
    yield f"language   {utterance.language or 'unknown'}"
    yield f"duration   {int(index.record(utterance_id)['duration_ms']) / 1000:.3f} s"
    yield f"shard      {span.location}"
    yield f"bytes      {span.num_bytes} at {span.offset}"
    for name, value in utterance.extra.items():
        yield f"{name:<10} {value}"


def _write_clip(utterance: Utterance, out: Path) -> Path:
    stored = Path(utterance.clip.location).suffix.lower()
    contents = utterance.clip.contents or b""
    target = out / f"{utterance.key}{stored}" if out.is_dir() else out
    if target.suffix.lower() not in (stored, ".wav"):
        raise UserError(f"`--out` must end in {stored}, as the clip is stored, or in .wav, but is {out} instead.")
    try:
        if target.suffix.lower() == stored:
            target.write_bytes(contents)
        else:
            samples, rate = soundfile.read(io.BytesIO(contents), dtype="int16")
            soundfile.write(target, samples, rate, format="WAV", subtype="PCM_16")
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"The clip cannot be written to {target}: {first_line(error)}.") from error
    return target


def _sets_table(summaries: dict[str, SetSummary]) -> Table:
    table = Table(Column("set", overflow="fold"), box=SIMPLE_HEAD)
    for name in ("shards", "utterances", "hours", "MB", "text tokens", "longest", "shortest"):
        table.add_column(name, justify="right", no_wrap=True)
    for folder, of in summaries.items():
        sizes = (of.num_shards, of.num_utterances, f"{of.duration_seconds / 3600:.2f}", f"{of.num_bytes / 1e6:.1f}")
        ends = (f"{of.longest[1]:.2f} s (#{of.longest[0]})", f"{of.shortest[1]:.2f} s (#{of.shortest[0]})")
        table.add_row(folder, *map(str, (*sizes, of.num_text_tokens, *ends)))
    return table


def _languages_table(summary: SetSummary) -> Table:
    table = Table("language", box=SIMPLE_HEAD)
    for name in ("utterances", "hours", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, of in summary.by_size():
        share = of.duration_seconds / summary.duration_seconds if summary.duration_seconds else 0.0
        table.add_row(name, str(of.num_utterances), f"{of.duration_seconds / 3600:.2f}", f"{100 * share:.1f} %")
    return table


def _shape_lines(summary: SetSummary) -> Iterator[str]:
    yield "duration in seconds:"
    yield from histogram_lines(DURATION_EDGES_SECONDS, summary.duration_counts)
    yield "characters a second:"
    yield from histogram_lines(RATE_EDGES, summary.rate_counts)


def _by_cause(broken: Sequence[BrokenUtterance]) -> str:
    counts = Counter(str(found.cause) for found in broken).most_common()
    return f": {', '.join(f'{count} {cause}' for cause, count in counts)}" if counts else ""


def _write_report(path: Path, num_utterances: int, broken: dict[str, list[BrokenUtterance]]) -> None:
    rows = [{"folder": folder} | asdict(found) for folder, of_folder in broken.items() for found in of_folder]
    causes = Counter(str(row["cause"]) for row in rows)
    report = {"num_utterances": num_utterances, "num_broken": len(rows), "causes": dict(causes), "broken": rows}
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")


def _check_writable(path: Path) -> None:
    """Refuse before hours of reading what would fail after them."""
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"The report {path} cannot be written: {error.strerror}.") from error


class _Display(Protocol):
    """Takes how many are done, and a note."""

    def __call__(self, num_done: int, note: str) -> None: ...


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[_Display]:
    """A bar on a terminal, elsewhere a line now and then; both on the error stream."""
    if not sys.stderr.isatty():
        yield _Lines(what, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, note="")
        yield lambda num_done, note: bar.update(task, completed=num_done, note=note)


@dataclass
class _Lines:
    """Says now and then how far a command is."""

    what: str
    total: int | None
    printed_at: float = 0.0

    def __post_init__(self) -> None:
        self.printed_at = time.monotonic()

    def __call__(self, num_done: int, note: str) -> None:
        if time.monotonic() - self.printed_at >= _SECONDS_BETWEEN_LINES:
            self.printed_at = time.monotonic()
            of_total = f" of {self.total}" if self.total is not None else ""
            print(f"{self.what}: {num_done}{of_total} {note}".rstrip(), file=sys.stderr, flush=True)
