"""The actions of `voxtral-dist shards`, which print what they do and find."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.data.stored.storage import Storage, is_remote, join
from voxtral_dist.errors import UserError
from voxtral_dist.output.console import one_line, say
from voxtral_dist.output.counting import counted
from voxtral_dist.output.masking import masked
from voxtral_dist.progress import progress_of_command
from voxtral_dist.shards.content_tables import print_contents
from voxtral_dist.shards.contents import SetContents, read_contents
from voxtral_dist.shards.corpus.corpus import Corpus, open_corpus
from voxtral_dist.shards.corpus.held_out import HeldOut, divide
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.parts import count_lines, part_of
from voxtral_dist.shards.dividing import pack_parts
from voxtral_dist.shards.indexing import index_tars
from voxtral_dist.shards.inspection import print_summaries
from voxtral_dist.shards.journal import count_finished_shards
from voxtral_dist.shards.lookup import find_utterance, read_utterance, utterance_lines, write_audio
from voxtral_dist.shards.merging import merge
from voxtral_dist.shards.packing import PackOptions, pack
from voxtral_dist.shards.removal import remove_set
from voxtral_dist.shards.summary import UNKNOWN, SetSummary, summarize
from voxtral_dist.shards.verification import BrokenUtterance, verify

if TYPE_CHECKING:
    from voxtral_dist.data.token_view import TokenView


log = logging.getLogger(__name__)


class InterruptedPackingError(UserError):
    """The user interrupted a packing that the same command resumes."""

    exit_code = 130


def pack_shards(
    source: str,
    out: Path | str,
    corpus_options: CorpusOptions,
    options: PackOptions,
    held_out: HeldOut | None = None,
    overwrite: bool = False,
) -> int:
    """`shards pack`: write a corpus as shards into a folder or to a URL; print what they hold and what was skipped.

    What is held out goes into `dev` of the folder, the rest into `train`.
    """
    part = options.part
    if isinstance(out, str) and overwrite:
        raise UserError(
            "`--overwrite` removes sets in folders only: remove that at the URL yourself, or choose another."
        )
    if isinstance(out, str) and held_out is not None and part is None:
        raise UserError("`--dev` writes to a URL in parts only: pass `--part 1/1` too, and `shards merge` then.")
    corpus = open_corpus(source, corpus_options)
    num_lines = count_lines(corpus) if part is not None else 0
    if held_out is None:
        _pack_part(corpus if part is None else part_of(corpus, part, num_lines), out, options, overwrite)
        return 0
    division = divide(corpus, held_out)
    say(division.sentence)
    if part is not None:
        for name, side in (("train", division.train), ("dev", division.dev)):
            folder = join(out, name) if isinstance(out, str) else out / name
            _pack_part(part_of(side, part, num_lines), folder, options, overwrite)
        return 0
    assert isinstance(out, Path)
    pack_parts(division, out, options, overwrite, lambda side, folder: _pack_part(side, folder, options, overwrite))
    return 0


def _pack_part(corpus: Corpus, out: Path | str, options: PackOptions, overwrite: bool) -> None:
    if overwrite and isinstance(out, Path):
        remove_set(out, corpus.identity.get("tars", ()), options.part)
    part = "" if options.part is None else f" part {options.part}"
    try:
        with progress_of_command(f"pack {masked(str(out))}{part}", corpus.num_lines) as display:
            summary = pack(corpus, out, options, lambda at: display.show(at.num_lines, f"{at.num_skipped} skipped"))
    except KeyboardInterrupt as error:
        finished = (
            f"{counted(count_finished_shards(out, options.part), 'finished shard')} in {out}"
            if isinstance(out, Path)
            else f"the shards finished so far are in {masked(out)}"
        )
        raise InterruptedPackingError(f"Interrupted: {finished}. Rerun the same command to resume.") from error
    say("\n".join(map(one_line, [f"{masked(str(out))}{part}:", *summary.lines()])))
    _warn_of_unknown_languages(summary)


def merge_shards(out: Path | str) -> int:
    """`shards merge`: make one set of the parts in a folder; print what it holds and what was skipped."""
    for folder, summary in merge(out).items():
        say("\n".join(map(one_line, [f"{folder}:", *summary.lines()])))
        _warn_of_unknown_languages(summary)
    return 0


def index_shards(
    pattern: str, out_dir: Path | None, layout: UtteranceLayout, max_chars_per_second: float, num_workers: int
) -> int:
    """`shards index`: write the index of tars made by other tools; print what they hold and what was skipped."""
    with progress_of_command(f"index {pattern}: shard", None) as display:
        summary = index_tars(
            pattern,
            out_dir,
            layout,
            max_chars_per_second,
            num_workers,
            lambda done, total: display.show(done, total=total),
        )
    say("\n".join(map(one_line, [f"{pattern}:", *summary.lines()])))
    _warn_of_unknown_languages(summary)
    return 0


def _warn_of_unknown_languages(summary: SetSummary) -> None:
    unknown = summary.languages.get(UNKNOWN)
    if unknown is not None:
        log.warning(
            "%d of %d utterances have no language, so their prompts name none: if it is known, pack them again with "
            "`--language`, or name where it is by `--language-field`.",
            unknown.num_utterances,
            summary.num_utterances,
        )


def inspect_shards(folders: Sequence[str], num_workers: int, reads_contents: bool | None) -> int:
    """`shards inspect`: print what indexes tell, then statistics of texts and audio, and duplicates.

    Args:
        folders: shard sets.
        num_workers: processes that read texts and audio.
        reads_contents: whether to read them; None reads those of local sets.
    """
    indexes = {folder: read_index([folder]) for folder in folders}
    print_summaries({folder: summarize(index) for folder, index in indexes.items()})
    chosen = [folder for folder in folders if reads_contents or (reads_contents is None and not is_remote(folder))]
    if reads_contents is None and len(chosen) < len(folders):
        say("Texts and audio of remote sets are not read without `--contents`.")
    contents: dict[str, SetContents] = {}
    for folder in chosen:
        with progress_of_command(f"inspect {folder}", len(indexes[folder])) as display:
            contents[folder] = read_contents(folder, num_workers, display.show)
    print_contents(contents)
    return 0


def verify_shards(folders: Sequence[str], num_workers: int, json_file: Path | None) -> int:
    """`shards verify`: print every broken utterance by shard, key and reason. 1 if there are any, else 0."""
    if json_file is not None:
        _refuse_unwritable(json_file)
    runs = {folder: _verify_one(folder, num_workers) for folder in folders}
    broken = {folder: found for folder, (_, found) in runs.items()}
    num_utterances = sum(count for count, _ in runs.values())
    everything = [found for of_folder in broken.values() for found in of_folder]
    say(f"{counted(num_utterances, 'utterance')} read and decoded, {len(everything)} broken{_by_cause(everything)}")
    if json_file is not None:
        _write_broken(json_file, num_utterances, broken)
    return 1 if everything else 0


def show_utterance(folder: str, key: str, out: Path | None, view: TokenView | None = None) -> int:
    """`shards show`: print what is stored of one utterance and, by `view`, its tokens; write its audio to `out`."""
    storage = Storage()
    index = read_index([folder], storage)
    utterance_id = find_utterance(index, key, storage)
    stored_key, utterance = read_utterance(index, utterance_id, storage)
    tokens = ["", *view.lines(index, utterance_id, storage)] if view is not None else []
    written = [f"audio      {write_audio(utterance, out)}"] if out is not None else []
    lines = [*utterance_lines(index, utterance_id, stored_key, utterance), *written, *tokens]
    say("\n".join(map(one_line, lines)))
    return 0


def _verify_one(folder: str, num_workers: int) -> tuple[int, list[BrokenUtterance]]:
    """The number of utterances of a set, and the broken ones, each printed when it is found."""
    num_utterances = len(read_index([folder]))
    broken: list[BrokenUtterance] = []
    with progress_of_command(f"verify {folder}", num_utterances) as display:
        for run in verify(folder, num_workers):
            for found in run.broken:
                say(one_line(f"{folder}: {found.shard}: {found.key}: {found.cause}: {found.reason}"))
            broken += run.broken
            display.show(run.last_id + 1, f"{len(broken)} broken")
    return num_utterances, broken


def _by_cause(broken: Sequence[BrokenUtterance]) -> str:
    counts = Counter(str(found.cause) for found in broken).most_common()
    return f": {', '.join(f'{count} {cause}' for cause, count in counts)}" if counts else ""


def _write_broken(path: Path, num_utterances: int, broken: dict[str, list[BrokenUtterance]]) -> None:
    rows = [{"folder": folder} | asdict(found) for folder, of_folder in broken.items() for found in of_folder]
    causes = Counter(str(row["cause"]) for row in rows)
    contents = {"num_utterances": num_utterances, "num_broken": len(rows), "causes": dict(causes), "broken": rows}
    path.write_text(json.dumps(contents, indent=1, ensure_ascii=False), encoding="utf-8")


def _refuse_unwritable(path: Path) -> None:
    """Fail before hours of reading, not after them."""
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"The file {path} cannot be written: {error.strerror}.") from error
