"""`voxtral-dist shards`: each action, and the refusal of mistakes."""

import json
import shutil
import tarfile

import pytest
import soundfile
import yaml

from voxtral_dist.config import load_config
from voxtral_dist.data.examples.prompting import Prompting
from voxtral_dist.data.stored.index import read_index

from corpora import write_lines


def test_shards_pack_says_what_it_packed_and_does_not_overwrite(run, speech_manifest, tmp_path):
    result = run("shards", "pack", speech_manifest, tmp_path / "out", "--workers", 1)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"{tmp_path / 'out'}:\n26 utterances, ")
    assert "en 7" in result.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.npy", "shards.json", "out-000000.tar"}
    refused = run("shards", "pack", speech_manifest, tmp_path / "out", "--workers", 1).refusal()
    assert "holds a complete shard set already" in refused


def test_shards_pack_lists_what_it_skipped(run, clip, tmp_path):
    good = {"audio_filepath": clip.name, "text": "good"}
    manifest = write_lines(tmp_path / "m.jsonl", [good, good | {"audio_filepath": "nowhere.wav"}, {"text": "mute"}])
    result = run("shards", "pack", manifest, tmp_path / "out", "--skip-bad", "--workers", 1)
    assert result.code == 0
    assert "skipped 2: 1 no audio named, 1 unreadable\n" in result.out
    assert [line.strip().split(": ")[0] for line in result.out.splitlines()[-2:]] == [f"{manifest}:2", f"{manifest}:3"]


