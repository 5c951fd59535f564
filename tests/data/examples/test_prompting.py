"""Contexts: which listed words a prompt shows, drawn reproducibly."""

from collections import Counter

import pytest

from voxtral_dist.config import ContextConfig
from voxtral_dist.data.examples.prompting import TestContexts as ContextsOfTests
from voxtral_dist.data.examples.prompting import TrainingContexts, context_text, training_word_list
from voxtral_dist.errors import UserError
from voxtral_dist.text.word_list import WordList

TEXT = "Yesterday Siobhan flew to Saint Petersburg; Zürich was closed."
TRUE = {"Siobhan", "Saint Petersburg", "Zürich"}
OTHERS = tuple(f"{syllable}{number}" for number in range(60) for syllable in ("Xiao", "ibu", "Qa"))
POOL = (*TRUE, "Petersburg", *OTHERS)


@pytest.fixture
def words_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(sorted(POOL)) + "\n\n", encoding="utf-8")
    return path


def listed(context: str) -> list[str]:
    """The words that a context shows."""
    lines = [line for line in context.splitlines() if line.startswith("Keywords: ")]
    return lines[0].removeprefix("Keywords: ").split(", ") if lines else []


def made_by(config: ContextConfig, prompts) -> TrainingContexts:
    return TrainingContexts(config, prompts, training_word_list(config))


def contexts(words_file, prompts, **settings) -> TrainingContexts:
    return made_by(ContextConfig(words=words_file, **{"fraction": 1.0} | settings), prompts)


def test_the_text_of_a_context():
    assert context_text(["a", "b c"]) == "Keywords: a, b c"
    assert context_text([], " what was\n said ") == "Previous text: what was said"
    assert context_text(["a"], "said") == "Previous text: said\nKeywords: a"
    assert context_text([]) == ""


def test_entries_are_found_whatever_their_case_and_punctuation_and_the_longest_wins():
    words = WordList(["saint petersburg", "Petersburg", "U.S.", "don't"])
    assert words.entries_in("SAINT PETERSBURG, the U.S. (don’t)") == [0, 2, 3]
    assert words.entries_in("petersburg saint") == [1]
    assert [(found.start, found.end) for found in words.find(["to", "saint", "petersburg", "and", "petersburg"])] == [
        (1, 3),
        (4, 5),
    ]
    assert words.entries_in("saints us petersburger") == []


def test_entries_that_are_one_word_in_two_spellings_are_one():
    assert WordList([" Zürich ", "zürich", "ZU\u0308RICH", "", "...", "new  york"]).entries == ("Zürich", "new york")


def test_a_context_has_the_true_words_and_other_words_that_the_transcript_does_not_hold(words_file, prompts):
    made = contexts(words_file, prompts, true_word_fraction=1.0, max_distractors=8)
    sizes, places = Counter(), Counter()
    for utterance_id in range(200):
        words = listed(made(TEXT, [{}], (0, 0, utterance_id)))
        assert set(words) >= TRUE
        assert len(set(words)) == len(words)
        # Not even as a distractor: it occurs in the transcript.
        assert set(words) <= set(POOL) - {"Petersburg"}
        sizes[len(words) - len(TRUE)] += 1
        places[words.index("Siobhan") / len(words) < 0.5] += 1
    assert set(sizes) == set(range(9))
    # True words are at random places.
    assert 60 < places[True] < 140


def test_true_words_may_be_missing_and_utterances_without_any_have_a_context_too(words_file, prompts):
    made = contexts(words_file, prompts, true_word_fraction=0.5, max_distractors=4)
    shown = Counter(word for key in range(300) for word in listed(made(TEXT, [{}], (0, 0, key))) if word in TRUE)
    assert all(110 < shown[word] < 190 for word in TRUE)
    assert any(listed(made("nothing of it", [{}], (0, 0, key))) for key in range(9))


def test_the_fraction_of_utterances_with_a_context(words_file, prompts):
    made = contexts(words_file, prompts, fraction=0.3)
    num_with = sum(bool(made(TEXT, [{}], (5, 1, utterance_id))) for utterance_id in range(1000))
    assert 250 < num_with < 350
    assert not any(contexts(words_file, prompts, fraction=0)(TEXT, [{}], (0, 0, key)) for key in range(50))


def test_a_context_depends_on_seed_epoch_and_utterance_alone(words_file, prompts):
    one, other = contexts(words_file, prompts), contexts(words_file, prompts)
    keys = [
        (seed, epoch_index, utterance_id) for seed in range(2) for epoch_index in range(2) for utterance_id in range(5)
    ]
    first = [one(TEXT, [{}], key) for key in keys]
    assert [other(TEXT, [{}], key) for key in reversed(keys)] == first[::-1]
    assert len(set(first)) == len(keys)


