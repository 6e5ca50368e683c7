"""Families by name: round trips through JSON, and names that are not there."""

import json

import pytest
from tiny_models import ENCODERS, MODELS

from llm_jax import config as configs
from llm_jax.models import registry
from llm_jax.models.xlnet import XLNetConfig


@pytest.mark.parametrize("config", [*MODELS.values(), *ENCODERS.values()], ids=[*MODELS, *ENCODERS])
def test_registry_round_trip(config):
    values = json.loads(json.dumps(registry.to_dict(config)))
    assert values["family"] == registry.family_of(config)
    assert registry.from_dict(values) == config


def test_fields_that_moved_elsewhere_still_load():
    """The direction of XLNet's rows was the model's; models are equal with and without."""
    values = registry.to_dict(XLNetConfig(num_layers=2))
    assert registry.from_dict({**values, "both_ways": True}) == registry.from_dict(values)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"family": "rnn"}, "model.family='rnn' is not one of gpt, llama, bert"),
        ({}, "model.family=None is not one of"),
        ({"family": "gpt", "num_layer": 2}, "unknown field model.num_layer; did you mean num_layers"),
        ({"family": "llama", "rope_scaling": {"kind": "ntk", "factor": 2.0}}, "model.rope_scaling: .*kind='ntk'"),
    ],
)
def test_registry_errors(values, words):
    with pytest.raises(configs.ConfigError, match=words):
        registry.from_dict(values)
