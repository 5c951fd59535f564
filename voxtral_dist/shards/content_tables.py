"""What the texts and the audio of shard sets hold, as tables and lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.errors import UserError
from voxtral_dist.output.console import one_line, printable, say
from voxtral_dist.output.counting import counted
from voxtral_dist.shards.content_statistics import LanguageStatistics, Quantiles, language_statistics, outliers
from voxtral_dist.shards.contents import SetContents
from voxtral_dist.shards.duplicates import Duplicates, duplicates, num_with_other_texts, shared_audio
from voxtral_dist.shards.inspection import table_console
from voxtral_dist.shards.lookup import read_utterance

_NUM_NAMED = 10
_NUM_CHARACTERS = 40
_MAX_TEXT = 60


def print_contents(sets: Mapping[str, SetContents]) -> None:
    """Print statistics of texts and speaking rates, outliers and duplicates of each set, and audio that sets share."""
    console = table_console()
    for folder, contents in sets.items():
        statistics = list(language_statistics(contents))
        say(f"{folder}: texts and speaking rates, 5 % / median / 95 % of the utterances")
        console.print(_statistics_table(statistics))
        lines = [
            *_character_lines(contents),
            *_word_lines(contents),
            *_outlier_lines(contents),
            *_duplicate_lines(contents),
            *_unreadable_lines(contents),
        ]
        say("\n".join(map(one_line, lines)))
    for shared in shared_audio(sets, _NUM_NAMED):
        named = ", ".join(f"#{one} = #{other}" for one, other in shared.pairs)
        more = shared.num_utterances - len(shared.pairs)
        said = f"{counted(shared.num_utterances, 'utterance')} of {shared.second} with audio of {shared.first}: {named}"
        say(one_line(f"{said} and {more} more" if more else said))


def _statistics_table(statistics: Iterable[LanguageStatistics]) -> Table:
    table = Table("language", box=SIMPLE_HEAD)
    for name in (
        "utterances",
        "words",
        "vocabulary",
        "once",
        "words each",
        "characters each",
        "words/s",
        "characters/s",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for of in statistics:
        counts = (of.num_words, of.num_distinct, of.num_once) if of.words is not None else ("", "", "")
        table.add_row(
            Text(one_line(printable(of.language))),
            str(of.num_utterances),
            *map(str, counts),
            _quantile_text(of.words, "g"),
            _quantile_text(of.characters, "g"),
            _quantile_text(of.words_per_second, ".1f"),
            _quantile_text(of.characters_per_second, ".1f"),
        )
    return table


def _quantile_text(quantiles: Quantiles | None, form: str) -> str:
    return "" if quantiles is None else " / ".join(f"{round(one, 1):{form}}" for one in quantiles)


def _character_lines(contents: SetContents) -> Iterator[str]:
    ordered = contents.characters.most_common()
    yield f"characters: {len(ordered)} different; the rarest: {_counted(ordered[::-1][:_NUM_CHARACTERS])}"


def _word_lines(contents: SetContents) -> Iterator[str]:
    for language, words in sorted(contents.words.items(), key=lambda one: (-one[1].total(), one[0])):
        yield f"most frequent words ({language}): {_counted(words.most_common(_NUM_NAMED))}"


def _counted(entries: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{_visible(text)} {count}" for text, count in entries)


def _visible(text: str) -> str:
    """A word or character; by its code point where it would not be seen."""
    return text if text.isprintable() and not text.isspace() else f"U+{ord(text[0]):04X}"


def _outlier_lines(contents: SetContents) -> Iterator[str]:
    found = outliers(contents)
    if found:
        yield f"much faster or slower than others of their language: {counted(len(found), 'utterance')}"
    for one in found[:_NUM_NAMED]:
        rate = f"{one.rate:.1f} characters/s (median {one.median:.1f})"
        key, text = _read(contents, one.utterance_id)
        yield f"  {_named(one.utterance_id, key)}  {rate}  {_shortened(text)}"
    if len(found) > _NUM_NAMED:
        yield f"  and {len(found) - _NUM_NAMED} more"


def _duplicate_lines(contents: SetContents) -> Iterator[str]:
    texts = duplicates(contents.text_digests, _NUM_NAMED)
    yield f"same text: {_extent(texts)}"
    yield from (f"  {len(ids)} times: {_shortened(_read(contents, ids[0])[1])}" for ids in texts.largest)
    audio = duplicates(contents.audio_digests, _NUM_NAMED)
    others = num_with_other_texts(contents) if audio.num_contents else 0
    yield f"same audio: {_extent(audio)}" + (f", {others} of them with different texts" if others else "")
    for ids in audio.largest:
        named = " = ".join(_named(one, _read(contents, one)[0]) for one in ids[:_NUM_NAMED])
        more = len(ids) - _NUM_NAMED
        yield f"  {named} and {more} more" if more > 0 else f"  {named}"


def _extent(found: Duplicates) -> str:
    if not found.num_contents:
        return "none"
    return f"{counted(found.num_utterances, 'utterance')} share {found.num_contents}"


def _unreadable_lines(contents: SetContents) -> Iterator[str]:
    unreadable = contents.unreadable
    if unreadable:
        yield f"not counted above: {counted(len(unreadable), 'unreadable utterance')}; `shards verify` lists all"
        yield from (f"  #{number} {reason}" for number, reason in list(unreadable.items())[:_NUM_NAMED])


def _named(utterance_id: int, key: str) -> str:
    return f"#{utterance_id} {key}".rstrip()


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


def _read(contents: SetContents, utterance_id: int) -> tuple[str, str]:
    """Key and text of an utterance, which were read before."""
    try:
        key, utterance = read_utterance(contents.index, utterance_id, Storage())
    except UserError:
        return "", ""
    return key, utterance.text