@pytest.mark.parametrize("max_tokens", [1, 12, 25, 60, 200])
def test_a_context_never_has_more_tokens_than_it_may(words_file, prompts, max_tokens):
    made = contexts(
        words_file, prompts, max_tokens=max_tokens, max_distractors=60, true_word_fraction=1, previous_text_field="said"
    )
    said = "It was the best of times, it was the worst of times. " * 9
    lengths = [len(prompts.encode(made(TEXT, [{"said": said}], (0, 0, utterance_id)))) for utterance_id in range(40)]
    assert max(lengths) <= max_tokens
    assert max_tokens < 60 or max(lengths) > 0.6 * max_tokens, "the room is used"


def test_true_words_come_before_distractors_where_room_is_short(words_file, prompts):
    made = contexts(words_file, prompts, max_tokens=60, max_distractors=100, true_word_fraction=1)
    assert all(set(listed(made(TEXT, [{}], (0, 0, utterance_id)))) >= TRUE for utterance_id in range(40))


def test_previous_text_keeps_its_end(prompts):
    made = made_by(ContextConfig(previous_text_field="before", fraction=1, max_tokens=40), prompts)
    said = "one two three four five six seven eight nine ten eleven twelve and then she came"
    context = made("hello", [{"before": said}], (0, 0, 0))
    assert context.startswith("Previous text: ")
    assert said.endswith(context.removeprefix("Previous text: "))
    assert context.endswith("then she came")
    assert made("hello", [{}], (0, 0, 0)) == ""
    assert made("hello", [{"before": None}], (0, 0, 0)) == ""


def test_previous_text_without_spaces_keeps_its_end_too(prompts):
    made = made_by(ContextConfig(previous_text_field="before", fraction=1, max_tokens=60), prompts)
    said = "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏" * 4
    kept = made("hello", [{"before": said}], (0, 0, 0)).removeprefix("Previous text: ")
    assert len(kept) > 5
    assert said.endswith(kept)


def test_packed_clips_share_the_words_of_all_and_the_previous_text_of_the_first(prompts):
    config = ContextConfig(words_field="names", previous_text_field="before", fraction=1, true_word_fraction=1)
    fields = [{"names": ["Siobhan"], "before": "first"}, {"names": ["Zürich", "Ngozi"], "before": "second"}]
    context = made_by(config, prompts)(TEXT, fields, (0, 0, 0))
    assert set(listed(context)) == {"Siobhan", "Zürich", "Ngozi"}
    assert context.startswith("Previous text: first\n")


def test_a_true_word_of_both_lists_is_drawn_once(words_file, prompts):
    made = contexts(words_file, prompts, words_field="names", true_word_fraction=0.5, max_distractors=0)
    contexts_made = [made(TEXT, [{"names": ["SIOBHAN"]}], (0, 0, key)) for key in range(400)]
    assert 160 < sum("siobhan" in context.lower() for context in contexts_made) < 240


@pytest.mark.parametrize("names", [["Siobhan", "Ngozi"], "Siobhan, Ngozi"])
def test_words_of_the_utterance_itself_are_true_words_or_distractors(prompts, names):
    made = made_by(ContextConfig(words_field="names", fraction=1, true_word_fraction=0), prompts)
    assert listed(made(TEXT, [{"names": names}], (0, 0, 0))) == ["Ngozi"]
    made = made_by(ContextConfig(words_field="names", fraction=1, true_word_fraction=1), prompts)
    assert set(listed(made(TEXT, [{"names": names}], (0, 0, 0)))) == {"Siobhan", "Ngozi"}


def test_contexts_of_a_test_set_have_all_true_words_and_grow_into_each_other(words_file):
    words = WordList.read(words_file, "words")
    for utterance_id in range(20):
        lists = {size: listed(ContextsOfTests(words, size, 50)(TEXT, [{}], (utterance_id,))) for size in (0, 5, 50)}
        assert set(lists[0]) == TRUE
        assert {size: len(found) for size, found in lists.items()} == {0: 3, 5: 8, 50: 53}
        assert set(lists[0]) < set(lists[5]) < set(lists[50])
    everything = ContextsOfTests(words, 10_000, 10_000)(TEXT, [{}], (0,))
    assert set(listed(everything)) == set(words.entries) - {"Petersburg"}


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [(None, "No such file"), (b"\n ... \n", "contains no words"), (b"\xff\xfe\x00", "is not UTF-8")],
)
def test_a_file_of_words_that_cannot_be_used_is_one_sentence(tmp_path, prompts, contents, sentence):
    if contents is not None:
        (tmp_path / "words.txt").write_bytes(contents)
    with pytest.raises(UserError, match=f"`train_data.context.words`: .*{sentence}"):
        contexts(tmp_path / "words.txt", prompts)
