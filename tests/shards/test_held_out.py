"""A development set has whole speakers or recordings, and a set that is overwritten takes nothing else with it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from written import write, write_rows

from voxtral_dist.cli.main import build_parser
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.corpus import Corpus, open_corpus
from voxtral_dist.shards.corpus.held_out import Division, HeldOut, divide
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.utterances import Refusal, Utterance
from voxtral_dist.shards.dividing import pack_parts
from voxtral_dist.shards.packing import PackOptions
from voxtral_dist.shards.removal import remove_set


def divided(folder: Path, rows: list[dict[str, Any]], *arguments: Any) -> Division:
    manifest = write_rows(folder / "m.jsonl", [{"audio": f"{n}.wav", "text": "x"} | row for n, row in enumerate(rows)])
    return divide(open_corpus(str(manifest), CorpusOptions()), HeldOut(*arguments))


def utterances(part: Corpus) -> list[Utterance]:
    return [line for line in part.lines() if isinstance(line, Utterance)]


@pytest.mark.parametrize("field", ["speaker", "client_id", "who"])
def test_speakers_are_held_out_as_a_whole(tmp_path, field):
    rows = [{field: f"s{n % 40}"} for n in range(1000)]
    division = divided(tmp_path, rows, 0.1, *((None,) if field != "who" else ("speaker", "who")))
    train, dev = (Counter(line.extra[field] for line in utterances(part)) for part in (division.train, division.dev))
    assert division.sentence == "dev: 100 of 1000 utterances, 4 of 40 speakers"
    assert not train.keys() & dev.keys()
    assert set((train | dev).values()) == {25}
    assert len(dev) == 4


def test_recordings_are_held_out_as_a_whole_where_speakers_are_unknown(tmp_path):
    rows = [{"audio": f"r{n % 10}.wav", "offset": n, "duration": 1} for n in range(100)] + [{"speaker": "x"}]
    division = divided(tmp_path, rows, 0.2)
    train, dev = ({line.audio.location for line in utterances(part)} for part in (division.train, division.dev))
    assert not train & dev
    assert len(utterances(division.dev)) in (20, 11)
    assert division.sentence.endswith("of 11 recordings")


def test_utterances_are_held_out_in_the_wanted_number(tmp_path):
    division = divided(tmp_path, [{"speaker": "x"}] * 1000, 0.05, "utterance")
    assert division.sentence == "dev: 50 of 1000 utterances"
    train, dev = ([line.key for line in utterances(part)] for part in (division.train, division.dev))
    assert len(dev) == 50
    assert sorted(train + dev, key=int) == [str(number) for number in range(1000)]
    # A corpus that grows keeps most of them.
    more = utterances(divided(tmp_path, [{"speaker": "x"}] * 1100, 0.05, "utterance").dev)
    assert len({line.key for line in more} & set(dev)) >= 45


def test_each_unusable_utterance_is_in_the_training_part(tmp_path):
    division = divided(tmp_path, [{"text": ""}, {}, {}, {}], 0.4, "utterance")
    counts = [sum(isinstance(line, Refusal) for line in part.lines()) for part in (division.train, division.dev)]
    assert counts == [1, 0]


def test_the_parts_are_other_corpora(tmp_path):
    divisions = [divided(tmp_path, [{}] * 10, fraction) for fraction in (0.1, 0.2)]
    identities = [json.dumps(part.identity) for one in divisions for part in (one.train, one.dev)]
    assert len(set(identities)) == 4


@pytest.mark.parametrize(
    ("rows", "arguments", "sentence"),
    [
        ([{"speaker": "x"}] * 10, (0.1,), "needs at least two speakers, but the corpus has 1"),
        ([{"speaker": "x"}, {}], (0.1, "speaker"), "the utterance 1 has no speaker"),
        ([{"text": ""}], (0.1,), "but the corpus has 0"),
    ],
)
def test_a_corpus_that_cannot_be_divided_is_refused(tmp_path, rows, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        divided(tmp_path, rows, *arguments)


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.05", 0.05), ("12.5%", 0.125)])
def test_a_share_is_parsed(text, value):
    assert build_parser().parse_args(["shards", "pack", "a", "b", "--dev", text]).dev == value


@pytest.mark.parametrize("text", ["50%", "0", "5", "-1%", "x"])
def test_a_share_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["shards", "pack", "a", "b", "--dev", text])
    assert "--dev" in capsys.readouterr().err


def test_an_interrupted_division_is_resumed_by_the_same_command_only(tmp_path):
    out, made = tmp_path / "out", []

    def pack_part(part: Corpus, folder: Path) -> None:
        made.append(f"{folder.name} {len(utterances(part))}")
        if len(made) == 2:
            raise KeyboardInterrupt
        write(folder / "shards.json", "{}")

    first, other = (divided(tmp_path, [{}] * 10, fraction) for fraction in (0.2, 0.3))
    with pytest.raises(KeyboardInterrupt):
        pack_parts(first, out, PackOptions(), False, pack_part)
    with pytest.raises(UserError, match="holds a complete shard set already, of another corpus"):
        pack_parts(other, out, PackOptions(), False, pack_part)
    pack_parts(first, out, PackOptions(), False, pack_part)
    assert made == ["train 8", "dev 2", "dev 2"]
    with pytest.raises(UserError, match="holds a complete shard set already"):
        pack_parts(first, out, PackOptions(), False, pack_part)
    assert not list(out.glob(".*"))


def write_set(folder: Path, names: list[str]) -> None:
    write(folder / "shards.json", json.dumps({"shards": [{"location": name} for name in names]}))
    for name in ("index.npy", "skipped.jsonl", "notes.txt", "other.tar", *names):
        write(folder / name, "x")


def test_a_set_is_removed_and_nothing_else(tmp_path):
    write_set(tmp_path, ["a-000000.tar", "a-000001.tar"])
    remove_set(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "other.tar"]
    remove_set(tmp_path)
    remove_set(tmp_path / "nowhere")


@pytest.mark.parametrize("names", [["other.tar"], ["../a-000000.tar"], ["a-000001.tar"]])
def test_tars_that_were_only_indexed_stay(tmp_path, names):
    write_set(tmp_path, names)
    with pytest.raises(UserError, match="was not made by `shards pack`"):
        remove_set(tmp_path)
    assert (tmp_path / "shards.json").exists()


def test_tars_that_are_packed_stay(tmp_path):
    write_set(tmp_path, ["a-000000.tar"])
    with pytest.raises(UserError, match="is to be packed"):
        remove_set(tmp_path, [f"{tmp_path}/a-000000.tar"])
    assert (tmp_path / "a-000000.tar").exists()


def test_another_seed_draws_others_and_is_another_division(tmp_path):
    rows = [{"speaker": f"s{n % 40}"} for n in range(400)]
    default, same, other = (divided(tmp_path, rows, 0.1, "speaker", None, *seed) for seed in ((), (0,), (7,)))
    drawn = [{line.extra["speaker"] for line in utterances(one.dev)} for one in (default, same, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == len(drawn[2]) == 4
    assert default.dev.identity == same.dev.identity != other.dev.identity
    assert build_parser().parse_args(["shards", "pack", "a", "b", "--dev", "5%", "--dev-seed", "7"]).dev_seed == 7
