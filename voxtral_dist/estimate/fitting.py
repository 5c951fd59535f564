"""The recipes of the package that fit a machine, each with the largest micro-batches, and how fast they are there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from voxtral_dist.config import RunConfig, load_config, recipes
from voxtral_dist.estimate.checkpointing import USABLE_FRACTION, estimator_with_chosen_checkpointing
from voxtral_dist.estimate.estimator import Estimator, Machine, ShardingRow
from voxtral_dist.estimate.quantities import gigabytes, table_lines
from voxtral_dist.estimate.sharding import configured_sharding
from voxtral_dist.estimate.times import configured_step_time
from voxtral_dist.estimate.workload import WindowSizes, Workload, largest_evaluation_batches, largest_workload
from voxtral_dist.output.counting import counted
from voxtral_dist.output.duration import duration

# What to try besides the recipes as they are: offloading less, or more.
_OTHER_ENGINES = {"voxtral_mini_offload": ("zero2_offload",), "voxtral_mini_lora": ("zero3_offload",)}
_HOURS = 100
# Beginning of the names of recipes for a published model and any data.
_GENERAL = "voxtral_"
_PREFERRED = (
    ("voxtral_mini_fsdp2", None),
    ("voxtral_mini_full", None),
    ("voxtral_mini_one_gpu", None),
    ("voxtral_mini_offload", "zero2_offload"),
    ("voxtral_mini_lora", None),
    ("voxtral_mini_qlora", None),
    ("voxtral_mini_lora", "zero3_offload"),
    ("voxtral_mini_offload", None),
)


@dataclass(frozen=True)
class Fit:
    """A recipe on a machine.

    recipe: its name. overrides: values to set, as `key=value`. row: its memory there; it fits into nine tenths of a
    GPU, because fragmentation and libraries take some. clips_per_second: windows of audio that all GPUs train on in a
    second, by the roofline; None if the GPU is not named, or where weights or states move through host memory, which
    the roofline leaves out.
    """

    recipe: str
    overrides: tuple[str, ...]
    config: RunConfig
    row: ShardingRow
    clips_per_second: float | None

    @property
    def trains(self) -> str:
        """What is trained, in a word."""
        return _trains(self.config)

    @property
    def engine_override(self) -> str | None:
        """The DeepSpeed file in place of the recipe's, if it is another one."""
        return next((one.partition("=")[2] for one in self.overrides if one.startswith("engine.deepspeed")), None)

    def to_json(self) -> dict[str, Any]:
        """The recipe in plain types; sizes in bytes."""
        return {
            "recipe": self.recipe,
            "overrides": list(self.overrides),
            "trains": self.trains,
            "max_windows": self.config.train_data.max_windows,
            "memory": asdict(self.row),
            "clips_per_second": self.clips_per_second,
        }


def fitting_recipes(machine: Machine, on_progress: Callable[[int, int], None] = lambda *_: None) -> list[Fit]:
    """Recipes of the published models on a machine: first those that fit, the fastest first.

    Where a recipe does not fit as it is, its micro-batches and decoded batches are halved until it does. The batch of a
    step stays that of the recipe, as long as every GPU has a micro-batch. Larger micro-batches than the recipe's are
    not tried: by the roofline they gain 1 to 2 %. Shards are not looked for: batches are the largest that the settings
    allow. `on_progress` is called with the number of recipes looked at, and of all.
    """
    found = list(_fits(machine, on_progress))

    def order(fit: Fit) -> tuple[bool, bool, float, float]:
        return not fit.row.fits, fit.clips_per_second is None, -(fit.clips_per_second or 0), fit.row.device_bytes

    return sorted(found, key=order)


def preferred_fit(machine: Machine, trains: Collection[str] = ()) -> Fit | None:
    """The recipe of Voxtral-Mini that a newcomer should take: all weights before adapters, the GPU before host memory.

    Each takes seconds, so they are estimated in this order until one fits. Recipes that move weights or states through
    host memory are for machines with a known one.

    Args:
        machine: that the run is to start on.
        trains: what may be trained, in words of `Fit.trains`; anything if there are none.
    """
    paths = recipes()
    estimators: dict[str, Estimator] = {}
    for name, engine in _PREFERRED:
        if name not in paths:
            continue
        config = load_config(paths[name], _overrides(engine))
        if (trains and _trains(config) not in trains) or (machine.host_memory is None and _uses_host(config)):
            continue
        if name not in estimators:
            estimators[name] = Estimator(load_config(paths[name]), machine, _largest)
        fit = _RecipeFitter(name, _overrides(engine), estimators[name]).best()
        if fit.row.fits:
            return fit
    return None


def lines_of_fits(fits: Sequence[Fit], machine: Machine) -> Iterator[str]:
    """The recipes as text for a terminal."""
    number = counted(machine.num_gpus, machine.gpu.name if machine.gpu else "GPU")
    limit = "" if machine.gpu_memory is None else f" of {gigabytes(machine.gpu_memory)}"
    heads = ("recipe", "fits", "trains", "max_windows", "per GPU", "host, per node", "clips/s", f"{_HOURS} h of audio")
    yield f"Recipes on {number}{limit}, with their own micro-batches, or the largest smaller ones that fit:"
    yield from table_lines(heads, [_cells(fit) for fit in fits])
    yield ""
    yield (
        "Estimates (docs/planning.md), not yet measured on a GPU. Clips of 30 s by a roofline, without communication; "
        "not for recipes that move weights or states through host memory."
    )
    if fits and fits[0].row.fits:
        options = "".join(f" --set {one}" for one in fits[0].overrides)
        yield f"In full: voxtral-dist plan --config {fits[0].recipe}{options}"


