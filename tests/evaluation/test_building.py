"""A test set is cut into batches that hold every utterance once, and only complete results give a rate."""

from __future__ import annotations

from itertools import pairwise

import pytest
import soundfile

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.config import TestSetConfig as ShardsToTest  # keeps pytest from collecting it
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.errors import RankError
from voxtral_dist.evaluation.building import build_test_set
from voxtral_dist.evaluation.evaluating import check_complete
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.scoring.utterances import DecodedUtterance, ScoredUtterance, score_utterance

from corpora import pack_manifest, tone, write_lines


def scored(utterance_id: int) -> ScoredUtterance:
    decoded = DecodedUtterance(
        utterance_id=utterance_id,
        key=f"key-{utterance_id}",
        language="en",
        duration_seconds=1.5,
        reference="a",
        hypothesis="a",
        hit_limit=False,
    )
    return score_utterance(decoded, normalizer("basic"))


def test_fields_that_slices_need_reach_the_examples(shard_folder, prompts):
    config = ShardsToTest(shards=str(shard_folder))
    settings = EvaluationConfig(slices=("lang", "nothing"))
    test_set = build_test_set("held_out", config, settings, prompts, (), Storage())[0]
    index = test_set.index
    for utterance_id in range(4):
        example = test_set.reader.example(utterance_id)
        stored = test_set.reader.read(utterance_id).fields
        assert example.fields == {name: stored[name] for name in ("lang", "speaker") if name in stored}
        assert index.language(utterance_id) == example.fields.get("lang")
    assert any("lang" in test_set.reader.example(utterance_id).fields for utterance_id in range(4))


def test_targets_of_a_test_set_are_those_of_training_and_references_stay(shard_folder, prompts):
    config = ShardsToTest(shards=str(shard_folder))
    steps = ("lower_case", "no_punctuation")
    test_set = build_test_set("held_out", config, EvaluationConfig(), prompts, steps, Storage())[0]
    examples = [test_set.reader.example(utterance_id) for utterance_id in range(len(test_set.index))]
    targets = {example.reference: prompts.transcript(example.completion[:-1]).text for example in examples}
    assert targets["Übermorgen fährt der Zug früher 1"] == "übermorgen fährt der zug früher 1"


def test_a_reference_of_which_no_target_is_left_counts_in_a_test_set(tmp_path, prompts):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16_000)
    manifest = write_lines(tmp_path / "manifest.jsonl", [{"audio_filepath": "a.wav", "text": "?!", "lang": "en"}])
    pack_manifest(manifest, tmp_path / "set", 10**9, skip_bad=False)
    config = ShardsToTest(shards=str(tmp_path / "set"))
    test_set = build_test_set("marks", config, EvaluationConfig(), prompts, ("no_punctuation",), Storage())[0]
    example = test_set.reader.example(0)
    assert (example.reference, example.completion) == ("?!", (prompts.eos_id,))


@pytest.fixture(scope="module")
def held_out(shard_folder, prompts):
    config = ShardsToTest(shards=str(shard_folder), max_utterances=7)
    return build_test_set("held_out", config, EvaluationConfig(batch_size=3), prompts, (), Storage())[0]


def test_batches_hold_every_utterance_once_longest_first(held_out):
    batches = held_out.batches
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert sorted(utterance_id for batch in batches for utterance_id in batch) == list(range(7))
    windows = [
        [-(-held_out.index.duration_seconds[utterance_id] // 1.28) for utterance_id in batch] for batch in batches
    ]
    assert all(max(later) <= min(earlier) for earlier, later in pairwise(windows))


def test_a_whole_test_set_comes_back_in_the_order_of_the_index(held_out):
    shuffled = [scored(utterance_id) for utterance_id in (4, 0, 6, 2, 1, 5, 3)]
    assert [utterance.decoded.utterance_id for utterance in check_complete(held_out, shuffled)] == list(range(7))


@pytest.mark.parametrize(
    ("utterance_ids", "sentence"),
    [
        ([0, 1, 2, 3, 4, 5], r"lost 1 utterance \(first: \[6\]\)"),
        ([], "lost 7 utterances"),
        ([0, 1, 2, 3, 4, 5, 6, 6], r"decoded 1 twice \(first: \[6\]\)"),
        ([0, 1, 2, 3, 4, 5, 5], r"lost 1 utterance"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "held_out"),
        ([-1, 0, 1, 2, 3, 4, 5, 6], "held_out"),
    ],
)
def test_other_ids_than_those_of_the_index_give_no_rate(held_out, utterance_ids, sentence):
    with pytest.raises(RankError, match=sentence):
        check_complete(held_out, [scored(utterance_id) for utterance_id in utterance_ids])