def test_shards_pack_and_index_warn_of_unknown_languages_and_of_audio_that_is_cut_off(run, clip, tmp_path, caplog):
    contents = clip.read_bytes()
    (tmp_path / "cut.wav").write_bytes(contents[: len(contents) // 2])
    rows = [{"audio": name, "text": "said", "lang": lang} for name, lang in (("clip.wav", "de-DE"), ("cut.wav", None))]
    manifest = write_lines(tmp_path / "m.jsonl", rows)
    assert run("shards", "pack", manifest, tmp_path / "out", "--workers", 1).code == 0
    packed = [record.getMessage() for record in caplog.records]
    caplog.clear()
    tars = tmp_path / "out" / "out-000000.tar"
    assert run("shards", "index", tars, tmp_path / "index", "--workers", 1).code == 0
    for messages in (packed, [record.getMessage() for record in caplog.records]):
        cut, unknown = messages
        assert "ends after 0.2" in cut
        assert cut.endswith("s of the 0.50 s that its header claims.")
        assert unknown.startswith("1 of 2 utterances have no language")
        assert "`--language`" in unknown


def test_every_option_of_shards_pack_reaches_the_packer(run, clip, tmp_path):
    (tmp_path / "t.tsv").write_text(f"file_name\twords\ttongue\n{clip.name}\thello\t\n{clip.name}\tAdieu\tfra\n")
    fields = ["--audio-field", "file_name", "--text-field", "words", "--language-field", "tongue", "--language", "en"]
    shape = ["--format", "tsv", "--encode", "flac", "--name", "said", "--shard-megabytes", 1, "--workers", 1]
    assert run("shards", "pack", tmp_path / "t.tsv", tmp_path / "out", *fields, *shape).code == 0
    shown = [run("shards", "show", tmp_path / "out", f"#{number}").out for number in (0, 1)]
    assert "said-000000.tar" in shown[0]
    assert [line.split()[1] for out in shown for line in out.splitlines() if line.startswith(("text", "lang"))] == [
        "hello",
        "en",
        "Adieu",
        "fr",
    ]
    packed = run("shards", "pack", tmp_path / "out" / "said-000000.tar", tmp_path / "more", "--max-chars-per-second", 1)
    assert packed.code == 0, "short texts are always possible"


def test_shards_index_makes_an_index_of_foreign_tars(run, clip, tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        (tmp_path / "clip.said").write_text("hello")
        tar.add(clip, "clip.wav")
        tar.add(tmp_path / "clip.said", "clip.said")
    options = ["--text-member", "said", "--audio-member", "WAV", "--language", "german", "--workers", 1]
    result = run("shards", "index", tmp_path / "t.tar", tmp_path / "index", *options)
    assert (result.code, result.err) == (0, "")
    assert "1 utterance" in result.out
    assert "languages: de 1" in result.out
    assert "text       hello\nlanguage   de\n" in run("shards", "show", tmp_path / "index", "clip").out
    assert run("shards", "verify", tmp_path / "index", "--workers", 1).code == 0


def test_shards_inspect_shows_each_set(run, shard_folder, tmp_path, speech_manifest):
    other = tmp_path / "other"
    assert run("shards", "pack", speech_manifest, other, "--workers", 1, "--encode", "flac").code == 0
    result = run("shards", "inspect", shard_folder, other, "--no-contents")
    assert (result.code, result.err) == (0, "")
    for folder in (shard_folder, other):
        assert f"{folder}: 26 utterances" in result.out
    assert result.out.count("characters per second:") == 2
    assert [line.split()[:2] for line in result.out.splitlines() if line.split()[:1] == ["en"]] == [["en", "7"]] * 2


def test_shards_verify_names_what_is_broken_and_ends_with_1(run, shard_folder, tmp_path):
    folder = shutil.copytree(shard_folder, tmp_path / "broken")
    tar = sorted(folder.glob("*.tar"))[0]
    contents = bytearray(tar.read_bytes())
    contents[:100] = b"?" * 100
    tar.write_bytes(contents)
    result = run("shards", "verify", shard_folder, folder, "--json", tmp_path / "report.json", "--workers", 1)
    assert (result.code, result.err) == (1, "")
    first, last = result.out.splitlines()
    assert first.startswith(f"{folder}: {tar.name}: #0: damaged tar: ")
    assert last == "52 utterances read and decoded, 1 broken: 1 damaged tar"
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["num_utterances"], report["num_broken"], report["causes"]) == (52, 1, {"damaged tar": 1})
    assert report["broken"][0]["key"] == "#0"
    whole = run("shards", "verify", shard_folder, "--workers", 1)
    assert (whole.code, whole.out) == (0, "26 utterances read and decoded, 0 broken\n")


def test_shards_show_writes_the_clip_as_it_is_stored_or_as_wav(run, shard_folder, speech_manifest, tmp_path):
    rows = [json.loads(line) for line in speech_manifest.read_text().splitlines()]
    stored = speech_manifest.parent / rows[0]["audio_filepath"]
    result = run("shards", "show", shard_folder, "audio_0_000", "--out", tmp_path)
    assert (result.code, result.err) == (0, "")
    assert rows[0]["text"] in result.out
    assert rows[0]["speaker"] in result.out
    assert (tmp_path / "audio_0_000.flac").read_bytes() == stored.read_bytes()
    assert run("shards", "show", shard_folder, "audio_0_000", "--out", tmp_path / "clip.wav").code == 0
    assert soundfile.info(tmp_path / "clip.wav").format == "WAV"
    assert (soundfile.read(tmp_path / "clip.wav")[0] == soundfile.read(stored)[0]).all()
    assert "must end in .flac" in run("shards", "show", shard_folder, "#0", "--out", tmp_path / "clip.mp3").refusal()
    nowhere = tmp_path / "nowhere" / "clip.wav"
    assert str(nowhere) in run("shards", "show", shard_folder, "#0", "--out", nowhere).refusal()


def test_shards_show_prints_what_the_model_reads_and_learns(run, shard_folder, tiny_model, prompts, recipe):
    result = run("shards", "show", shard_folder, "audio_0_000", "--tokens", "--model", tiny_model)
    assert result.code == 0
    table = result.out.partition("  target\n")[2].splitlines()
    completion = prompts.completion("seven green bottles 0")
    learned = [int(line.rpartition("(")[2].rstrip(")")) for line in table if line.endswith(")")]
    assert learned == completion
    assert table[0].split() == ["0", "1", "<s>"]
    assert any("[AUDIO]" in line and " to " in line for line in table)
    # What is learned first is learned at the last token of the prompt.
    first = next(line for line in table if line.endswith(")"))
    assert "[TRANSCRIBE]" in first
    assert f"{len(completion)} targets" in result.out


def test_shards_show_takes_the_prompts_of_a_run(run, shard_folder, recipe, tmp_path):
    tree = yaml.safe_load(recipe.read_text())
    tree["train_data"] |= {"untagged_fraction": 1.0, "target_text": ["lower_case"]}
    (tmp_path / "words.txt").write_text("fährt\n", encoding="utf-8")
    tree["train_data"]["context"] = {"words": str(tmp_path / "words.txt"), "fraction": 1, "true_word_fraction": 1}
    recipe.write_text(yaml.safe_dump(tree))
    result = run("shards", "show", shard_folder, "#1", "--tokens", "--config", recipe)
    assert result.code == 0
    table = result.out.partition("  target\n")[2].splitlines()
    pieces = "".join(line.split("'")[1] for line in table if "'" in line)
    assert "Keywords: f" in pieces
    last = [line.rpartition("  ")[2] for line in table if line.endswith(")")]
    learned = "".join(piece.split("'")[1] for piece in last if "'" in piece)
    assert learned.startswith("lang:de")
    assert "Zug" not in learned
    assert "zug" in learned
    # The second set of a run: its utterances have other numbers there, so other seeds.
    other = shutil.copytree(shard_folder, tmp_path / "other")
    tree["train_data"] |= {"shards": [str(other), str(shard_folder)], "untagged_fraction": 0.5}
    recipe.write_text(yaml.safe_dump(tree))
    config = load_config(recipe)
    prompting = Prompting(untagged_fraction=0.5)
    for number in range(8):
        shown = run("shards", "show", shard_folder, f"#{number}", "--tokens", "--config", recipe).out
        language = ("en", "de", "fr", None)[number % 4]
        is_told = language is not None and not prompting.is_untagged((config.seed, 0, 26 + number))
        told = shown.partition("[/INST]")[2].partition("[TRANSCRIBE]")[0]
        assert ("':'" in told) == is_told
    tree["train_data"]["shards"] = [str(other)]
    recipe.write_text(yaml.safe_dump(tree))
    refused = run("shards", "show", shard_folder, "#0", "--tokens", "--config", recipe).refusal()
    assert "is not in the shards of the run" in refused
    assert "either `--model PATH` or" in run("shards", "show", shard_folder, "#1", "--tokens").refusal()
    assert "add `--tokens`" in run("shards", "show", shard_folder, "#1", "--config", recipe).refusal()


@pytest.mark.parametrize("by_field", [True, False])
def test_instructions_reach_the_index_by_both_commands(run, clip, tmp_path, by_field):
    row = {"audio_filepath": clip.name, "text": "eins", "lang": "en", "question": "Say it in German."}
    manifest = write_lines(tmp_path / "m.jsonl", [row])
    option = ["--instruction-field", "question"] if by_field else ["--instruction", "Say it in German."]
    assert run("shards", "pack", manifest, tmp_path / "packed", *option).code == 0
    assert run("shards", "pack", manifest, tmp_path / "foreign").code == 0
    for file in ("index.npy", "shards.json"):
        (tmp_path / "foreign" / file).unlink()
    assert run("shards", "index", tmp_path / "foreign", *option).code == 0
    for folder in ("packed", "foreign"):
        shown = run("shards", "show", tmp_path / folder, "#0").out
        assert "instruction Say it in German." in shown
        assert int(read_index([str(tmp_path / folder)]).record(0)["num_instruction_tokens"]) > 0
    # The answers are never taken for transcripts.
    again = ("shards", "pack", tmp_path / "packed", tmp_path / "again")
    assert "are answers to instructions" in run(*again).refusal()
    assert run(*again, "--instruction-field", "instruction").code == 0
    assert "instruction Say it in German." in run("shards", "show", tmp_path / "again", "#0").out
    # An index that does not fit, or cannot be read, is nothing that packing needs.
    for damage in ('{"format": 1}', "no json"):
        (tmp_path / "foreign" / "shards.json").write_text(damage)
        assert run("shards", "pack", tmp_path / "foreign", tmp_path / f"of {len(damage)}").code == 0
    both = ["--instruction", "a", "--instruction-field", "b"]
    assert "exclude each other" in run("shards", "pack", manifest, tmp_path / "x", *both).refusal()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("pack", "{nowhere}", "{out}"), "does not exist"),
        (("pack", "{nowhere}/*.tar", "{out}"), "tar"),
        (("pack", "{nowhere}", "{out}", "--format", "folder"), "does not exist"),
        (("pack", "{nowhere}", "{out}", "--format", "huggingface"), "cannot be opened"),
        (("pack", "{empty}", "{out}"), "holds no audio files"),
        (("pack", "{shards}", "{out}", "--language", "klingon"), "`--language` has the language 'klingon'"),
        (("pack", "{shards}", "{out}", "--text-member", "json"), "`--text-member` must say which key"),
        (("pack", "{shards}", "{out}", "--name", "a/b"), "`--name` must be a prefix of file names"),
        (("index", "{empty}"), "There are no tars in"),
        (("index", "{nowhere}"), "cannot be listed"),
        (("index", "{shards}", "--language", "en", "--language-field", "lang"), "exclude each other"),
        (("index", "{shards}", "{file}"), "cannot be written into"),
        (("inspect", "{empty}"), "is empty"),
        (("verify", "{nowhere}"), "does not exist"),
        (("verify", "{shards}", "--json", "{nowhere}/report.json"), "cannot be written"),
        (("show", "{shards}", "zzz"), "has the key 'zzz'"),
        (("show", "{empty}", "zzz"), "is empty"),
    ],
)
def test_a_mistake_about_shards_is_one_sentence(run, shard_folder, tmp_path, arguments, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    places = {name: tmp_path / name for name in ("empty", "file", "nowhere", "out")} | {"shards": shard_folder}
    filled = [part.format(**places) for part in arguments]
    result = run("shards", *filled, *(["--workers", 1] if filled[0] not in ("inspect", "show") else []))
    assert sentence in result.refusal()