def _cells(fit: Fit) -> tuple[str, ...]:
    speed, hours = "-", "-"
    if fit.clips_per_second is not None:
        speed, hours = f"{fit.clips_per_second:.1f}", duration(_HOURS * 120 / fit.clips_per_second)
    engine = fit.engine_override
    return (
        f"{fit.recipe} ({engine})" if engine else fit.recipe,
        {True: "yes", False: "no", None: "-"}[fit.row.fits],
        fit.trains,
        str(fit.config.train_data.max_windows),
        gigabytes(fit.row.device_bytes),
        gigabytes(fit.row.host_bytes_of_node),
        speed,
        hours,
    )


def _fits(machine: Machine, on_progress: Callable[[int, int], None]) -> Iterator[Fit]:
    # Others train a tiny model, or are one of these for a public corpus.
    general = {name: path for name, path in recipes().items() if name.startswith(_GENERAL)}
    for number, (name, path) in enumerate(general.items()):
        on_progress(number, len(general))
        estimator = Estimator(load_config(path), machine, _largest)
        for engine in (None, *_OTHER_ENGINES.get(name, ())):
            yield _RecipeFitter(name, _overrides(engine), estimator).best()


def _overrides(engine: str | None) -> tuple[str, ...]:
    return () if engine is None else (f"engine.deepspeed={engine}",)


def _trains(config: RunConfig) -> str:
    lora = config.trainable.lora
    if lora is None:
        return "all weights"
    return "LoRA beside 4 bits" if lora.quantized else "LoRA"


def _uses_host(config: RunConfig) -> bool:
    """Whether weights or states pass through host memory in every step."""
    return configured_sharding(config.engine, 1).uses_host


class _RecipeFitter:
    """Finds the largest batches of a recipe that fit."""

    def __init__(self, name: str, overrides: tuple[str, ...], estimator: Estimator) -> None:
        self._name, self._overrides, self._estimator = name, overrides, estimator
        self._config = load_config(recipes()[name], overrides)
        self._sharding = configured_sharding(self._config.engine, estimator.machine.num_gpus)
        self._variants: dict[tuple[int, int], tuple[Estimator, ShardingRow]] = {}

    def best(self) -> Fit:
        """The recipe with its own batches or the largest smaller ones that fit; with the smallest if none fit."""
        windows, decoded = self._config.train_data.max_windows, self._config.evaluation.batch_size
        assert windows is not None, "all recipes of published models limit windows"
        if self._variant(windows, decoded)[1].fits is False:
            windows = self._largest_that_fits(windows, lambda size: (size, 1))
            decoded = self._largest_that_fits(decoded, lambda size: (windows, size))
        variant, row = self._variant(windows, decoded)
        gpu, speed = self._estimator.machine.gpu, None
        if row.fits and gpu and not self._sharding.uses_host:
            speed = configured_step_time(variant, self._sharding, gpu).clips_per_second
        return Fit(self._name, self._with(windows, decoded), variant.config, row, speed)

    def _largest_that_fits(self, most: int, sizes: Callable[[int], tuple[int, int]]) -> int:
        """The first of `most` and its halves that fits; 1 if none does."""
        while most > 1 and self._variant(*sizes(most))[1].fits is False:
            most //= 2
        return most

    def _with(self, windows: int, decoded: int) -> tuple[str, ...]:
        """All overrides: those of sizes are given where they change something."""
        data, ranks = self._config.train_data, self._estimator.machine.num_gpus
        assert data.max_windows is not None
        slots = -(-data.slots_per_step * data.max_windows // (windows * ranks)) * ranks
        wanted = {
            "train_data.max_windows": (windows, data.max_windows),
            "train_data.slots_per_step": (slots, data.slots_per_step),
            "evaluation.batch_size": (decoded, self._config.evaluation.batch_size),
        }
        sizes = (f"{key}={value}" for key, (value, before) in wanted.items() if value != before)
        return (*self._overrides, *sizes)

    def _variant(self, windows: int, decoded: int) -> tuple[Estimator, ShardingRow]:
        """The recipe with these sizes and its memory; estimated once, because that takes seconds."""
        if (windows, decoded) not in self._variants:
            self._variants[windows, decoded] = self._estimated(windows, decoded)
        return self._variants[windows, decoded]

    def _estimated(self, windows: int, decoded: int) -> tuple[Estimator, ShardingRow]:
        config = load_config(recipes()[self._name], self._with(windows, decoded))
        variant = self._estimator.with_workload(config, _largest(config, self._estimator.window_sizes))
        variant, _ = estimator_with_chosen_checkpointing(variant, self._sharding)
        memory = self._estimator.machine.gpu_memory
        (shape,) = variant.workload.candidates
        row = variant.row(variant.estimate(self._sharding, shape))
        if memory is not None and row.device_bytes > USABLE_FRACTION * memory:
            row = replace(row, fits=False)
        return variant, row


def _largest(config: RunConfig, sizes: WindowSizes) -> Workload:
    return replace(largest_workload(config, sizes), evaluation=largest_evaluation_batches(config, sizes))
