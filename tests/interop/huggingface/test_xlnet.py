"""XLNet in Hugging Face's names: configs there and back, names one to one, another head, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_models import abstract, noise

from llm_jax import interop
from llm_jax.interop.huggingface.xlnet import CLASSES, config_from_hf, config_to_hf, ignored, rules
from llm_jax.interop.names import InteropError
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import paths

TINY = XLNetConfig(
    vocab_size=31, model_dim=12, num_layers=3, num_heads=3, hidden_dim=10, memory_length=7, reuse_length=5,
    clamp_length=9, labels=("no", "yes", "so"),
)  # fmt: skip


@pytest.mark.parametrize("head", CLASSES)
def test_configs_round_trip_and_names_are_one_to_one(head):
    config = dataclasses.replace(TINY, head=head)
    theirs = json.loads(json.dumps(config_to_hf(config)))
    assert theirs["architectures"] == [CLASSES[head]] and config_from_hf(theirs) == config
    assert config_from_hf({**theirs, "bi_data": True}) == config and not theirs["bi_data"]  # a matter of the batch
    table = rules(config)
    assert {r.ours for r in table} == {p for p, _ in paths.flatten(abstract(config.make(), np.zeros((2, 2), int))[0])}
    assert len({r.ours for r in table}) == len({r.theirs for r in table}) == len(table)
    assert not any(ignored(config, r.theirs.format(l=0)) for r in table)


def test_a_folder_round_trips_and_takes_another_head(tmp_path):
    model = TINY.make()
    params = noise(model, 0.3)
    interop.save(tmp_path, model, params)
    loaded = interop.load(tmp_path)
    assert loaded.config == TINY
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    tagger = interop.load(tmp_path, head="classification", labels=("a", "b"))
    assert tagger.config.num_labels == 2 and tagger.params["classifier"]["kernel"].shape == (12, 2)
    jax.tree.map(np.testing.assert_array_equal, tagger.params["encoder"], params["encoder"])


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"summary_type": "mean", "architectures": ["XLNetForSequenceClassification"]},
            "summary_type='mean' is not supported, only 'last'",
        ),
        ({"attn_type": "both"}, "attn_type='both' is neither bi nor uni"),
        ({"d_head": 5}, "d_head=5 is not d_model / n_head"),
        ({"ff_activation": "tanh"}, "activation 'tanh' is not supported"),
        (
            {"architectures": ["XLNetForQuestionAnswering"]},
            "architectures 'XLNetForQuestionAnswering' is not supported",
        ),
        ({"untie_r": False}, "untie_r=False is not supported"),
        ({"magic": 1}, "config.json has magic"),
    ],
)
def test_what_is_not_supported_is_named(changes, words):
    with pytest.raises(InteropError, match=words):
        config_from_hf({**config_to_hf(TINY), **changes})
