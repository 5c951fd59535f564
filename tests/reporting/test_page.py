"""The page needs no other file, shows exactly what was decoded, and lets no text become markup."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from voxtral_dist.reporting.results_folder import ReportOptions
from voxtral_dist.reporting.writing import write_report
from voxtral_dist.scoring.alignment import align_words
from voxtral_dist.scoring.hypotheses import read_scored

from saved_results import BASIC, Element, parse, stored_utterances, utterance, words_of, write_set

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)> &amp; {{ 7 * 7 }} | `a` *b* [c](d)"


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Element:
    return parse(write_report(run, ReportOptions(), tmp_path_factory.mktemp("page"))[0])


def report_of(folder: Path, out: Path, **chosen: object) -> Element:
    return parse(write_report(folder, ReportOptions(**chosen), out)[0])


def cards_of(page: Element) -> list[Element]:
    return [card for found in page.all("ol", "cards") for card in found.children if isinstance(card, Element)]


def test_nothing_is_fetched(page):
    places = [place for element in page.all() for name in ("src", "href") if (place := element.attributes.get(name))]
    assert len(places) > 10
    assert all(place.startswith(("#", "data:")) for place in places)
    style = page.all("style")[0].text
    assert "url(" not in style
    assert "@import" not in style
    policy = next(one for one in page.all("meta") if "http-equiv" in one.attributes).attributes["content"]
    assert "default-src 'none'" in policy


def test_links_within_the_page_lead_somewhere(page):
    ids = [name for element in page.all() if (name := element.attributes.get("id"))]
    assert len(set(ids)) == len(ids)
    links = {link.attributes["href"] for link in page.all("a")}
    assert links
    assert links <= {f"#{name}" for name in ids}


def test_cards_show_the_alignment_of_normalized_words_and_both_texts(run, page):
    scored = read_scored(run / "evaluations" / "step-0000008" / "speech.jsonl")
    utterances = {one.decoded.key: one for one in scored}
    cards = cards_of(page)
    assert len(cards) > 40, "two lists of twenty for each of two sets"
    for card in cards:
        one = utterances[card.all("bdi", "utterance-key")[0].text]
        aligned = align_words(BASIC.apply(one.decoded.reference), BASIC.apply(one.decoded.hypothesis))
        assert words_of(card.all("p", "words")[0]) == [tuple(word) for word in aligned]
        texts = [text.text for text in card.all("dl", "texts")[0].all("dd")]
        assert texts == [one.decoded.reference, one.decoded.hypothesis]
        assert card.all("b")[0].text == f"{one.words.errors} of {one.words.reference_length}"


def test_players_hold_the_stored_bytes_each_once(page, shard_folder):
    stored = {one.key: one.audio for one in stored_utterances(shard_folder)}
    section = next(one for one in page.all("section") if one.attributes["id"] == "set-1")
    played = []
    for card in cards_of(section):
        for player in card.all("audio"):
            kind, _, encoded = (player.attributes["src"] or "").partition(";base64,")
            contents = base64.b64decode(encoded, validate=True)
            key = card.all("bdi", "utterance-key")[0].text
            assert contents == stored[key]
            assert kind == ("data:audio/flac" if contents.startswith(b"fLaC") else "data:audio/wav")
            played.append(key)
    assert len(played) == len(set(played)) == 20
    assert "20 of the utterances shown have audio" in section.text
    assert section.all("p", "again"), "the second list leads to the players of the first"


def test_audio_keeps_to_its_limits_and_says_so(run, shard_folder, tmp_path):
    assert len(report_of(run, tmp_path, num_clips=3).all("audio")) == 2 * 3
    none = report_of(run, tmp_path, num_clips=0)
    assert not none.all("audio")
    assert none.text.count("No audio: --num-clips is 0.") == 2
    # Each set has half of the room.
    sizes = sorted(len(one.audio) for one in stored_utterances(shard_folder))
    few = report_of(run, tmp_path, max_audio_megabytes=2 * 3 * sizes[0] / 1e6)
    embedded = [(player.attributes["src"] or "").partition(";base64,")[2] for player in few.all("audio")]
    assert embedded
    assert sum(len(base64.b64decode(one)) for one in embedded) <= 2 * 3 * sizes[0]
    assert "MB exceed what `--max-audio-megabytes` leaves" in few.text


def test_shards_that_are_gone_are_no_error_and_are_named(run, tmp_path):
    (tmp_path / "evaluations").symlink_to(run / "evaluations")
    config = re.sub(r"shards: .*", f"shards: {tmp_path / 'gone'}", (run / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(config)
    page = report_of(tmp_path, tmp_path)
    assert not page.all("audio")
    assert "No audio: its shards cannot be read" in page.text
    assert "--shards speech=FOLDER" in [code.text for code in page.all("code")]


def test_hostile_text_stays_text(tmp_path):
    strange = {"key": HOSTILE, "language": HOSTILE, "fields": {"speaker": HOSTILE}}
    folder = write_set(
        tmp_path, "a<b>&", [utterance(0, HOSTILE, f"{HOSTILE} more\x00\x1b", **strange)], slices=("speaker",)
    )
    page = report_of(folder, tmp_path)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not [name for element in page.all() for name in element.attributes if name.startswith("on")]
    assert page.all("h2")[-1].text == "Test set a<b>&"
    card = cards_of(page)[0]
    assert card.all("bdi", "utterance-key")[0].text == HOSTILE
    texts = [text.text for text in card.all("dl", "texts")[0].all("dd")]
    assert texts == [HOSTILE, f"{HOSTILE} more\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"]
    assert HOSTILE in [cell.attributes.get("data-value") for cell in page.all("th")]
    markdown = (folder / "report.md").read_text()
    assert "<script" not in markdown
    assert "\\[c\\]\\(d\\)" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    tables = " ".join(str(len(re.findall(r"(?<!\\)\|", row))) for row in rows)
    assert tables == "12 12 12 13 13 13 7 7 7 7 7 7 7 7 7", "a text with a bar does not end its cell"


def test_languages_and_directions_are_told(tmp_path):
    folder = write_set(tmp_path, "speech", [utterance(0, "שלום לכולם", "שלום", language="he")])
    card = cards_of(report_of(folder, tmp_path))[0]
    shown = [*card.all("p", "words"), *card.all("dd")]
    assert len(shown) == 3
    assert all((one.attributes["dir"], one.attributes["lang"]) == ("auto", "he") for one in shown)


def test_loops_and_long_words_are_shortened(tmp_path):
    utterances = [utterance(0, "a", "b " * 5000), utterance(1, "字" * 4000, "字" * 3999), utterance(2, "c", "")]
    folder = write_set(tmp_path, "speech", utterances)
    page = report_of(folder, tmp_path)
    assert len((folder / "report.html").read_text()) < 60_000
    assert "… and 4,880 more" in page.text
    assert "(9200 more characters)" in page.text
    assert [[mark.text for mark in card.all("mark")] for card in cards_of(page)[:3]] == [
        ["repetition loop"],
        [],
        ["empty hypothesis"],
    ]


def test_a_set_without_errors_says_so(tmp_path):
    page = report_of(write_set(tmp_path, "speech", [utterance(0, "a b", "A b.")]), tmp_path)
    assert "No utterance has an error." in page.text
    assert not cards_of(page)
