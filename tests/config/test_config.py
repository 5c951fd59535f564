"""A configuration is validated before anything runs, and a mistake in it is named with its key."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from voxtral_dist.config import RunConfig, config_schema, dump_config, load_config
from voxtral_dist.errors import UserError
from voxtral_dist.model.published import PUBLISHED_MODELS

from corpora import REPOSITORY

RECIPES = sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml"))

SMALLEST = """
run_dir: runs/x
num_steps: 200
model: {path: model}
train_data: {shards: [shards/a, shards/b], max_examples: 4, augmentation: [{name: Gain, arguments: {p: 0.5}}]}
optimizer: {learning_rate: 1e-4}
engine: {deepspeed: ds.json}
evaluation: {test_sets: {first: {shards: shards/test}}}
"""


@pytest.fixture
def smallest(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        load_config(path, overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("override", "place", "nearest"),
    [
        ("num_stpes=5", "num_stpes", "num_steps"),
        ("model.atention=sdpa", "model.atention", "attention"),
        ("train_data.shard=x", "train_data.shard", "shards"),
        ("optimizer.lerning_rate=1", "optimizer.lerning_rate", "learning_rate"),
        ("train_data.augmentation=[{name: Gain}, {nmae: Gain}]", "train_data.augmentation.1.nmae", "name"),
        ("evaluation.test_set.first=x", "evaluation.test_set", "test_sets"),
        ("evaluation.test_sets.first.shrads=x", "evaluation.test_sets.first.shrads", "shards"),
        # A name that is also the name of a field.
        ("evaluation.test_sets.shards.max_uterances=5", "evaluation.test_sets.shards.max_uterances", "max_utterances"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest_known_one(smallest, override, place, nearest):
    assert f"`{place}` is not a known key; did you mean `{nearest}`?" in refusal(smallest, override)


def test_a_key_like_no_other_is_named_with_all_known_ones(smallest):
    assert "`engine.zzz` is not a known key; known keys are deepspeed" in refusal(smallest, "engine.zzz=1")


def test_misspelt_keys_of_a_file_are_all_named(smallest):
    smallest.write_text(SMALLEST.replace("num_steps", "num_step").replace("{learning_rate", "{learning_rat"))
    sentence = refusal(smallest)
    assert sentence.startswith(f"{smallest}: ")
    for part in (
        "`num_step` is",
        "`num_steps`?",
        "`optimizer.learning_rat` is",
        "`optimizer.learning_rate` is missing",
    ):
        assert part in sentence


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("num_steps=0", "num_steps"),
        ("num_steps=2.5", "num_steps"),
        ("num_epochs=0", "num_epochs"),
        ("seed=-1", "seed"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas.1"),
        ("optimizer.schedule=cosin", "optimizer.schedule"),
        ("optimizer.warmup_steps=200", "optimizer.warmup_steps"),
        ("model.precision=float8", "model.precision"),
        ("train_data.shards=[]", "train_data.shards"),
        ("train_data.slots_per_step=0", "train_data.slots_per_step"),
        ("train_data.max_bad_fraction=1.5", "train_data.max_bad_fraction"),
        ("train_data.num_workers=-1", "train_data.num_workers"),
        ("train_data=null", "train_data"),
        ("evaluation.batch_size=0", "evaluation.batch_size"),
        ("evaluation.test_sets.first.max_utterances=0", "evaluation.test_sets.first.max_utterances"),
        ("checkpoint.keep=0", "checkpoint.keep"),
    ],
)
def test_a_value_out_of_its_range_is_named(smallest, override, key):
    assert f"`{key}`" in refusal(smallest, override)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("engine={}", "`engine` must have either `engine.deepspeed` or `engine.fsdp2`, but has none"),
        ("engine={deepspeed: a.json, fsdp2: {}}", "`engine.fsdp2`, but has both"),
        ("trainable.lora={trained_whole: [language_model]}", "`language_model` must be in `targets` or"),
        ("trainable.lora={targets: {decoder: [q_proj]}}", "`trainable.lora.targets.decoder"),
        ("optimizer.component_learning_rates={encoder: 0}", "`optimizer.component_learning_rates.encoder`"),
        (
            "model.activation_checkpointing=true",
            "`model.activation_checkpointing` must be a mapping of keys to values, but is True",
        ),
        ("model.activation_checkpointing={encoder: -1}", "`model.activation_checkpointing.encoder`: input should be"),
        (
            "train_data.target_text=[lower_case, upper]",
            "`train_data.target_text.1`: must be lower_case, no_punctuation, or a function as `module:function`, but",
        ),
        ("model.compile_blocks=sometimes", "`model.compile_blocks`: input should be a valid boolean"),
        ("model.activation_offloading=true", "`model.activation_checkpointing.language_model` is 0 instead: set it to"),
        (
            "evaluation.normalizer=bsic",
            "`evaluation.normalizer` must be none, basic, whisper_english, whisper_basic, open_asr_en, or a",
        ),
        ("evaluation.normalizer=a:b c", "`evaluation.normalizer` must be none, basic"),
    ],
)
def test_what_contradicts_itself_is_refused_in_one_sentence(smallest, override, sentence):
    assert sentence in refusal(smallest, override)


@pytest.mark.parametrize("name", ["a/b", "../up", "/top", ""])
def test_a_test_set_name_that_cannot_name_a_file_is_refused(smallest, name):
    tree = yaml.safe_load(SMALLEST)
    tree["evaluation"]["test_sets"] = {name: {"shards": "x"}}
    smallest.write_text(yaml.safe_dump(tree))
    assert "evaluation.test_sets" in refusal(smallest)


@pytest.mark.parametrize("override", ["num_steps", "=5", ""])
def test_an_override_without_key_or_value_is_refused(smallest, override):
    assert "must be of the form section.key=value" in refusal(smallest, override)


def test_an_override_below_a_value_is_refused(smallest):
    assert "`num_steps` holds a int, so it has no key `x`" in refusal(smallest, "num_steps.x=5")


def test_an_override_that_is_no_yaml_is_refused(smallest):
    assert "not valid YAML" in refusal(smallest, "run_dir=[")


def test_a_mistake_is_blamed_on_the_override_or_on_the_file_that_it_is_in(smallest):
    assert refusal(smallest, "seed=1", "num_steps=-1").startswith("`--set num_steps=-1`: `num_steps`: input should be")
    contradiction = refusal(smallest, "model.precision=float16", "seed=1", "model.float8=rowwise")
    assert contradiction.startswith("`--set model.precision=float16` and `--set model.float8=rowwise`: `model.float8: ")
    assert refusal(smallest, "optimizer.warmup_steps=500").startswith("`--set optimizer.warmup_steps=500`: `optimizer.")
    # The later one of a key is the one that is used.
    assert refusal(smallest, "seed=x", "seed=y").startswith("`--set seed=y`: `seed`: ")
    smallest.write_text(SMALLEST.replace("num_steps: 200", "num_steps: many"))
    both = refusal(smallest, "seed=x")
    assert both.startswith(f"{smallest}: `num_steps`: ")
    assert "; `--set seed=x`: `seed`: " in both
    assert refusal(smallest, "num_steps=0").startswith("`--set num_steps=0`: ")


def test_one_text_is_a_list_of_one_and_other_values_are_explained(smallest):
    smallest.write_text(SMALLEST.replace("[shards/a, shards/b]", "shards/a"))
    config = load_config(smallest, ["train_data.languages=de", "metrics.trackers=wandb"])
    assert config.train_data.shards == ("shards/a",)
    assert config.train_data.languages == ("de",)
    assert config.metrics.trackers == ("wandb",)
    assert "`train_data.shards` must be a list, such as [3], but is 3 instead" in refusal(
        smallest, "train_data.shards=3"
    )
    assert "`train_data.augmentation` must be a list, but is {" in refusal(
        smallest, "train_data.augmentation={name: Gain}"
    )
    inner = refusal(smallest, "trainable.lora.targets={encoder: fc1}")
    assert "`trainable.lora.targets.encoder` must be a list, such as [fc1], but is 'fc1' instead" in inner
    assert "`model` must be a mapping of keys to values, but is 'abc' instead" in refusal(smallest, "model=abc")


def test_overrides_win_over_the_file_and_later_ones_over_earlier(smallest):
    config = load_config(
        smallest,
        [
            "optimizer.learning_rate=1e-5",
            "train_data.shards=[c]",
            "seed=1",
            "seed=2",
            "checkpoint.keep=7",
            "run_dir=a=b",
        ],
    )
    assert config.optimizer.learning_rate == 1e-5
    assert config.train_data.shards == ("c",)
    assert (config.seed, config.checkpoint.keep, config.run_dir) == (2, 7, Path("a=b"))
    # What was not named stays.
    assert config.train_data.augmentation[0].arguments == {"p": 0.5}


@pytest.mark.parametrize(
    "overrides", [[], ["optimizer.learning_rate=1e-7", "evaluation.every_steps=10", "run_dir=Läufe"]]
)
def test_a_dumped_configuration_loads_back_equal(smallest, tmp_path, overrides):
    config = load_config(smallest, overrides)
    (tmp_path / "dumped.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "dumped.yaml") == config


def test_a_configuration_is_frozen(smallest):
    config = load_config(smallest)
    with pytest.raises(ValidationError, match="frozen"):
        config.num_steps = 5
    with pytest.raises(ValidationError, match="frozen"):
        config.optimizer.learning_rate = 5.0


def test_a_run_without_a_configuration_is_told_what_to_give():
    with pytest.raises(UserError, match=r"pass `--config FILE`"):
        load_config(None)


def test_a_missing_file_is_named(tmp_path):
    assert "nowhere.yaml cannot be read: No such file" in refusal(tmp_path / "nowhere.yaml")


def test_a_folder_is_no_configuration(tmp_path):
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        (b"a: [1", "is not valid YAML"),
        (b"\xff\xfe\xfa", "is not valid YAML"),
        (b"", "is empty instead"),
        (b"- a\n- b\n", "is a list instead"),
        (b"text", "is a str instead"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, contents, sentence):
    path = tmp_path / "run.yaml"
    path.write_bytes(contents)
    assert sentence in refusal(path)


def schema() -> dict[str, Any]:
    return json.loads(config_schema())


def test_the_schema_describes_every_key():
    sections = [schema(), *schema()["$defs"].values()]
    assert len(sections) == 24
    for section in sections:
        assert section["description"], section["title"]
        for key, field in section["properties"].items():
            # A section within a section is described where it is defined.
            assert field.get("description") or "$ref" in json.dumps(field), f"{section['title']}.{key}"


def test_the_schema_refuses_a_misspelt_key():
    tree = yaml.safe_load(SMALLEST) | {"num_stpes": 5}
    with pytest.raises(jsonschema.ValidationError, match="num_stpes"):
        jsonschema.validate(tree, schema())


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_load_and_fit_the_schema(recipe):
    load_config(recipe)
    jsonschema.validate(yaml.safe_load(recipe.read_text(encoding="utf-8")), schema())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_deepspeed_file_of_a_recipe_exists_and_sets_the_stage_alone(recipe):
    engine = load_config(recipe).engine
    if engine.fsdp2 is not None:
        assert engine.deepspeed is None
        return
    path = REPOSITORY / engine.deepspeed
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert settings["zero_optimization"]["stage"] in (1, 2, 3)
    assert not settings.keys() & {"train_batch_size", "train_micro_batch_size_per_gpu", "bf16", "fp16", "optimizer"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_model_of_a_recipe_is_published_or_made_here(recipe):
    path = load_config(recipe).model.path
    assert path in PUBLISHED_MODELS or not path.startswith("mistralai/")


def test_a_run_has_steps_or_epochs_and_not_both(smallest):
    words = "one of `num_steps` and `num_epochs` must be set, and the other one null, but "
    assert f"{words}both are set instead" in refusal(smallest, "num_epochs=3")
    assert f"{words}none is set instead" in refusal(smallest, "num_steps=null")
    config = load_config(smallest, ["num_steps=null", "num_epochs=3"])
    assert (config.num_steps, config.num_epochs, config.length) == (None, 3, "3 epochs")


@pytest.mark.parametrize(
    ("num_epochs", "num_steps"), [(1, 300), (3, 900), (0.5, 150), (0.501, 151), (0.07 * 100, 2100), (1 + 1e-9, 300)]
)
def test_epochs_are_rounded_up_to_whole_steps(smallest, num_epochs, num_steps):
    config = load_config(smallest, ["num_steps=null", f"num_epochs={num_epochs!r}"])
    assert config.total_steps(steps_per_epoch=300) == num_steps


def test_the_warmup_must_end_before_the_last_epoch_does(smallest):
    config = load_config(smallest, ["num_steps=null", "num_epochs=2"])
    assert config.total_steps(steps_per_epoch=51) == 102
    with pytest.raises(UserError, match=r"but is 100, and 2 epochs \(`num_epochs`\) of 50 steps have 100 instead"):
        config.total_steps(steps_per_epoch=50)


def test_run_config_refuses_warmup_that_never_ends(smallest):
    with pytest.raises(ValidationError, match="must be smaller than `num_steps`"):
        RunConfig.model_validate(yaml.safe_load(SMALLEST) | {"num_steps": 100})


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 9)
)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("2020-99-99", "a value does not fit its type (month must be in 1..12)"),
        ("0x_", "a value does not fit its type"),
        ("!!bool x", "a value does not fit its type"),
        ("!!timestamp x", "a value does not fit its type"),
        ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("{" * 500, "too deeply nested"),
        ("[" * 500 + "]" * 500, "too deeply nested"),
        ("&a [*a]", "a value contains itself"),
        ("1" * 5000, "a value does not fit its type"),
        ("\x00", "special characters are not allowed"),
        ("'" + "x" * 2**20 + "'", "it has more than 1 MiB"),
    ],
    ids=range(11),
)
def test_hostile_yaml_is_one_sentence(tmp_path, value, sentence):
    (tmp_path / "c.yaml").write_text(f"seed: {value}")
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "c.yaml")
    assert f"c.yaml is not valid YAML: {sentence}" in str(refused.value) or sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_aliases_that_make_a_file_too_large_are_refused(tmp_path):
    (tmp_path / "c.yaml").write_text(LAUGHS)
    with pytest.raises(UserError, match="its aliases make it too large"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("value", ["2020-99-99", "0x_", "!!bool x", "{" * 500])
def test_an_override_with_hostile_yaml_is_one_sentence(tmp_path, value):
    (tmp_path / "c.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match="the value is not valid YAML"):
        load_config(tmp_path / "c.yaml", [f"seed={value}"])
