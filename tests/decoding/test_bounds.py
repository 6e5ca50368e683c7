"""Ids outside of a table are refused by name wherever they meet one; numbers that are not finite are not a result."""

import logging

import jax
import numpy as np
import pytest
from binaries import call
from tiny_models import ENCODER_DECODERS, ENCODERS, noise

from llm_jax import interop
from llm_jax.data import tokenizers, tokens
from llm_jax.data.rows.labeled_rows import Encoder
from llm_jax.decoding import fill_mask, predict
from llm_jax.decoding.beam import BeamConfig, BeamSearch
from llm_jax.decoding.finite import check_finite
from llm_jax.decoding.generate import Generator
from llm_jax.decoding.score import of_text
from llm_jax.interop.pretrained import _check_entries
from llm_jax.models.elmo import ElmoConfig
from llm_jax.models.gpt import GPTConfig
from llm_jax.models.xlnet import XLNetConfig

TEXT = "the cat saw the dog"
SIZES = dict(vocab_size=12, context_length=16, model_dim=8, num_layers=1, num_heads=2)
GPT = GPTConfig(**SIZES)


def small(config):
    """A model whose table has 12 entries."""
    return type(config)(**{**vars(config), "vocab_size": 12})


@pytest.fixture(scope="module")
def words():
    """12 entries and `<extra>`, which is the 13th."""
    made = tokenizers.train([TEXT], "word", 20, (*tokenizers.MASKED_SPECIAL, "<|endoftext|>"))
    made.backend.add_special_tokens([f"<free_{i}>" for i in range(12 - made.vocab_size)] + ["<extra>"])
    assert made.vocab_size == 13
    return tokenizers.Tokenizer(made.backend, None, [made.backend.token_to_id("<|endoftext|>")])


ELMO = ElmoConfig(
    vocab_size=12, max_characters=6, character_dim=3, widths=(1,), filters=(3,), num_highways=1, model_dim=8,
    hidden_dim=4,
)  # fmt: skip
SCORED = {
    "gpt": (GPT, "{}"),
    "xlnet": (XLNetConfig(vocab_size=12, model_dim=8, num_layers=1, num_heads=2, hidden_dim=4), "{}"),
    "bert": (small(ENCODERS["roberta"]), "{}"),
    "elmo": (ELMO, "{}"),
    "source": (small(ENCODER_DECODERS["t5"]), "{} ||| the"),
    "target": (small(ENCODER_DECODERS["t5"]), "the ||| {}"),
}


@pytest.mark.parametrize("name", SCORED)
def test_likelihoods_name_the_entry(name, words):
    config, form = SCORED[name]
    with pytest.raises(ValueError, match=r"token id 12 \('<extra>'\) lies outside of the model's table of 12 entries"):
        of_text(config.make(), {}, words, form.format("the <extra> cat"))


@pytest.mark.parametrize("wrong", [12, 13, -1])
def test_prompts_and_masked_rows_name_the_id(wrong):
    decoder, encoder = GPT.make(), small(ENCODERS["roberta"]).make()
    calls = [
        lambda: Generator(decoder, {}).start([[1], [2, wrong]], 2, jax.random.key(0)),
        lambda: BeamSearch(decoder, {}).search([[1, wrong]], 2),
        lambda: fill_mask.fill(encoder, {}, np.array([[1, wrong]]), np.ones((1, 2))),
        lambda: fill_mask.pseudo_logprobs(encoder, {}, np.array([1, wrong]), np.array([0]), 3),
        lambda: fill_mask.pseudo_logprobs(encoder, {}, np.array([1, 2]), np.array([0]), wrong),
    ]
    for run in calls:
        with pytest.raises(ValueError, match=f"token id {wrong} lies outside of the model's table of 12 entries"):
            run()
    tokenizers.check_ids([[0, 11]], 12)
    tokenizers.check_ids([], 0)


