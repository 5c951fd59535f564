"""The grammar of `voxtral-dist shards`."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from voxtral_dist.cli.arguments import Commands, positive, positive_number
from voxtral_dist.errors import UserError

if TYPE_CHECKING:
    from voxtral_dist.data.stored.layout import UtteranceLayout
    from voxtral_dist.shards.packing import PackRules
    from voxtral_dist.shards.sources import Instruction

# Kept here and not where they are used, because that costs a second of imports. Tests compare them.
FORMATS = ("jsonl", "csv", "tsv", "folder", "huggingface", "webdataset")
MAX_CHARS_PER_SECOND = 40.0
_DEFAULT_SHARD_MEGABYTES = 512


def add_shards(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command and its actions."""
    shards = commands.add_parser("shards", help="make, index and check WebDataset shards")
    actions = shards.add_subparsers(required=True, metavar="ACTION")
    _add_pack(actions)
    _add_index(actions)
    _add_inspect(actions)
    _add_verify(actions)
    _add_show(actions)


def _add_pack(actions: Commands[argparse.ArgumentParser]) -> None:
    pack = actions.add_parser("pack", help="pack a corpus into tars with an index")
    pack.add_argument(
        "source",
        help="JSON lines of NeMo or Lhotse, a CSV or TSV, a folder of audio with texts, a Hugging Face dataset "
        "(a folder or hf:NAME), or other tars (a folder, glob, brace range or URL)",
    )
    pack.add_argument("out", type=Path, help="folder to make; an interrupted packing goes on in it")
    pack.add_argument("--format", choices=FORMATS, help="of the source; without it a good guess is made")
    pack.add_argument("--encode", choices=["flac"], help="as 16 kHz mono; without it audio is copied as it is")
    pack.add_argument("--name", help="of the shards, NAME-000000.tar; without it that of the folder")
    pack.add_argument("--shard-megabytes", type=positive, default=_DEFAULT_SHARD_MEGABYTES)
    pack.add_argument("--skip-bad", action="store_true", help="leave out unusable samples, and name them")
    pack.add_argument("--audio-field", metavar="NAME", help="column with the audio")
    pack.add_argument("--text-field", metavar="NAME", help="column with the text")
    pack.add_argument("--split", help="of a Hugging Face dataset")
    pack.add_argument("--config", metavar="NAME", help="of a Hugging Face dataset")
    _add_rules(pack)
    _add_members(pack)
    pack.set_defaults(run=_pack)


def _add_index(actions: Commands[argparse.ArgumentParser]) -> None:
    index = actions.add_parser("index", help="make the index of tars that other tools made")
    index.add_argument("pattern", help="folder, glob, brace range or URL of tars")
    index.add_argument("out", type=Path, nargs="?", help="folder for the index, where it cannot lie beside the tars")
    _add_rules(index)
    _add_members(index)
    index.set_defaults(run=_index)


def _add_inspect(actions: Commands[argparse.ArgumentParser]) -> None:
    inspect = actions.add_parser("inspect", help="say what shard sets hold")
    inspect.add_argument("folders", nargs="+", help="shard sets with an index")
    inspect.set_defaults(run=_inspect)


def _add_verify(actions: Commands[argparse.ArgumentParser]) -> None:
    verify = actions.add_parser("verify", help="read and decode everything, and name what is broken")
    verify.add_argument("folders", nargs="+", help="shard sets with an index")
    verify.add_argument("--json", type=Path, metavar="FILE", help="where to write what was found")
    _add_workers(verify)
    verify.set_defaults(run=_verify)


def _add_show(actions: Commands[argparse.ArgumentParser]) -> None:
    show = actions.add_parser("show", help="show one sample, and write its clip")
    show.add_argument("folder", help="shard set with an index")
    show.add_argument("key", help="of the sample, or #NUMBER")
    show.add_argument("--out", type=Path, metavar="FILE", help="where to write the clip: as stored, or .wav")
    show.add_argument("--tokens", action="store_true", help="print prompt and completion token by token")
    show.add_argument("--model", metavar="PATH", help="whose tokenizer --tokens takes: a folder or hub name")
    show.add_argument("--config", type=Path, metavar="FILE", help="or the run whose model and prompts it takes")
    show.add_argument("--pass", type=int, default=0, dest="epoch_index", metavar="N", help="of the run (default: 0)")
    show.set_defaults(run=_show)


def _add_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-chars-per-second",
        type=positive_number,
        default=MAX_CHARS_PER_SECOND,
        metavar="NUMBER",
        help="longer texts cannot belong to their audio (default: %(default)g)",
    )
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=positive, default=_num_cores(), metavar="N", help="processes (default: cores)"
    )


