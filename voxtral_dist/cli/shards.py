"""`voxtral-dist shards` and its actions."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from voxtral_dist.cli.arguments import Commands, count, examples, positive, positive_number, share
from voxtral_dist.config import load_config
from voxtral_dist.data.stored.checks import MAX_CHARS_PER_SECOND
from voxtral_dist.errors import UserError
from voxtral_dist.model.folders import refuse_wrong_model
from voxtral_dist.shards.corpus.formats import FORMATS

if TYPE_CHECKING:
    from voxtral_dist.data.stored.layout import UtteranceLayout
    from voxtral_dist.data.token_view import TokenView
    from voxtral_dist.shards.corpus.held_out import HeldOut
    from voxtral_dist.shards.corpus.options import CorpusOptions, Instruction
    from voxtral_dist.shards.corpus.parts import CorpusPart

_DEFAULT_SHARD_MEGABYTES = 512


def add_shards(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command and its actions."""
    shards = commands.add_parser(
        "shards",
        help="make, index and check WebDataset shards",
        epilog=examples(
            "voxtral-dist shards pack train.jsonl shards/data --encode flac --dev 5%",
            "voxtral-dist shards inspect shards/data/train shards/data/dev",
        ),
    )
    actions = shards.add_subparsers(required=True, metavar="ACTION")
    _add_pack(actions)
    _add_merge(actions)
    _add_index(actions)
    _add_inspect(actions)
    _add_verify(actions)
    _add_show(actions)


def _add_pack(actions: Commands[argparse.ArgumentParser]) -> None:
    pack = actions.add_parser(
        "pack",
        help="pack a corpus into tars with an index",
        epilog=examples(
            "voxtral-dist shards pack train.jsonl shards/data --encode flac --dev 5%",
            "voxtral-dist shards pack metadata.csv shards/anna --language fr --audio-from wavs",
            "voxtral-dist shards pack hf:google/fleurs shards/fleurs --config de_de --split train --language de",
        ),
    )
    pack.add_argument(
        "corpus",
        help="a manifest of JSON or a table, a folder of audio with texts, a set of Kaldi, Lhotse, NeMo, LJSpeech, "
        "YODAS or Hugging Face (a folder or hf:NAME), or other tars (a folder, glob, brace range or URL)",
    )
    pack.add_argument(
        "out", type=_out, help="folder for the shards, or its URL; rerun an interrupted command to resume it"
    )
    pack.add_argument("--format", choices=FORMATS, help="format of the corpus (default: guessed from its name)")
    pack.add_argument("--encode", choices=["flac"], help="store 16 kHz mono FLAC (default: copy the audio unchanged)")
    pack.add_argument("--name", help="name of the shards, NAME-000000.tar (default: that of the folder)")
    pack.add_argument(
        "--shard-megabytes",
        type=positive,
        default=_DEFAULT_SHARD_MEGABYTES,
        metavar="MB",
        help="size at which a shard is finished (default: %(default)s)",
    )
    pack.add_argument(
        "--skip-bad", action="store_true", help="skip unusable utterances, and list them in skipped.jsonl"
    )
    pack.add_argument("--audio-field", metavar="NAME", help="column with the audio")
    pack.add_argument("--text-field", metavar="NAME", help="column with the text")
    pack.add_argument(
        "--columns", metavar="NAME,...", help="names of all columns of a table without a header, such as audio,text"
    )
    pack.add_argument(
        "--audio-from",
        metavar="PLACE",
        help="folder, tars or dataset with the audio that a manifest names (default: beside it)",
    )
    pack.add_argument("--split", help="split of a Hugging Face dataset, such as train")
    pack.add_argument("--config", metavar="NAME", help="configuration (subset) of a Hugging Face dataset")
    _add_held_out(pack)
    pack.add_argument(
        "--part",
        type=_part,
        metavar="K/N",
        help="pack the K-th of N parts, on as many machines; `shards merge` then makes one set of them",
    )
    pack.add_argument(
        "--overwrite", action="store_true", help="remove the shard set in the folder first, or its --part"
    )
    _add_text_limit(pack)
    _add_workers(pack)
    _add_layout(pack, "utterances without a language")
    pack.set_defaults(run=_pack)


def _add_merge(actions: Commands[argparse.ArgumentParser]) -> None:
    merge = actions.add_parser(
        "merge",
        help="make one set of the parts that several machines packed",
        epilog=examples("voxtral-dist shards merge shards/data"),
    )
    merge.add_argument("out", type=_out, help="folder or URL into which `shards pack --part` packed")
    merge.set_defaults(run=_merge)


def _add_index(actions: Commands[argparse.ArgumentParser]) -> None:
    index = actions.add_parser(
        "index",
        help="write the index of tars made by other tools",
        epilog=examples(
            "voxtral-dist shards index 's3://bucket/speech-{000000..000127}.tar' shards/speech --language de"
        ),
    )
    index.add_argument("pattern", help="folder, glob, brace range or URL of tars")
    index.add_argument("out", type=Path, nargs="?", help="folder for the index (default: that of the tars)")
    _add_text_limit(index)
    _add_workers(index)
    _add_layout(index, "all utterances")
    index.set_defaults(run=_index)