def test_labelled_inputs_and_stored_rows_name_the_entry(words, tmp_path):
    config = small(ENCODERS["bert"])
    config = type(config)(**{**vars(config), "head": "classification", "labels": ("a", "b")})
    encoder = Encoder.of(config, words, "classification", 8)
    assert len(encoder([("the cat",)])) == 1
    padded = tokenizers.Tokenizer(words.backend, None, words.eos_ids, None, {"pad_token": "<extra>"})
    short = Encoder.of(config, padded, "classification", 8)
    assert short.row(short([("the cat",)])[0], 8)["input_ids"][-1] == 0  # padding that the model has no row for
    for run in (
        lambda: encoder([("the cat",), ("a <extra>",)]),
        lambda: predict.predict(config.make(), {}, words, [("<extra> cat",)]),
    ):
        with pytest.raises(ValueError, match=r"token id 12 \('<extra>'\)"):
            run()
    (tmp_path / "text.txt").write_text("the <extra> cat")
    store = tokens.build(str(tmp_path / "text.txt"), words, tmp_path / "cache")["train"]
    tokens.check_store(words, 13, store)
    with pytest.raises(ValueError, match=r"token id 12 \('<extra>'\)"):
        tokens.check_store(words, 12, store)
    (tmp_path / "text.txt").write_text("the cat")  # an entry that no text holds does no harm
    tokens.check_store(words, 12, tokens.build(str(tmp_path / "text.txt"), words, tmp_path / "cache")["train"])


def test_a_larger_tokenizer_is_told_when_it_is_loaded(words, caplog):
    caplog.set_level(logging.WARNING, "llm_jax")
    _check_entries(words, GPTConfig(**{**SIZES, "vocab_size": 13}))
    assert not caplog.text
    _check_entries(words, GPT)
    assert "13 entries and the model 12 rows: texts with '<extra>' are refused" in caplog.text


def broken():
    """A model whose every number is NaN."""
    return jax.tree.map(lambda x: x * np.nan, noise(GPT.make(), 0.3))


def test_numbers_that_are_not_finite_end_a_generation():
    """The best of NaNs is entry 0, so with it as a stop token nothing is generated, and still it is no empty answer."""
    generator = Generator(GPT.make(), broken(), (0,))
    for run in (
        lambda: generator.generate([[1, 2]], 3, jax.random.key(0)),
        lambda: list(generator.stream([1, 2], 3, jax.random.key(0), str)),
    ):
        with pytest.raises(ValueError, match="not finite"):
            run()


def test_numbers_that_are_not_finite_are_no_label(words):
    config = small(ENCODERS["bert"])
    model = type(config)(**{**vars(config), "num_layers": 1, "head": "classification", "labels": ("a", "b")}).make()
    params = jax.tree.map(lambda x: x * np.nan, noise(model, 0.3))
    with pytest.raises(ValueError, match="not finite in the labels' logits"):
        predict.predict(model, params, words, [("the cat",)])


def test_numbers_that_are_not_finite_are_no_score():
    with pytest.raises(ValueError, match="not finite in the best scores"):
        BeamSearch(GPT.make(), broken(), (0,), BeamConfig(2)).search([[1, 2]], 3)
    check_finite("nothing", np.zeros(3), 1)
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="1 of 4 numbers are not finite in it"):
            check_finite("it", np.array([0, wrong, 1]), 2.0)


def test_binaries_end_instead_of_printing_nan(words, tmp_path, capsys):
    """Not one of them writes a result: an error is the last thing they do."""
    made = words.backend.from_str(words.backend.to_str())
    tokenizer = tokenizers.Tokenizer(made, None, words.eos_ids)
    model = GPTConfig(**{**SIZES, "vocab_size": 13}).make()
    interop.save(tmp_path / "nan", model, jax.tree.map(lambda x: x * np.nan, noise(model, 0.3)), tokenizer)
    (tmp_path / "text.txt").write_text("the cat saw the dog " * 9)
    asked = [
        ("evaluate", "--sentence=the cat"),
        ("evaluate", "--next=the cat", f"--json={tmp_path / 'out.json'}"),
        ("evaluate", f"--source={tmp_path}/text.txt", "--sequence_length=8", f"--cache={tmp_path}"),
    ]
    for name, *arguments in asked:
        with pytest.raises(ValueError, match="not finite"):
            call(name, f"--model={tmp_path / 'nan'}", *arguments)
        assert "nan" not in capsys.readouterr().out.lower(), name
    assert not (tmp_path / "out.json").exists()
