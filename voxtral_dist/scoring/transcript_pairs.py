"""References and hypotheses of other tools: rows of NeMo and of tables, and two text files, as lines, Kaldi's or trn.

Each is read into rows with the keys of `NAME.jsonl`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist.errors import UserError
from voxtral_dist.output.counting import counted
from voxtral_dist.text.languages import language_code

Row = dict[str, Any]

_TABLES = {".csv": ",", ".tsv": "\t"}
_LARGEST_FIELD_CHARS = 2**24
# Keys of NeMo's predictions, of our own results and of Hugging Face's scripts; the first that a row has counts.
_KEYS = {
    "reference": ("reference", "text", "ref", "sentence"),
    "hypothesis": ("hypothesis", "pred_text", "hyp", "prediction"),
    "key": ("key", "audio_filepath", "utt_id", "id"),
    "language": ("language", "lang", "locale"),
    "duration_seconds": ("duration_seconds", "duration"),
}
# sclite's trn: the text, and the name of the utterance in parentheses at the end.
_TRN = re.compile(r"^(.*)\(([^()\s]+)\)\s*$")


@dataclass(frozen=True)
class RowKeys:
    """Where rows have what.

    reference, hypothesis, key: names of keys or columns; None takes the usual ones.
    language: ISO 639-1 code of rows without one.
    references: a text file with the references of hypotheses that are a text file too.
    """

    reference: str | None = None
    hypothesis: str | None = None
    key: str | None = None
    language: str | None = None
    references: Path | None = None

    def canonical(self, row: Mapping[str, Any]) -> Row:
        """A row with the keys of `NAME.jsonl`; others are kept, and so is a language without an ISO 639-1 code."""
        found = dict(row)
        chosen = {"reference": self.reference, "hypothesis": self.hypothesis, "key": self.key}
        for name, usual in _KEYS.items():
            asked = chosen.get(name)
            source = next((one for one in ((asked,) if asked else usual) if row.get(one) is not None), None)
            if source is not None and source != name:
                found[name] = row[source]
            elif asked and source is None:
                found.pop(name, None)
        if isinstance(found.get("duration_seconds"), str):
            found["duration_seconds"] = _seconds(found["duration_seconds"])
        if "key" in found:
            found["key"] = str(found["key"])
        with suppress(ValueError):
            found["language"] = language_code(found.get("language")) or self.language
        return found


def is_table(path: Path) -> bool:
    """Whether a file is a CSV or TSV by its name."""
    return path.suffix.lower() in _TABLES


def table_rows(path: Path, contents: bytes) -> Iterator[tuple[int, Row]]:
    """The rows of a table with a header, with the numbers of their first lines.

    Raises:
        UserError: it is not UTF-8, or a row has more cells than the header.
    """
    csv.field_size_limit(_LARGEST_FIELD_CHARS)
    reader = csv.DictReader(io.StringIO(_text(path, contents), newline=""), delimiter=_TABLES[path.suffix.lower()])
    number = 2
    try:
        for row in reader:
            if None in row:
                raise UserError(f"{path}, line {number}: the row has more cells than the header has columns.")
            yield number, {name: value for name, value in row.items() if value is not None}
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {number}: {error}.") from error


def paired_rows(references: Path, hypotheses: Path, contents: bytes) -> Iterator[tuple[int, Row]]:
    """The utterances of two text files, with the numbers of their lines in the hypotheses.

    In trn and in Kaldi's `text`, utterances have names and are paired by them; else line by line. Files are Kaldi's if
    every line of both begins with a name that holds a digit, and both have the same names, each once.

    Raises:
        UserError: a file cannot be read, or the files do not hold the same utterances.
    """
    try:
        wanted = _lines(references, references.read_bytes())
    except OSError as error:
        raise UserError(f"`--references`: {references} cannot be read: {error.strerror}.") from error
    guessed = _lines(hypotheses, contents)
    for split in (_split_trn, _split_kaldi):
        texts, others = split(wanted), split(guessed)
        if texts is not None and others is not None and (split is _split_trn or texts.keys() == others.keys()):
            yield from _by_name(references, hypotheses, texts, others)
            return
    if len(wanted) != len(guessed):
        raise UserError(
            f"{references} has {counted(len(wanted), 'line')}, but {hypotheses} has {len(guessed)}: both need one "
            "line for each utterance, in the same order, or the names of utterances (Kaldi, trn)."
        )
    for number, (reference, hypothesis) in enumerate(zip(wanted, guessed, strict=True), 1):
        yield number, {"reference": reference, "hypothesis": hypothesis}


def _by_name(
    references: Path, hypotheses: Path, texts: Mapping[str, str], others: Mapping[str, str]
) -> Iterator[tuple[int, Row]]:
    alone = sorted(texts.keys() ^ others.keys())
    if alone:
        raise UserError(
            f"{references} and {hypotheses} do not hold the same utterances: {len(alone)} are in only one of them, "
            f"such as {alone[0]!r}. One without a hypothesis needs a line with its name alone."
        )
    for number, (name, hypothesis) in enumerate(others.items(), 1):
        yield number, {"key": name, "reference": texts[name], "hypothesis": hypothesis}


def _split_trn(lines: Sequence[str]) -> dict[str, str] | None:
    found = [_TRN.match(line) for line in lines if line.strip()]
    texts = {match[2]: match[1].strip() for match in found if match is not None}
    return texts if texts and len(texts) == len(found) else None


def _split_kaldi(lines: Sequence[str]) -> dict[str, str] | None:
    parts = [line.split(maxsplit=1) for line in lines if line.strip()]
    texts = {name: "".join(rest) for name, *rest in parts if any(map(str.isdigit, name))}
    return texts if texts and len(texts) == len(parts) else None


def _lines(path: Path, contents: bytes) -> list[str]:
    """The lines; an empty one is an empty text, but not what follows the last line break."""
    lines = _text(path, contents).replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _text(path: Path, contents: bytes) -> str:
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}): convert it.") from error


def _seconds(text: str) -> float | str | None:
    """A duration; the text itself if it is no number, which the check of the row names."""
    if not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        return text