def _add_members(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--language", help="ISO 639-1 code of samples that name none; of all, for `index`")
    parser.add_argument("--language-field", metavar="NAME", help="column, or key in the json, with the language")
    parser.add_argument("--instruction", metavar="TEXT", help="that all texts answer; without it they are transcripts")
    parser.add_argument("--instruction-field", metavar="NAME", help="column, or key in the json, with the instruction")
    parser.add_argument(
        "--text-member", default="json:text", metavar="MEMBER[:KEY]", help="of tars: json:text (default), txt, cls"
    )
    parser.add_argument("--audio-member", metavar="SUFFIX", help="of tars whose samples have several audio members")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pack(parsed: argparse.Namespace) -> int:
    from voxtral_dist.shards.commands import pack_shards
    from voxtral_dist.shards.sources import SourceOptions
    from voxtral_dist.shards.utterances import FieldNames
    from voxtral_dist.shards.writing import PackOptions

    source_options = SourceOptions(
        source_format=parsed.format,
        language=parsed.language,
        names=FieldNames.chosen(parsed.audio_field, parsed.text_field, parsed.language_field),
        members=_members(parsed),
        split=parsed.split,
        config=parsed.config,
        instruction=_instruction(parsed),
    )
    options = PackOptions(
        shard_bytes=parsed.shard_megabytes * 10**6,
        skip_bad=parsed.skip_bad,
        rules=_rules(parsed, parsed.encode),
        num_workers=parsed.workers,
        name=parsed.name,
    )
    return pack_shards(parsed.source, parsed.out, source_options, options)


def _index(parsed: argparse.Namespace) -> int:
    from voxtral_dist.data.stored.layout import Field
    from voxtral_dist.shards.commands import index_shards
    from voxtral_dist.shards.sources import default_language

    if parsed.language is not None and parsed.language_field is not None:
        raise UserError("`--language` and `--language-field` exclude each other: a set has one or the other.")
    members = _members(parsed, default_language(parsed.language))
    if (instruction := _instruction(parsed)) is not None:
        place = Field("json", instruction.column) if instruction.column else instruction.text
        members = replace(members, instruction=place)
    return index_shards(parsed.pattern, parsed.out, members, _rules(parsed), parsed.workers)


def _inspect(parsed: argparse.Namespace) -> int:
    from voxtral_dist.shards.commands import inspect_shards

    return inspect_shards(parsed.folders)


def _verify(parsed: argparse.Namespace) -> int:
    from voxtral_dist.shards.commands import verify_shards

    return verify_shards(parsed.folders, parsed.workers, parsed.json)


def _show(parsed: argparse.Namespace) -> int:
    from voxtral_dist.data.token_view import TokenView
    from voxtral_dist.shards.commands import show_utterance

    if not parsed.tokens and (parsed.model or parsed.config):
        raise UserError("`--model` and `--config` say how --tokens splits a sample: add `--tokens`, or leave them out.")
    viewer = TokenView.of(parsed.model, parsed.config, parsed.epoch_index) if parsed.tokens else None
    return show_utterance(parsed.folder, parsed.key, parsed.out, viewer)


def _rules(parsed: argparse.Namespace, encode: str | None = None) -> PackRules:
    from voxtral_dist.shards.packing import PackRules

    return PackRules("flac" if encode == "flac" else None, parsed.max_chars_per_second)


def _instruction(parsed: argparse.Namespace) -> Instruction | None:
    from voxtral_dist.shards.sources import Instruction

    if parsed.instruction is not None and parsed.instruction_field is not None:
        raise UserError("`--instruction` and `--instruction-field` exclude each other: a set has one or the other.")
    if parsed.instruction is not None and not parsed.instruction.strip():
        raise UserError("`--instruction` is blank: say what the texts answer, or leave it out for transcripts.")
    if parsed.instruction is None and parsed.instruction_field is None:
        return None
    return Instruction(parsed.instruction, parsed.instruction_field)


def _members(parsed: argparse.Namespace, language: str | None = None) -> UtteranceLayout:
    from voxtral_dist.data.stored.layout import Field, UtteranceLayout

    member, _, key = parsed.text_member.partition(":")
    if member == "json" and not key:
        raise UserError("`--text-member` must say which key of the json holds the text, such as json:text.")
    return UtteranceLayout(
        audio=parsed.audio_member.lstrip(".").lower() if parsed.audio_member else None,
        text=Field(member, key or None),
        language=language or Field("json", parsed.language_field or "lang"),
    )