def _add_inspect(actions: Commands[argparse.ArgumentParser]) -> None:
    inspect = actions.add_parser(
        "inspect",
        help="print sizes, languages, histograms, vocabulary, speaking rates and duplicates of shard sets",
        description="Print what the indexes of shard sets tell, at once. Then read all their texts and audio: print "
        "words, characters and speaking rates, the utterances that are far from the others, those with the same text "
        "or the same audio, and the audio that several sets share.",
        epilog=examples(
            "voxtral-dist shards inspect shards/data/train shards/data/dev",
            "voxtral-dist shards inspect 's3://bucket/speech' --no-contents",
        ),
    )
    inspect.add_argument("folders", nargs="+", help="shard sets with an index")
    inspect.add_argument(
        "--contents",
        action=argparse.BooleanOptionalAction,
        help="read texts and audio, or only the index (default: read those of local sets)",
    )
    _add_workers(inspect)
    inspect.set_defaults(run=_inspect)


def _add_verify(actions: Commands[argparse.ArgumentParser]) -> None:
    verify = actions.add_parser(
        "verify",
        help="read and decode every utterance, and list the broken ones",
        epilog=examples("voxtral-dist shards verify shards/data/train --json broken.json"),
    )
    verify.add_argument("folders", nargs="+", help="shard sets with an index")
    verify.add_argument("--json", type=Path, metavar="FILE", help="write the broken utterances to this file")
    _add_workers(verify)
    verify.set_defaults(run=_verify)


def _add_show(actions: Commands[argparse.ArgumentParser]) -> None:
    show = actions.add_parser(
        "show",
        help="print one utterance, or write its audio to a file",
        epilog=examples(
            "voxtral-dist shards show shards/data/dev '#0' --out clip.wav",
            "voxtral-dist shards show shards/data/train '#0' --tokens --config run.yaml",
        ),
    )
    show.add_argument("folder", help="shard set with an index")
    show.add_argument("key", help="key of the utterance, or #NUMBER")
    show.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the audio to this file or folder: as stored, or as WAV if FILE ends in .wav",
    )
    show.add_argument(
        "--tokens",
        action="store_true",
        help="print each token of prompt and completion, and its target in the loss",
    )
    show.add_argument("--model", metavar="PATH", help="for --tokens: a folder or hub name with the tokenizer")
    show.add_argument(
        "--config", type=Path, metavar="FILE", help="for --tokens: YAML file of the run, instead of --model"
    )
    show.add_argument(
        "--epoch",
        type=count,
        default=0,
        metavar="N",
        help="for --tokens: epoch of the run, from 0 (default: %(default)s)",
    )
    show.set_defaults(run=_show)


def _add_held_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dev",
        type=share,
        metavar="SHARE",
        help="hold out this share of the utterances, such as 5%%: OUT/dev gets them, OUT/train the others",
    )
    parser.add_argument(
        "--dev-by",
        choices=["speaker", "utterance"],
        help="what is held out as a whole (default: speakers where all utterances have one, else recordings)",
    )
    parser.add_argument("--speaker-field", metavar="NAME", help="for --dev: column with the speaker")
    parser.add_argument(
        "--dev-seed", type=count, metavar="N", help="for --dev: draw others with another seed (default: 0)"
    )


def _add_text_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-chars-per-second",
        type=positive_number,
        default=MAX_CHARS_PER_SECOND,
        metavar="NUMBER",
        help="a transcript with more characters per second of audio is unusable (default: %(default)g)",
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=positive, default=_num_cores(), metavar="N", help="processes (default: number of cores)"
    )


def _add_layout(parser: argparse.ArgumentParser, whose: str) -> None:
    parser.add_argument("--language", help=f"language of {whose}: a code, a locale or an English name")
    parser.add_argument("--language-field", metavar="NAME", help="column, or key in the json, with the language")
    parser.add_argument(
        "--instruction", metavar="TEXT", help="instruction that every text answers (default: texts are transcripts)"
    )
    parser.add_argument("--instruction-field", metavar="NAME", help="column, or key in the json, with the instruction")
    parser.add_argument(
        "--text-member",
        default="json:text",
        metavar="MEMBER[:KEY]",
        help="tar member with the text, such as json:text, txt or cls (default: %(default)s)",
    )
    parser.add_argument(
        "--audio-member",
        metavar="SUFFIX",
        help="suffix of the tar member with the audio, such as flac; needed if an utterance has several",
    )


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pack(parsed: argparse.Namespace) -> int:
    from voxtral_dist.shards.actions import pack_shards
    from voxtral_dist.shards.packed_utterance import PackRules
    from voxtral_dist.shards.packing import PackOptions

    options = PackOptions(
        shard_bytes=parsed.shard_megabytes * 10**6,
        skip_bad=parsed.skip_bad,
        rules=PackRules(parsed.encode, parsed.max_chars_per_second),
        num_workers=parsed.workers,
        name=parsed.name,
        part=parsed.part,
    )
    return pack_shards(parsed.corpus, parsed.out, _corpus_options(parsed), options, _held_out(parsed), parsed.overwrite)


