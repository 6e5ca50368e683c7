"""Objectives by name: round trips, work directories of before, and a new objective, which is a class and a row."""

import dataclasses
import json
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from llm_jax import config as configs
from llm_jax.models.gpt import GPTConfig
from llm_jax.objectives.bidirectional_lm import BidirectionalLM
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.cross_entropy import cross_entropy_sums
from llm_jax.objectives.labels import Labels
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.objective import Prepared
from llm_jax.objectives.permutation_lm import PermutationLM
from llm_jax.objectives.seq2seq import Seq2Seq
from llm_jax.training import checks, recipes, run
from llm_jax.training.loop import LoopConfig, summarize
from llm_jax.training.metrics import read_metrics
from llm_jax.training.recipes import RECIPES, Corpus, Recipe, next_token_rows

pytestmark = pytest.mark.usefixtures("one_device")

OBJECTIVES = [
    CausalLM(z_loss=1e-4),
    MaskedLM(unit="words", pair=0.0),
    Seq2Seq(task="spans", end_id=1),
    BidirectionalLM(samples=9, carry=True),
    PermutationLM(both_ways=True),
    Labels("span"),
]
JSON = lambda values: json.loads(json.dumps(values))


def test_every_objective_has_a_row_and_a_name_of_its_own():
    assert {type(o) for o in OBJECTIVES} == set(RECIPES)
    assert len({o.tag for o in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.tag)
def test_objectives_survive_json_and_flags_and_load_without_a_name(objective):
    config = run.RunConfig(objective=objective)
    values = JSON(config.to_dict())
    assert values["objective"] == {"name": objective.tag, **configs.to_dict(objective)}
    assert run.RunConfig.from_dict(values) == config
    assert cli.from_config_dict(run.RunConfig, cli.as_config_dict(config).lock()) == config
    del values["objective"]["name"]  # as versions wrote it whose objectives had none
    assert run.RunConfig.from_dict(values) == config


@pytest.mark.parametrize(
    "values, words",
    [
        ({"name": "causal"}, "objective.name='causal' is not one of causal_lm, masked_lm, seq2seq"),
        ({"name": "labels", "kinds": "span"}, "unknown field objective.kinds; did you mean kind"),
        (
            {"label_smothing": 0.1, "z_loss": 0.0},
            "unknown field objective.label_smothing; did you mean label_smoothing",
        ),
        ({"name": "masked_lm", "rate": 2.0}, r"objective: rate=2.0 must lie in \(0, 1\)"),
    ],
)
def test_what_names_no_objective(values, words):
    with pytest.raises(configs.ConfigError, match=words):
        run.RunConfig.from_dict({"objective": values})


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.tag)
def test_a_summary_says_what_an_objective_measures(objective):
    ones = dict.fromkeys((*objective.coefficients, "accuracy"), 1.0)
    got = summarize(objective, ones, ones, 0.25)
    assert ("eval/perplexity" in got) == (not isinstance(objective, Labels))
    assert ("eval/bits_per_byte" in got) == isinstance(objective, CausalLM)
    assert got["eval/loss"] == pytest.approx(sum(objective.coefficients.values()))


@dataclasses.dataclass(frozen=True)
class Again:
    """Every token, given those before it and itself."""

    tag: ClassVar = "again"
    perplexity: ClassVar = True
    bits_per_byte: ClassVar = False
    loss_unit: ClassVar = "nats"
    carry: ClassVar = False
    coefficients: ClassVar = {"same_token": 1.0}
    scale: float = 2.0

    def for_run(self, devices, model, mask_id):
        return self

    def plain(self):
        return self

    def prepare(self, batch, key):
        ids = batch["input_ids"]
        return Prepared({"input_ids": ids}, ids, {"same_token": jnp.float32(ids.size)})

    def score(self, output, targets):
        loss, _, _ = cross_entropy_sums(output.head_input, output.head, targets, jnp.ones(targets.shape))
        return {"same_token": loss * self.scale}


def test_a_new_objective_is_a_class_and_a_row(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, Again, Recipe(checks.causal, Corpus(next_token_rows)))
    config = run.RunConfig(
        model=GPTConfig(300, 16, 16, 1, 2, dropout=0.0),
        data=run.DataConfig(str(corpus), validation_share=0.2),
        objective=Again(1.0),
        training=LoopConfig(2, 8, 15, log_every=1, eval_batches=1),
    )
    trained = run.train(config, tmp_path)
    losses = [m["train/loss"] for m in read_metrics(tmp_path) if "train/loss" in m]
    assert len(losses) == 2 and losses[0] == pytest.approx(np.log(300), rel=0.05)
    assert {"eval/loss", "eval/perplexity", "eval/baseline_loss"} == trained.evaluation.keys()
    assert json.loads((tmp_path / "config.json").read_text())["objective"] == {"name": "again", "scale": 1.0}
    assert run.load_config(tmp_path) == config
    assert recipes.to_dict(config.objective) == {"name": "again", "scale": 1.0}
    with pytest.raises(configs.ConfigError, match="data.pairs and data.mask_copies are of masked models"):
        run.train(dataclasses.replace(config, data=run.DataConfig(pairs="next")), tmp_path / "other")
