"""Families by name: round trips through JSON, and names that are not there."""

import json

import pytest
from tiny_models import MODELS

from llm_jax import config as configs
from llm_jax.models import registry


@pytest.mark.parametrize("name", MODELS)
def test_registry_round_trip(name):
    values = json.loads(json.dumps(registry.to_dict(MODELS[name])))
    assert values["family"] == registry.family_of(MODELS[name])
    assert registry.from_dict(values) == MODELS[name]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"family": "bert"}, "model.family='bert' is none of gpt, llama"),
        ({}, "model.family=None is none of"),
        ({"family": "gpt", "num_layer": 2}, "unknown field model.num_layer; did you mean num_layers"),
        ({"family": "llama", "rope_scaling": {"kind": "ntk", "factor": 2.0}}, "model.rope_scaling: .*kind='ntk'"),
    ],
)
def test_registry_errors(values, words):
    with pytest.raises(configs.ConfigError, match=words):
        registry.from_dict(values)
