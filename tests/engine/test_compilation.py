"""`model.compile_blocks`: where blocks are compiled, what is refused, and one graph for all lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule

from voxtral_dist.config import LoraConfig, ModelConfig, RunConfig, TrainableConfig
from voxtral_dist.distributed.process_settings import set_compile_cache
from voxtral_dist.distributed.world import World
from voxtral_dist.engine import compilation
from voxtral_dist.engine.build import check_engine
from voxtral_dist.engine.compilation import gains_by_compilation, with_chosen_compilation
from voxtral_dist.errors import UserError
from voxtral_dist.model import nf4
from voxtral_dist.model.quantized_linear import QuantizedLinear
from voxtral_dist.model.weights import load_voxtral

from runs import run_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FSDP2 = {"fsdp2": {}}
QUANTIZED, DORA = {"lora": {"quantized": ["language_model"]}}, {"lora": {"use_dora": True}}


def zero(stage: int) -> dict[str, Any]:
    return {"deepspeed": Path(f"ds_configs/zero{stage}.json")}


def run_with(engine: dict[str, Any], trainable: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    run = run_config(Path("runs/x"), Path("models/x"), Path("shards/x"), num_steps=3)
    tree = run.model_dump() | {"engine": engine, "trainable": trainable or {}}
    return RunConfig.model_validate(tree | {"model": tree["model"] | model})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> World:
    """A rank with a GPU on a machine that has all that compilation needs."""
    monkeypatch.setattr(compilation, "find_spec", lambda name: object())
    monkeypatch.setattr(compilation, "has_python_header", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setenv("CC", "gcc")
    return World(0, 1, 0, CUDA)


@pytest.mark.parametrize(
    ("engine", "trainable", "is_compiled"),
    [
        (FSDP2, {}, True),
        (zero(1), {}, True),
        (zero(2), {"lora": {}}, True),
        (zero(0), {}, False),
        (zero(3), {}, False),
        (FSDP2, DORA, False),
        (FSDP2, QUANTIZED, False),
    ],
)
def test_blocks_are_compiled_by_default_on_gpus_where_that_wins(
    gpu: World, engine: dict[str, Any], trainable: dict[str, Any], is_compiled: bool
) -> None:
    run = run_with(engine, trainable)
    assert run.model.compile_blocks == "auto"
    assert gains_by_compilation(run) is is_compiled
    assert with_chosen_compilation(run, gpu).model.compile_blocks is is_compiled
    assert with_chosen_compilation(run, World(0, 1, 0, CPU)).model.compile_blocks is False


LACKS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "triton": (lambda patch: patch.setattr(compilation, "find_spec", lambda name: None), "the package triton"),
    "compiler": (
        lambda patch: (patch.delenv("CC"), patch.setattr(compilation.shutil, "which", lambda name: None)),  # type: ignore[func-returns-value]
        "no C compiler",
    ),
    "header": (lambda patch: patch.setattr(compilation, "has_python_header", lambda: False), "no Python.h"),
    "generation": (
        lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1)),
        "Triton does not support a GPU",
    ),
}


@pytest.mark.parametrize(("remove", "sentence"), LACKS.values(), ids=LACKS)
def test_auto_does_without_a_compiler_and_true_is_refused_at_the_start(
    gpu: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    remove: Callable[[pytest.MonkeyPatch], None],
    sentence: str,
) -> None:
    check_engine(run_with(FSDP2, compile_blocks=True), 1, CUDA)
    remove(monkeypatch)
    assert with_chosen_compilation(run_with(FSDP2), gpu).model.compile_blocks is False
    assert len(caplog.records) == 1
    assert sentence in caplog.text
    check_engine(run_with(FSDP2), 1, CUDA)
    with pytest.raises(UserError, match=sentence):
        check_engine(run_with(FSDP2, compile_blocks=True), 1, CUDA)
    tree = run_with(FSDP2).model_dump()
    low_memory = tree | {"optimizer": tree["optimizer"] | {"algorithm": "adamw_8bit"}}
    with pytest.raises(UserError, match=sentence):
        check_engine(RunConfig.model_validate(low_memory), 1, CUDA)


@pytest.mark.parametrize(
    ("engine", "trainable", "sentence"),
    [(zero(3), {}, "ZeRO-3 gathers"), (FSDP2, DORA, "use_dora"), (zero(2), QUANTIZED, "quantized` once and keep it")],
)
def test_blocks_that_cannot_be_compiled_are_refused(
    engine: dict[str, Any], trainable: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        check_engine(run_with(engine, trainable, compile_blocks=True))


def test_compiled_code_is_kept_beside_cached_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    set_compile_cache(None)
    assert "TORCHINDUCTOR_CACHE_DIR" not in compilation.os.environ
    set_compile_cache(tmp_path)
    assert compilation.os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "torch-compile")
    set_compile_cache(tmp_path / "other")
    assert compilation.os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "torch-compile")


def num_graphs_of(model: Any, sizes: list[tuple[int, int]]) -> list[int]:
    """Train on batches of so many examples and words; the number of graphs after each."""
    num_positions = model.config.audio_config.max_source_positions
    num_audio = num_positions // 4
    found = []
    for num_examples, words in sizes:
        prompt = [1, 3, 25, *[model.config.audio_token_id] * num_audio, 4, 34]
        rows = torch.tensor([prompt + [300] * words] * num_examples)
        starts = torch.arange(num_examples)[:, None] * rows.shape[1]
        loss = model(
            input_ids=rows,
            input_features=torch.ones(num_examples, 128, 2 * num_positions),
            audio_places=(starts + torch.arange(3, 3 + num_audio)).flatten(),
            target_ids=torch.full((num_examples,), 301),
            target_places=starts.flatten() + len(prompt),
            chunk_tokens=8,
        )
        loss.backward()
        found.append(counters["stats"]["unique_graphs"])
    return found


@pytest.mark.parametrize(
    ("settings", "trainable", "most_graphs"),
    [
        pytest.param({}, TrainableConfig(), 2, id="all weights", marks=pytest.mark.slow),
        pytest.param(
            {"activation_checkpointing": {"encoder": 2, "language_model": 2}}, TrainableConfig(), 2, id="both"
        ),
        pytest.param({}, TrainableConfig(lora=LoraConfig(rank=2)), 3, id="LoRA", marks=pytest.mark.slow),
        pytest.param({"float8": "rowwise_emulated"}, TrainableConfig(), 2, id="float8", marks=pytest.mark.slow),
        pytest.param(
            {"mlp_chunk_tokens": 16, "attention": "eager"},
            TrainableConfig(),
            3,
            id="chunks of MLPs",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_lengths_do_not_recompile(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    trainable: TrainableConfig,
    most_graphs: int,
) -> None:
    """Of each kind of block one graph serves all lengths and numbers of examples, but for a single example."""
    if "float8" in settings:
        pytest.importorskip("torchao")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    model = load_voxtral(
        ModelConfig.model_validate(
            {"path": str(tiny_model), "precision": "float32", "compile_blocks": True, **settings}
        ),
        trainable,
    )
    several = num_graphs_of(model, [(2, 3), (3, 4), (4, 9), (2, 40), (5, 17)])
    assert set(several) == {most_graphs}
    single = num_graphs_of(model, [(1, 3), (1, 8), (3, 5), (1, 30)])
    assert single[0] == single[-1] <= 2 * most_graphs + 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_compiler_would_keep_dequantized_matrices() -> None:
    """The reason for which quantized matrices are not compiled: equal operations are computed once, and kept."""
    kept: list[tuple[int, ...]] = []

    def forward_graph(graph: GraphModule, _: Any) -> Any:
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        kept.extend(tuple(node.meta["val"].shape) for node in outputs[1:] if hasattr(node.meta["val"], "shape"))
        return make_boxed_func(graph.forward)

    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(
        fw_compiler=forward_graph,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    plain = torch.nn.Linear(128, 256, bias=False)
    layer = QuantizedLinear(plain)
    layer.weight = torch.nn.Parameter(nf4.quantized(plain.weight.detach()), requires_grad=False)
    compiled = torch.compile(lambda states: layer(2 * states).tanh(), backend=backend, fullgraph=True)
    compiled(torch.randn(8, 128, requires_grad=True)).sum().backward()
    assert (256, 128) in kept
