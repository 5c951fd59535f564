"""`voxtral-dist train`: a mistake in a configuration is one sentence, before anything of the run is made."""

import pytest
import yaml

from voxtral_dist.config import load_config


def test_train_without_a_configuration(run):
    assert "pass `--config FILE`" in run("train").refusal()


@pytest.mark.parametrize("option", ["--config={recipe}", "--local_rank=0 --config {recipe}"])
def test_print_config_prints_what_loads_back(run, recipe, tmp_path, option):
    arguments = option.format(recipe=recipe).split()
    result = run("train", *arguments, "--print-config", "--set", "seed=5", "--set", "optimizer.learning_rate=3e-5")
    assert (result.code, result.err) == (0, "")
    (tmp_path / "printed.yaml").write_text(result.out)
    assert load_config(tmp_path / "printed.yaml") == load_config(recipe, ["seed=5", "optimizer.learning_rate=3e-5"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train_data.shrads=[x]", "did you mean `shards`?"),
        ("num_steps=-1", "`num_steps`"),
        ("train_data.shards=[{empty}]", "is empty"),
        ("train_data.shards=[{file}]", "does not exist"),
        ("evaluation.test_sets.speech.shards={empty}", "is empty"),
        ("model.path={nowhere}", "nowhere"),
        ("model.path=./nowhere", "nowhere"),
        ("model.path={empty}", "has no tekken.json"),
        ("model.path=nobody/nothing", "nobody/nothing"),
        ("engine.deepspeed={nowhere}", "does not exist; the package has zero0, "),
        ("run_dir={file}/run", "`run_dir`"),
        ("train_data.augmentation=[{{name: Gian}}]", "no transform `Gian`"),
        ("train_data.augmentation=[{{name: Gain, arguments: {{loud: 1}}}}]", "`Gain` has no argument `loud`"),
        ("train_data.max_duration_seconds=0.001", "there is nothing to train on"),
    ],
)
def test_a_mistake_in_a_configuration_is_one_sentence(run, recipe, tmp_path, override, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    places = {name: tmp_path / name for name in ("empty", "file", "nowhere")}
    assert sentence in run("train", "--config", recipe, "--set", override.format(**places)).refusal()


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        ('{"train_batch_size": 8, "zero_optimization": {"stage": 2}}', "`train_batch_size`"),
        ('{"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}', "`train_data.max_examples`"),
        ('{"gradient_accumulation_steps": 8, "zero_optimization": {"stage": 2}}', "`train_data.slots_per_step`"),
        ('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}', "`bf16`"),
        ('{"fp16": {"enabled": true}, "zero_optimization": {"stage": 2}}', "`model.precision`"),
        ('{"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 2}}', "sets `optimizer`"),
        ('{"scheduler": {}, "zero_optimization": {"stage": 2}}', "`optimizer.schedule`"),
        ('{"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}', "`optimizer.max_grad_norm`"),
        ('{"zero_optimization": {"stage": 4}}', "must be 0, 1, 2 or 3, but is 4 instead"),
        ('{"zero_optimization": {"stage": "3"}}', "must be 0, 1, 2 or 3, but is '3' instead"),
        ('{"zero_optimization": {}}', "must be 0, 1, 2 or 3"),
        ("{}", "must be 0, 1, 2 or 3"),
        ('{"zero_optimization": 3}', "zero_optimization"),
        ('{"zero_optimization": null}', "zero_optimization"),
        ('{"zero_optimization": {"stage": 3, "offload_param": "cpu"}}', "offload_param"),
        ("[]", "must hold a JSON object"),
        ('{"zero_optimization": ', "is not valid JSON"),
        ("", "is not valid JSON"),
        ("\udcff", "ds.json"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_used_is_one_sentence(run, recipe, tmp_path, contents, sentence):
    (tmp_path / "ds.json").write_bytes(contents.encode(errors="surrogateescape"))
    refused = run("train", "--config", recipe).refusal()
    assert sentence in refused
    assert "ds.json" in refused
    assert not (tmp_path / "run").exists(), "nothing of the run was made"


@pytest.mark.parametrize(
    ("test_sets", "sentence"),
    [
        (
            {"a": {"context": {"num_distractors": [2]}}, "a-distractors-2": {}},
            "`a-distractors-2` is the name of a set",
        ),
        ({"a": {"context": {"num_distractors": [3000]}}}, "3000 words may take"),
    ],
)
def test_lists_of_words_that_cannot_be_are_refused_at_the_start(
    run, recipe, shard_folder, tmp_path, test_sets, sentence
):
    (tmp_path / "words.txt").write_text("".join(f"word{number}\n" for number in range(3000)))
    for one in test_sets.values():
        one["shards"] = str(shard_folder)
        if "context" in one:
            one["context"]["words"] = str(tmp_path / "words.txt")
    tree = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(tree | {"evaluation": {"test_sets": test_sets}}))
    assert sentence in run("train", "--config", recipe).refusal()
