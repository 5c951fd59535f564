"""Hugging Face's trainers with our collator, metrics and generation: the same ids, loss and word errors as our own."""

import io
import math

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    VoxtralForConditionalGeneration,
)

from voxtral_dist import (
    LogMel,
    LossOfMicroBatch,
    ShardDataset,
    Transcriber,
    TranscriptionCollator,
    TranscriptionEvaluationMixin,
    TranscriptionTrainer,
    UserError,
    UtteranceReader,
    VoxtralPrompts,
    WordErrorMetrics,
    collate,
    evaluate_model,
    load_voxtral,
    word_errors,
)
from voxtral_dist.config import EvaluationConfig, ModelConfig
from voxtral_dist.evaluate import EvaluationOptions
from voxtral_dist.huggingface.prompt_batches import prompts_of

from corpora import tone

CPU = torch.device("cpu")


@pytest.fixture
def collator(in_workspace) -> TranscriptionCollator:
    return TranscriptionCollator.from_pretrained("models/tiny")


@pytest.fixture
def rows(in_workspace) -> ShardDataset:
    return ShardDataset("shards/speech")


def own_batch(prompts: VoxtralPrompts, rows: ShardDataset, numbers: list[int]):
    reader = UtteranceReader(rows.index, prompts, None)
    return collate([reader.example(number) for number in numbers], prompts)


def test_a_batch_has_the_ids_and_the_features_of_our_own(collator, rows):
    numbers = list(range(len(rows)))
    batch = collator([rows[number] for number in numbers])
    own = own_batch(collator.prompts, rows, numbers)
    # Ours lacks the last `</s>`, which predicts nothing.
    for row, mask, own_row, length in zip(
        batch["input_ids"], batch["attention_mask"], own.input_ids, own.positions_per_example, strict=True
    ):
        assert row[mask == 1].tolist() == [*own_row[:length].tolist(), collator.prompts.eos_id]
    features = LogMel.from_pretrained("models/tiny", CPU)(own.pcm, own.windows_per_example)
    assert torch.equal(batch["input_features"], features)


def test_labels_mask_everything_but_the_completion(collator, rows):
    batch = collator(list(rows))
    for ids, labels, row in zip(batch["input_ids"], batch["labels"], rows, strict=True):
        completion = collator.prompts.completion(row["text"])
        assert labels[labels != -100].tolist() == completion
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        assert (labels[: -len(completion)] == -100).all()


