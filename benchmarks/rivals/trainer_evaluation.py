"""One rank of Hugging Face's `Seq2SeqTrainer`, generating the transcripts of a request's utterances.

    torchrun benchmarks/rivals/trainer_evaluation.py REQUEST

`predict` is the loop of `evaluate` with `predict_with_generate`, and also hands the tokens out. Prompts and features
come from the collator of published scripts, left-padded; with references beside them the trainer would compute its loss
on prompts, so there are none. DeepSpeed's file is that of ours.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, VoxtralForConditionalGeneration, VoxtralProcessor

from rivals.trainer_voxtral import filled_up
from rivals.training_runs import TrainingRun
from workloads.answers import answering_failures, write_answer
from workloads.speech import SAMPLING_RATE


def main() -> None:
    """Generate, and write the answer."""
    run = TrainingRun.read(Path(sys.argv[1]))
    rank = int(os.environ.get("RANK", "0"))
    with answering_failures(run.answer_path(rank)):
        write_answer(run.answer_path(rank), _generate(run, rank))


def _generate(run: TrainingRun, rank: int) -> dict[str, Any]:
    arguments = _arguments(run)
    processor = VoxtralProcessor.from_pretrained(run.model)
    processor.tokenizer.padding_side = "left"
    model = VoxtralForConditionalGeneration.from_pretrained(run.model, dtype=torch.float32)
    trainer = Seq2SeqTrainer(model=model, args=arguments, data_collator=_Prompts(processor, run.model))
    utterances: Any = [vars(one) for one in run.utterances]
    # The first batch shards the model.
    trainer.predict(utterances[: run.world_size], max_new_tokens=1)
    dist.barrier()
    started, cores_started = time.perf_counter(), time.process_time()
    found = trainer.predict(utterances, max_new_tokens=run.max_new_tokens, do_sample=False, num_beams=1)
    ids = torch.as_tensor(found.predictions)
    # Where the trainer pads tokens of several batches to one width.
    ids = ids.masked_fill(ids < 0, processor.tokenizer.pad_token_id)
    texts = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    answer: dict[str, Any] = {
        "seconds": time.perf_counter() - started,
        "core_seconds": time.process_time() - cores_started,
    }
    # It fills the last batches of ranks up with the first utterances again, and gives those a second time.
    repeated = {"num_repeated_utterances": len(texts) - len(utterances)}
    return answer | ({"hypotheses": texts[: len(utterances)], **repeated} if rank == 0 else {})


def _arguments(run: TrainingRun) -> Seq2SeqTrainingArguments:
    assert run.deepspeed is not None
    return Seq2SeqTrainingArguments(
        output_dir=str(run.folder / "trainer"),
        per_device_eval_batch_size=run.batch_size,
        predict_with_generate=True,
        use_cpu=True,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        deepspeed=filled_up(run.deepspeed),
    )


class _Prompts:
    """Collator that reads the audio of a batch and builds its transcription requests."""

    def __init__(self, processor: VoxtralProcessor, model: str) -> None:
        self._processor = processor
        self._model = model

    def __call__(self, utterances: Sequence[dict[str, str]]) -> dict[str, Tensor]:
        waveforms = [soundfile.read(one["audio"], dtype="float32")[0] for one in utterances]
        asked = self._processor.apply_transcription_request(
            language=["en"] * len(waveforms),
            audio=waveforms,
            model_id=self._model,
            sampling_rate=SAMPLING_RATE,
            format=["WAV"] * len(waveforms),
            return_tensors="pt",
        )
        return {name: asked[name] for name in ("input_ids", "attention_mask", "input_features")}


if __name__ == "__main__":
    main()
