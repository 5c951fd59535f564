"""The model card of an export: metadata that the hub reads, and what people need to judge and to serve the model.

Its numbers come from the stored results of the run. It names no file or folder of the machine that trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from voxtral_dist.config import CardConfig, ErrorRate, RunConfig
from voxtral_dist.exports.layouts import ADAPTER_LAYOUTS, ExportLayout
from voxtral_dist.hub.base_model import hub_name
from voxtral_dist.hub.public_settings import public_settings
from voxtral_dist.hub.result_tables import results_table, slice_sections
from voxtral_dist.hub.trained_run import Measured, TrainedRun
from voxtral_dist.output.counting import counted
from voxtral_dist.reporting.markdown import plain
from voxtral_dist.reporting.run_facts import listed, trained_parameters
from voxtral_dist.scoring.error_rates import ErrorRates
from voxtral_dist.scoring.tables import format_audio
from voxtral_dist.training.versions import package_versions

_TASK = "automatic-speech-recognition"
_LIBRARIES: dict[ExportLayout, str] = {"hf": "transformers", "mistral": "vllm", "peft": "peft", "vllm-lora": "peft"}
_KINDS: dict[ExportLayout, str] = {
    "hf": "the full model in the layout of transformers",
    "mistral": "the full model in Mistral's native layout, which vLLM loads",
    "peft": "adapters alone, for peft",
    "vllm-lora": "adapters alone, in the names that vLLM finds",
}
# Ranks that vLLM's `--max-lora-rank` accepts.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class CardSubject:
    """What a card is about.

    layout, precision: of the export. base_path: the initial model of the run, or the folder or hub name that was
    converted without a run. repository: the name on the hub, if it is pushed. run: None where it is not known.
    """

    layout: ExportLayout
    precision: str
    base_path: str
    settings: CardConfig = field(default_factory=CardConfig)
    repository: str | None = None
    run: TrainedRun | None = None

    @property
    def base(self) -> str | None:
        """The name of the base model on the hub, if it is known."""
        return self.settings.base_model or hub_name(self.base_path)

    @property
    def is_adapter(self) -> bool:
        """Whether the export holds adapters alone."""
        return self.layout in ADAPTER_LAYOUTS

    @property
    def title(self) -> str:
        """The heading of the card, which names the model in its results too."""
        if self.repository is not None:
            return self.repository.partition("/")[2]
        name = self.base.partition("/")[2] if self.base else "Voxtral"
        return name if self.run is None else f"{name}, fine-tuned"


def model_card(subject: CardSubject) -> str:
    """The text of `README.md`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    body = environment.get_template("model_card.md").render(
        subject=subject,
        kind=_KINDS[subject.layout],
        base=_linked(subject.base) if subject.base else None,
        model=subject.repository or "FOLDER",
        language=subject.run.languages[0] if subject.run and subject.run.languages else "en",
        run=None if subject.run is None else _RunText(subject.run, subject),
        datasets=[_linked(name, "datasets/") for name in subject.settings.datasets],
        licenses={name: text and plain(text) for name, text in subject.settings.model_dump(include=_LICENSES).items()},
        version=package_versions().get("voxtral-dist", ""),
    )
    return str(ModelCard(f"---\n{card_data(subject).to_yaml()}\n---\n\n{body}"))


_LICENSES = {"license", "data_license"}


def card_data(subject: CardSubject) -> ModelCardData:
    """The metadata of a card. Error rates are in percent, as the hub's leaderboards have them."""
    run = subject.run
    measured = () if run is None else run.measured
    tags = ["voxtral", "voxtral-dist", "speech-recognition"]
    tags += ["lora"] if subject.is_adapter else []
    tags += ["vllm"] if subject.layout in ("mistral", "vllm-lora") else []
    relation: dict[str, Any] = {}
    if subject.base is not None and run is not None:
        relation["base_model_relation"] = "adapter" if subject.is_adapter else "finetune"
    return ModelCardData(
        base_model=subject.base,
        datasets=list(subject.settings.datasets) or None,
        language=(run.languages if run else []) or None,
        library_name=_LIBRARIES[subject.layout],
        license=subject.settings.license,
        metrics=list(get_args(ErrorRate)) if measured else None,
        pipeline_tag=_TASK,
        tags=tags,
        model_name=subject.title if measured else None,
        eval_results=[result for one in measured for result in _eval_results(one)] or None,
        **relation,
    )


def _eval_results(measured: Measured) -> Iterator[EvalResult]:
    """WER and CER of a test set, and of each language where it has several."""
    result = measured.after
    yield from _rates(measured.name, None, result.normalized, result.normalizer)
    if result.orthographic.wer is not None:
        details = {"normalizer": result.orthographic_normalizer, "num_utterances": result.orthographic.num_utterances}
        name = "WER with case and punctuation, in %"
        yield _eval_result(measured.name, None, "wer", name, result.orthographic.wer, details)
    languages = {label: part for label, part in result.slices.get("language", {}).items() if label != "unknown"}
    for label, part in languages.items() if len(languages) > 1 else ():
        yield from _rates(measured.name, label, part, result.normalizer)


