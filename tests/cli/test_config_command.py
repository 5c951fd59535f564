"""`voxtral-dist config`: the check of configurations, and their schema."""

import json

import jsonschema
import yaml


def test_config_check_says_what_each_recipe_does(run, recipe):
    result = run("config", "check", recipe, recipe)
    assert (result.code, result.err) == (0, "")
    assert result.out.count(f"{recipe}: 2 steps of ") == 2
    assert "ZeRO-1" in result.out


def test_config_check_refuses_a_deepspeed_file_that_cannot_be_used(run, recipe, tmp_path):
    (tmp_path / "ds.json").write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 2}}')
    assert "`train_batch_size`" in run("config", "check", recipe).refusal()


def test_config_schema_is_a_json_schema_that_accepts_a_configuration(run, recipe):
    result = run("config", "schema")
    assert (result.code, result.err) == (0, "")
    schema = json.loads(result.out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(recipe.read_text()), schema)