@pytest.mark.parametrize(
    ("kind", "batch_size", "smoothing"),
    [(Trainer, 1, 0.0), (Trainer, 3, 0.0), (TranscriptionTrainer, 1, 0.0), (TranscriptionTrainer, 3, 0.1)],
)
def test_a_step_of_hugging_faces_trainer_has_our_loss(collator, rows, tmp_path, kind, batch_size, smoothing):
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        label_smoothing_factor=smoothing,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        max_steps=1,
        logging_steps=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    model = VoxtralForConditionalGeneration.from_pretrained("models/tiny", dtype=torch.float32)
    trainer = kind(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    (loss,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    own = own_batch(collator.prompts, rows, list(range(2 * batch_size)))
    own_model = load_voxtral(ModelConfig(path="models/tiny", precision="float32"))
    own_sum = LossOfMicroBatch(LogMel.from_pretrained("models/tiny", CPU), 512, smoothing)(own_model, own)
    assert loss == pytest.approx(own_sum.item() / own.num_target_tokens, abs=1e-6)


def test_rows_of_a_dataset_are_taken_in_every_form_of_audio(collator):
    pcm = tone(1.0)
    wav = io.BytesIO()
    soundfile.write(wav, pcm, 16_000, format="WAV", subtype="PCM_16")
    soundfile.write("one.flac", pcm, 16_000, subtype="PCM_16")
    encoded = datasets.Dataset.from_dict(
        {"audio": [{"bytes": wav.getvalue(), "path": None}, {"bytes": None, "path": "one.flac"}], "text": ["one"] * 2}
    ).cast_column("audio", datasets.Audio(decode=False))
    array = {"audio": {"array": pcm / np.float32(32768), "sampling_rate": 16_000}, "text": "one"}
    forms = [*encoded, array, {"audio": "one.flac", "text": "one"}, {"audio": pcm, "text": "one", "language": None}]
    batches = [collator([form]) for form in forms]
    for batch in batches[1:]:
        assert all(torch.equal(batch[name], batches[0][name]) for name in batch)
    at_8_khz = collator([{"audio": {"array": tone(1.0, 8_000), "sampling_rate": 8_000}, "text": "one"}])
    assert at_8_khz["input_features"].shape == batches[0]["input_features"].shape


class Decoder:
    """What `datasets` gives of an audio column where torchcodec is installed."""

    def get_all_samples(self):
        raise AssertionError("the mono array is asked for")

    def __getitem__(self, key):
        return {"array": tone(1.0, 8_000) / np.float32(32768), "sampling_rate": 8_000}[key]


def test_decoders_of_a_dataset_are_arrays(collator):
    array = {"array": tone(1.0, 8_000), "sampling_rate": 8_000}
    decoded, expected = (collator([{"audio": audio, "text": "one"}]) for audio in (Decoder(), array))
    assert torch.equal(decoded["input_features"], expected["input_features"])


def test_a_language_is_taken_as_corpora_write_it(collator):
    def ids(language):
        return collator([{"audio": tone(0.5), "text": "um", "language": language}])["input_ids"].tolist()

    assert ids("pt") == ids("pt-BR") == ids("Portuguese") != ids(None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "one"}, "no column `audio`, only 'text': set `remove_unused_columns=False`"),
        ({"audio": tone(0.5), "text": None}, "The column `text` must hold texts, but holds None"),
        ({"audio": tone(0.5), "text": "nuqneH", "language": "klingon"}, "text 'nuqneH' has the language 'klingon'"),
        ({"audio": np.zeros((2, 8)), "text": "one"}, r"must be an array of the shape \(num_samples,\)"),
        ({"audio": np.full(8, np.nan), "text": "one"}, "contains samples that are not finite"),
        ({"audio": b"no audio", "text": "one"}, "the text 'one' does not decode"),
        ({"audio": np.zeros(16_000 * 400), "text": "one"}, "A row of 400 s .* but the model has 4096"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(collator, row, message):
    with pytest.raises(UserError, match=message):
        collator([row])


def generation_arguments(folder, **changes) -> Seq2SeqTrainingArguments:
    settings = {
        "predict_with_generate": True,
        "per_device_eval_batch_size": 3,
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": "none",
    }
    return Seq2SeqTrainingArguments(str(folder), **settings | changes)


def test_word_errors_of_the_trainer_are_those_of_our_transcripts(collator, rows, tmp_path):
    # A model with random weights never ends a transcript: both stop after 17 tokens.
    transcriber = Transcriber.from_pretrained("models/tiny", max_tokens_per_second=0.001)
    hypotheses = [transcriber.transcribe([row["audio"]], row["language"])[0] for row in rows]
    trainer = TranscriptionTrainer(
        model=VoxtralForConditionalGeneration.from_pretrained("models/tiny", dtype=torch.float32),
        args=generation_arguments(tmp_path),
        eval_dataset=list(rows),
        data_collator=collator,
        compute_metrics=WordErrorMetrics(collator.prompts),
    )
    metrics = trainer.evaluate(max_new_tokens=17)
    counts = word_errors([row["text"] for row in rows], hypotheses)
    assert (metrics["eval_num_word_errors"], metrics["eval_num_reference_words"], metrics["eval_wer"]) == (
        counts.errors,
        counts.reference_length,
        counts.rate,
    )
    # The loss is that of the whole input, as in training, however many tokens are generated.
    assert metrics["eval_loss"] == pytest.approx(trainer.evaluate(max_new_tokens=1)["eval_loss"])


def test_hugging_faces_own_evaluation_is_refused_because_it_holds_the_references(collator, rows, tmp_path):
    trainer = Seq2SeqTrainer(
        model=VoxtralForConditionalGeneration.from_pretrained("models/tiny", dtype=torch.float32),
        args=generation_arguments(tmp_path),
        eval_dataset=list(rows),
        data_collator=collator,
        compute_metrics=WordErrorMetrics(collator.prompts),
    )
    with pytest.raises(UserError, match="The predictions hold the references"):
        trainer.evaluate(max_new_tokens=8)


def filled_up(rows: list[list[int]]):
    width = max(map(len, rows))
    return np.array([[*row, *[-100] * (width - len(row))] for row in rows])


def test_metrics_sum_integers_and_skip_prompts_tags_and_what_follows_the_end(collator):
    prompts = collator.prompts
    references = ["One, two, three.", "four", "five six", ""]
    answers = ["one too three", "four", "five", "seven"]
    labels = filled_up([prompts.completion(text) for text in references])
    plain = [prompts.completion(text) for text in answers]
    expected = {"wer": 3 / 6, "num_word_errors": 3, "num_reference_words": 6}
    metrics = WordErrorMetrics(prompts)
    assert metrics(EvalPrediction(filled_up(plain), labels)) == expected
    in_other_forms = [
        [*prompts.tag("en"), *plain[0]],
        [prompts.pad_id, prompts.pad_id, *prompts.transcription("en", 2), *plain[1]],
        [*plain[2], *prompts.completion("noise after the end")],
        [*prompts.instruction("What is said?", 1), *plain[3]],
    ]
    assert metrics(EvalPrediction(filled_up(in_other_forms), labels)) == expected


def test_metrics_of_nothing_are_not_a_number_and_logits_are_refused(collator):
    metrics = WordErrorMetrics(collator.prompts, "none")
    empty = np.array([[collator.prompts.eos_id]])
    assert math.isnan(metrics(EvalPrediction(empty, empty))["wer"])
    with pytest.raises(UserError, match=r"generated ids of the shape \(N, L\)"):
        metrics(EvalPrediction(np.zeros((1, 2, 3)), empty))


class OwnTrainer(TranscriptionEvaluationMixin, Seq2SeqTrainer):
    """A trainer of a user, with a collator that is a plain function."""


def padded_on_the_right(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of another collator: the padding is moved to the other side."""
    moved = batch | {name: batch[name].clone() for name in ("input_ids", "attention_mask", "labels")}
    for row, mask in enumerate(batch["attention_mask"] == 1):
        for name in ("input_ids", "attention_mask", "labels"):
            moved[name][row] = torch.cat([batch[name][row, mask], batch[name][row, ~mask]])
    return moved


def test_a_trainer_of_ones_own_has_the_word_errors_of_our_evaluator(collator, rows, tmp_path):
    settings = EvaluationConfig(max_tokens_per_second=0.001)
    options = EvaluationOptions(settings)
    result = evaluate_model("models/tiny", "shards/speech", out_dir=tmp_path / "own", options=options)["speech"]
    OwnTrainer.prompts = collator.prompts
    trainer = OwnTrainer(
        model=VoxtralForConditionalGeneration.from_pretrained("models/tiny", dtype=torch.float32),
        args=generation_arguments(tmp_path / "trainer"),
        eval_dataset=list(rows),
        data_collator=lambda some: padded_on_the_right(collator(some)),
        compute_metrics=WordErrorMetrics(collator.prompts),
    )
    # The limit of the evaluator for every utterance: 16 and the 0.001 tokens of a second, rounded up.
    metrics = trainer.evaluate(max_new_tokens=17)
    assert metrics["eval_wer"] == result.normalized.wer
    assert metrics["eval_num_word_errors"] == result.normalized.words.errors
    assert metrics["eval_num_reference_words"] == result.normalized.words.reference_length > 0


def test_prompts_are_needed_and_labels_on_them_refused(collator, rows, tmp_path):
    model = VoxtralForConditionalGeneration.from_pretrained("models/tiny")
    with pytest.raises(UserError, match="TranscriptionTrainer needs the attribute `prompts`"):
        TranscriptionTrainer(model=model, args=generation_arguments(tmp_path), data_collator=list)
    batch = collator([rows[0]])
    with pytest.raises(UserError, match="has labels on its prompts, so that there is nothing to generate from"):
        prompts_of(batch | {"labels": batch["input_ids"]}, collator.prompts.pad_id)
