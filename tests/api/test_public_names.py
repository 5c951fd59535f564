"""The names of `import voxtral_dist`: light, documented, and with examples that run."""

import ast
import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import voxtral_dist


class PrintsAllowed(doctest.OutputChecker):
    """Compares the output of examples that show some: what training prints is no part of its example."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def test_importing_the_package_imports_no_library():
    code = "import sys, voxtral_dist; voxtral_dist.__all__; dir(voxtral_dist); print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "transformers", "pydantic", "deepspeed"} & set(ended.stdout.split())


def test_scoring_imports_no_torch():
    code = "import sys, voxtral_dist; voxtral_dist.word_errors(['one'], ['two']); print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in ended.stdout.split()


def test_editors_see_the_names_that_are_imported_lazily():
    (block,) = (
        node
        for node in ast.parse(Path(voxtral_dist.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If)
    )
    seen = {
        (f"{statement.module}", alias.name)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == {(f"voxtral_dist.{module}", name) for name, module in voxtral_dist._MODULE_OF_NAME.items()}
    assert {name for _, name in seen} == set(voxtral_dist.__all__)
    assert set(voxtral_dist.__all__) <= set(dir(voxtral_dist))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'voxtral_dist' has no attribute 'nothing'"):
        _ = voxtral_dist.nothing


@pytest.mark.parametrize("name", voxtral_dist.__all__)
def test_a_public_name_is_documented_with_an_example(name):
    documentation = inspect.getdoc(getattr(voxtral_dist, name)) or ""
    assert documentation.splitlines()[0].endswith((".", ":"))
    _, _, example = documentation.partition("\nExample:\n")
    assert ">>> " in example, f"{name} has no Example section"


@pytest.mark.parametrize("name", voxtral_dist.__all__)
def test_the_examples_of_a_public_name_run(name, in_workspace, capsys):
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner(PrintsAllowed(), optionflags=doctest.ELLIPSIS)
    for example in finder.find(getattr(voxtral_dist, name), name):
        # Each starts without a name, as a reader would.
        example.globs = {}
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out


def test_a_verb_can_be_called_again_after_a_mistake(in_workspace):
    for _ in range(2):
        with pytest.raises(voxtral_dist.UserError, match="nowhere"):
            voxtral_dist.evaluate_model("models/nowhere", "shards/speech")
    assert not dist.is_initialized()


def test_a_checkpoint_and_the_export_of_a_run_transcribe_alike(in_workspace):
    config = voxtral_dist.load_config(Path("run.yaml"), ["run_dir=runs/second", "num_steps=1"])
    assert voxtral_dist.train_model(config) == 0
    (checkpoint,) = Path("runs/second/checkpoints").glob("step-*")
    texts = [
        voxtral_dist.Transcriber.from_pretrained(str(path)).transcribe(["audio/0_000.flac"], "en")
        for path in (checkpoint, "runs/second/export")
    ]
    assert texts[0] == texts[1] != [""]
