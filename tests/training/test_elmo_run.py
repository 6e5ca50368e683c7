"""A run of ELMo from a config: states run on, a resumed run equals an unbroken one, the work directory is a model."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from llm_jax import config as configs
from llm_jax import interop
from llm_jax.models.elmo import ElmoConfig
from llm_jax.objectives.bidirectional_lm import BidirectionalLM
from llm_jax.training import run
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    text = " ".join(words[(i * 7 + rng.integers(2)) % 30] for i in range(3000))  # each word says much of the next
    (tmp_path / "text.txt").write_text(text)
    model = ElmoConfig(
        vocab_size=40, max_characters=6, character_dim=4, widths=(1, 2), filters=(8, 8), num_highways=1, model_dim=16,
        hidden_dim=24, dropout=0.0,
    )  # fmt: skip
    return run.RunConfig(
        model=model,
        data=run.DataConfig(str(tmp_path / "text.txt"), tokenizer_kind="word", validation_share=0.2, split="tail"),
        objective=BidirectionalLM(samples=20, carry=True),
        optimizer=OptimizerConfig("adamw", 3e-2, schedule="constant", weight_decay=0.0),
        training=LoopConfig(100, 8, 8, log_every=40, checkpoint_every=50),
    )


def test_a_run_learns_and_resumes(config, tmp_path):
    whole = run.train(config, tmp_path / "whole")
    assert whole.evaluation["eval/loss"] < 0.85 * whole.evaluation["eval/baseline_loss"]
    half = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=50))
    run.train(half, tmp_path / "halves")
    again = run.train(config, tmp_path / "halves")
    for a, b in zip(jax.tree.leaves(whole.state.params), jax.tree.leaves(again.state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(whole.state.carry), jax.tree.leaves(again.state.carry), strict=True):
        np.testing.assert_array_equal(a, b)
    loaded = interop.load(tmp_path / "whole")
    assert loaded.config == config.model and loaded.tokenizer is not None
    if importlib.util.find_spec("h5py") is not None:  # a trained model is written in the original's format
        interop.save(tmp_path / "original", loaded.model, loaded.params, loaded.tokenizer)
        again = interop.load(tmp_path / "original")
        jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_what_does_not_fit_together(config, tmp_path):
    whole = dataclasses.replace(config, data=dataclasses.replace(config.data, packing="whole"))
    with pytest.raises(configs.ConfigError, match="ELMo and XLNet read a stream of text"):
        run.train(whole, tmp_path / "x")