def _merge(parsed: argparse.Namespace) -> int:
    from voxtral_dist.shards.actions import merge_shards

    return merge_shards(parsed.out)


def _out(text: str) -> Path | str:
    from voxtral_dist.data.stored.storage import is_remote

    return text if is_remote(text) else Path(text)


def _part(text: str) -> CorpusPart:
    from voxtral_dist.shards.corpus.parts import parse_part

    try:
        return parse_part(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _held_out(parsed: argparse.Namespace) -> HeldOut | None:
    from voxtral_dist.shards.corpus.held_out import HeldOut

    if parsed.dev is None:
        if any(value is not None for value in (parsed.dev_by, parsed.speaker_field, parsed.dev_seed)):
            raise UserError(
                "`--dev-by`, `--speaker-field` and `--dev-seed` say how --dev divides a corpus: pass it, or omit them."
            )
        return None
    if parsed.dev_by == "utterance" and parsed.speaker_field is not None:
        raise UserError("`--dev-by utterance` and `--speaker-field` exclude each other: pass one of them.")
    return HeldOut(
        parsed.dev,
        "speaker" if parsed.speaker_field is not None else parsed.dev_by,
        parsed.speaker_field,
        parsed.dev_seed or 0,
    )


def _corpus_options(parsed: argparse.Namespace) -> CorpusOptions:
    from voxtral_dist.shards.corpus.fields import FieldNames
    from voxtral_dist.shards.corpus.options import CorpusOptions

    return CorpusOptions(
        corpus_format=parsed.format,
        language=parsed.language,
        names=FieldNames.chosen(parsed.audio_field, parsed.text_field, parsed.language_field),
        columns=tuple(name.strip() for name in parsed.columns.split(",")) if parsed.columns else None,
        audio_from=parsed.audio_from,
        layout=_layout(parsed),
        split=parsed.split,
        config=parsed.config,
        instruction=_instruction(parsed),
    )


def _index(parsed: argparse.Namespace) -> int:
    from voxtral_dist.data.stored.layout import Field
    from voxtral_dist.shards.actions import index_shards
    from voxtral_dist.shards.corpus.corpus import default_language

    if parsed.language is not None and parsed.language_field is not None:
        raise UserError("`--language` and `--language-field` exclude each other: pass one of them.")
    layout = _layout(parsed, default_language(parsed.language))
    if (instruction := _instruction(parsed)) is not None:
        place = Field("json", instruction.column) if instruction.column else instruction.text
        layout = replace(layout, instruction=place)
    return index_shards(parsed.pattern, parsed.out, layout, parsed.max_chars_per_second, parsed.workers)


def _inspect(parsed: argparse.Namespace) -> int:
    from voxtral_dist.shards.actions import inspect_shards

    return inspect_shards(parsed.folders, parsed.workers, parsed.contents)


def _verify(parsed: argparse.Namespace) -> int:
    from voxtral_dist.shards.actions import verify_shards

    return verify_shards(parsed.folders, parsed.workers, parsed.json)


def _show(parsed: argparse.Namespace) -> int:
    from voxtral_dist.data.stored.index_files import refuse_missing_sets
    from voxtral_dist.shards.actions import show_utterance

    if not parsed.tokens and (parsed.model or parsed.config):
        raise UserError("`--model` and `--config` only change what `--tokens` prints: add `--tokens`, or omit them.")
    refuse_missing_sets([parsed.folder])
    return show_utterance(parsed.folder, parsed.key, parsed.out, _token_view(parsed) if parsed.tokens else None)


def _token_view(parsed: argparse.Namespace) -> TokenView:
    if parsed.model is not None:
        refuse_wrong_model(parsed.model, "--model")
    if parsed.config is not None:
        refuse_wrong_model(load_config(parsed.config).model.path)
    # Imports torch.
    from voxtral_dist.data.token_view import TokenView

    return TokenView.of(parsed.model, parsed.config, parsed.epoch)


def _instruction(parsed: argparse.Namespace) -> Instruction | None:
    from voxtral_dist.shards.corpus.options import Instruction

    if parsed.instruction is not None and parsed.instruction_field is not None:
        raise UserError("`--instruction` and `--instruction-field` exclude each other: pass one of them.")
    if parsed.instruction is not None and not parsed.instruction.strip():
        raise UserError("`--instruction` is blank: pass the instruction that the texts answer, or omit the option.")
    if parsed.instruction is None and parsed.instruction_field is None:
        return None
    return Instruction(parsed.instruction, parsed.instruction_field)


def _layout(parsed: argparse.Namespace, language: str | None = None) -> UtteranceLayout:
    from voxtral_dist.data.stored.layout import Field, UtteranceLayout

    member, _, key = parsed.text_member.partition(":")
    if member == "json" and not key:
        raise UserError("`--text-member` must say which key of the json holds the text, such as json:text.")
    return UtteranceLayout(
        audio=parsed.audio_member.lstrip(".").lower() if parsed.audio_member else None,
        text=Field(member, key or None),
        language=language or Field("json", parsed.language_field or "lang"),
    )