def _rates(name: str, language: str | None, rates: ErrorRates, normalizer: str) -> Iterator[EvalResult]:
    details: dict[str, Any] = {"normalizer": normalizer, "num_utterances": rates.num_utterances}
    for metric in get_args(ErrorRate):
        if (rate := rates.rate(metric)) is not None:
            interval = rates.interval(metric)
            bounds = {} if interval is None else {"interval_95": [_percent(one) for one in interval]}
            yield _eval_result(name, language, metric, f"{metric.upper()}, in %", rate, details | bounds)


def _eval_result(
    name: str, language: str | None, metric: str, metric_name: str, rate: float, details: dict[str, Any]
) -> EvalResult:
    return EvalResult(
        task_type=_TASK,
        task_name="Speech recognition",
        # The hub knows a test set by this identifier; test sets are named by the user.
        dataset_type=name,
        dataset_name=name if language is None else f"{name} ({language})",
        dataset_config=language,
        metric_type=metric,
        metric_name=metric_name,
        metric_value=_percent(rate),
        metric_args=details,
    )


def _percent(rate: float) -> float:
    return round(100 * rate, 2)


def _linked(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})"


class _RunText:
    """The sentences and tables of a card that depend on its run."""

    def __init__(self, run: TrainedRun, subject: CardSubject) -> None:
        self._run = run
        self._config: RunConfig = run.config
        self._subject = subject

    @property
    def results(self) -> str:
        """The table of error rates; empty where they were not measured."""
        return "\n".join(results_table(self._run.measured)) if self._run.measured else ""

    @property
    def slices(self) -> list[str]:
        """A heading and a table for each test set and field of slices."""
        return ["\n".join(lines) for one in self._run.measured for lines in slice_sections(one)]

    @property
    def how_measured(self) -> list[str]:
        """Conditions of the measurement, one sentence each."""
        evaluation, measured = self._config.evaluation, self._run.measured
        normalizers = ", ".join(dict.fromkeys(f"`{one.after.normalizer}`" for one in measured))
        units = " or ".join(dict.fromkeys(f"{one.after.normalized.resampled}s" for one in measured))
        search = "greedy decoding" if evaluation.num_beams == 1 else f"{counted(evaluation.num_beams, 'beam')}"
        said = [
            f"Measured by the run at its step {self._run.step:,} with {search}, on weights in "
            f"{self._config.model.precision}.",
            f"Normalizer: {normalizers}. Intervals are the central 95 % of a bootstrap over {units}.",
        ]
        lora = self._config.trainable.lora
        if lora is not None and lora.quantized:
            said.append(
                f"The frozen matrices of {listed(lora.quantized)} had four bits (NF4) while they were measured, as in "
                "training; the exported adapters are applied to the unquantized weights."
            )
        if not self._subject.is_adapter and self._subject.precision != self._config.model.precision:
            said.append(f"The exported weights have another precision: {self._subject.precision}.")
        for name, one in evaluation.test_sets.items():
            if one.max_utterances is not None:
                said.append(
                    f"`{name}`: at most {counted(one.max_utterances, 'utterance', ',')}, the first ones of the set."
                )
            if one.detect_language:
                said.append(f"`{name}`: the language was not given in the prompt.")
        return said

    @property
    def data(self) -> list[str]:
        """Facts of the training data."""
        seconds, start = self._run.audio_seconds, self._run.start
        facts = []
        if seconds:
            skipped: dict[str, int] = start.get("skipped", {})
            languages = ", ".join(f"{language} {format_audio(one)}" for language, one in seconds.items())
            num_trained = start["num_utterances"] - sum(skipped.values())
            facts.append(
                f"Audio: {format_audio(sum(seconds.values()))} in {counted(num_trained, 'utterance', ',')}: {languages}"
            )
            if skipped:
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
                facts.append(f"Skipped utterances, not counted above: {reasons}")
        else:
            facts.append("Hours and languages: not recorded")
        if self._config.train_data.sets:
            facts.append(f"Shard sets: {', '.join(plain(name) for name in self._config.train_data.sets)}")
        if "num_epochs" in start:
            facts.append(f"Planned passes over the data: {start['num_epochs']:.4g}")
        return facts

    @property
    def training(self) -> list[str]:
        """Facts of the training itself."""
        config, start, optimizer = self._config, self._run.start, self._config.optimizer
        steps = f"{self._run.step:,}" + (f" of {start['num_steps']:,}" if "num_steps" in start else "")
        facts = [f"Optimizer updates: {steps}", f"Trained parameters: {trained_parameters(config)}"]
        if self._run.averages and optimizer.ema_decay is not None:
            facts.append(f"Moving averages of the weights: decay {optimizer.ema_decay:g}")
        facts.append(f"Optimizer: {optimizer.algorithm}, peak learning rate {optimizer.learning_rate:g}")
        if "engine" in start:
            facts.append(f"Engine: {start['engine']} on {start['world_size']} × {plain(start['device'])}")
        if "versions" in start:
            versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
            facts.append(f"Versions: {versions}")
        return facts

    @property
    def settings(self) -> str:
        """The configuration as YAML, without locations."""
        return yaml.safe_dump(public_settings(self._config), sort_keys=False, allow_unicode=True)

    @property
    def vllm_rank(self) -> int | None:
        """The smallest value of vLLM's `--max-lora-rank` that fits the adapters."""
        lora = self._config.trainable.lora
        return None if lora is None else next((rank for rank in _VLLM_RANKS if rank >= lora.rank), lora.rank)
