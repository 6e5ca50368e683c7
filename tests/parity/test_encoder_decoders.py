"""T5 and Marian equal transformers: states, attentions, logits, loss and gradients; and exports load back."""

import jax
import numpy as np
import pytest
import torch
import transformers
from theirs import BOUNDS, DTYPES, check_gradients, exported, noisy, use_doubles

from llm_jax import interop
from llm_jax.objectives.objective import total_loss
from llm_jax.objectives.seq2seq import Seq2Seq

T5 = dict(vocab_size=61, d_model=36, d_kv=10, d_ff=50, num_layers=3, num_decoder_layers=2, num_heads=3)
MARIAN = dict(
    vocab_size=61, d_model=36, encoder_layers=3, decoder_layers=2, encoder_attention_heads=3,
    decoder_attention_heads=3, encoder_ffn_dim=50, decoder_ffn_dim=50, max_position_embeddings=64,
    decoder_start_token_id=60, pad_token_id=1, eos_token_id=0,  # torch gives padding rows no gradient
)  # fmt: skip
CONFIGS = {
    "t5": lambda: transformers.T5Config(**T5, decoder_start_token_id=0),
    "t5_few_buckets": lambda: transformers.T5Config(
        **T5, relative_attention_num_buckets=8, relative_attention_max_distance=20, decoder_start_token_id=0
    ),
    "t5_1.1": lambda: transformers.T5Config(
        **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0
    ),
    "mt5": lambda: transformers.MT5Config(**T5, decoder_start_token_id=0),
    "mt5_tied": lambda: transformers.MT5Config(**T5, decoder_start_token_id=0),
    "marian": lambda: transformers.MarianConfig(**MARIAN, activation_function="swish", scale_embedding=True),
    "marian_plain": lambda: transformers.MarianConfig(**MARIAN, activation_function="relu"),
    "marian_uneven": lambda: transformers.MarianConfig(
        **{**MARIAN, "decoder_attention_heads": 4, "decoder_ffn_dim": 30}, activation_function="swish"
    ),
}
RNG = np.random.default_rng(0)
S, T = 40, 24
IDS = RNG.integers(2, 60, (2, S))
MASK = np.array([[1] * S, [1] * (S - 9) + [0] * 9])
LABELS = np.where(np.arange(T) < np.array([[T], [T - 7]]), RNG.integers(2, 60, (2, T)), -100)


def make(name, dtype):
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    own = name == "mt5" or not getattr(config, "scale_decoder_outputs", True)

    def build():
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        if own:  # transformers 5 ties T5's output layer at creation, whatever the config says
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            model.config.tie_word_embeddings = False
        return model

    model = noisy(build, dtype)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name, precision, tmp_path, monkeypatch):
    if precision == "fp64":
        use_doubles(monkeypatch)
    tolerance = {"rtol": BOUNDS[precision], "atol": BOUNDS[precision]}
    close = lambda a, b, msg="": np.testing.assert_allclose(np.asarray(a), np.asarray(b), err_msg=msg, **tolerance)
    theirs = make(name, DTYPES[precision])
    theirs.save_pretrained(tmp_path / "in")
    want = theirs(
        input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK), labels=torch.tensor(LABELS),
        output_hidden_states=True, output_attentions=True,
    )  # fmt: skip
    with jax.enable_x64(precision == "fp64"):
        ours = interop.load(tmp_path / "in")
        objective = Seq2Seq().for_run(8, ours.config, None)
        batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
        prepared = objective.prepare(batch, jax.random.key(0))
        run = jax.jit(
            lambda p: ours.model.apply(
                {"params": p}, **prepared.inputs, output_hidden_states=True, output_attentions=True
            )
        )
        out = run(ours.params)
        source, target = MASK.astype(bool), LABELS >= 0
        for a, b in zip(out.encoder.hidden_states, want.encoder_hidden_states, strict=True):
            close(a[source], b.detach()[source])
        for a, b in zip(out.hidden_states, want.decoder_hidden_states, strict=True):
            close(a[target], b.detach()[target])
        for ours_, theirs_, rows in (
            (out.encoder.attentions, want.encoder_attentions, source),
            (out.attentions, want.decoder_attentions, target),
            (out.cross_attentions, want.cross_attentions, target),
        ):
            for a, b in zip(ours_, theirs_, strict=True):
                close(np.moveaxis(np.asarray(a), 2, 1)[rows], np.moveaxis(np.asarray(b.detach()), 2, 1)[rows])
        close(out.logits[target], want.logits.detach()[target])

        def loss(params):
            out = ours.model.apply({"params": params}, **prepared.inputs)
            return total_loss(objective, objective.score(out, prepared.targets), prepared.weights)

        value, grads = jax.jit(jax.value_and_grad(loss))(ours.params)
        close(value, want.loss.detach())
        want.loss.backward()
        check_gradients(grads, theirs, tmp_path / "grads", BOUNDS[precision], ("logits_bias",))  # a buffer of theirs


@pytest.mark.parametrize("name, scale", [("t5", 400.0), ("t5_1.1", 40.0), ("mt5_tied", 40.0)])
def test_float16_is_as_close_to_float32_as_theirs(name, scale, tmp_path):
    """Feed-forwards this large pass 65504 in their products; transformers keeps `wo` in float32."""
    model = make(name, torch.float32)
    with torch.no_grad():
        for path, p in model.named_parameters():
            p.mul_(scale if "DenseReluDense" in path else 1.0)
        model.save_pretrained(tmp_path)
        ids = dict(input_ids=torch.tensor(IDS), decoder_input_ids=torch.tensor(IDS[:, :T]))
        want = model(**ids).logits.numpy()
        theirs = type(model).from_pretrained(tmp_path, dtype=torch.float16).eval()(**ids).logits.float().numpy()
    ours = interop.load(tmp_path, dtype="float16")
    got = np.asarray(ours.model.apply({"params": ours.params}, IDS, IDS[:, :T]).logits[..., :61], np.float32)
    assert abs(got - want).max() < 1.5 * abs(theirs - want).max() < 0.02 * abs(want).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_export_loads_in_transformers(name, tmp_path):
    theirs = make(name, torch.float32)
    again = exported(theirs, tmp_path, transformers.AutoModelForSeq2SeqLM)
    call = dict(input_ids=torch.tensor(IDS), decoder_input_ids=torch.tensor(IDS[:, :5]))
    with torch.no_grad():
        torch.testing.assert_close(again(**call).logits, theirs(**call).logits, rtol=1e-6, atol=1e-6)
    assert type(again).__name__ == type(theirs).__name__.removeprefix("M" if name == "mt5" else "")  # it is a T5 1.1
    assert again.config.decoder_start_token_id == theirs.config.decoder_start_token_id


def test_the_encoder_alone(tmp_path):
    config = transformers.T5Config(**T5, attn_implementation="eager")
    theirs = noisy(lambda: transformers.T5EncoderModel(config), torch.float32)
    theirs.save_pretrained(tmp_path / "in")
    ours = interop.load(tmp_path / "in")
    out = ours.model.apply({"params": ours.params}, IDS, attention_mask=MASK)
    want = theirs(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK)).last_hidden_state.detach()
    real = MASK.astype(bool)
    np.testing.assert_allclose(out.last_hidden_state[real], want[real], rtol=1e-5, atol=1e-5)
    interop.save(tmp_path / "out", ours.model, ours.params)
    again = transformers.T5EncoderModel.from_pretrained(tmp_path / "out")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
