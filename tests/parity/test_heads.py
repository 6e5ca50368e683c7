"""Decoders and T5 with labels equal transformers: states, logits, loss and every gradient; and exports load back.

Rows are full, padded on the right and padded on the left. Theirs finds a row's end by the padding id, ours by the mask.
"""

import jax
import numpy as np
import pytest
import torch
import transformers
from theirs import BOUNDS, DTYPES, check_gradients, exported, noisy, use_doubles

from llm_jax import interop
from llm_jax.interop.huggingface import gpt, llama, t5
from llm_jax.objectives.labels import Labels
from llm_jax.objectives.objective import total_loss

GPT = dict(vocab_size=61, n_positions=32, n_embd=36, n_layer=2, n_head=3, pad_token_id=0)
LLAMA = dict(
    vocab_size=61, hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=3, max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip
T5 = dict(vocab_size=61, d_model=36, d_kv=10, d_ff=50, num_layers=2, num_decoder_layers=3, num_heads=3,
          decoder_start_token_id=0)  # fmt: skip
titled = lambda title: {head: title + name for head, name in llama.CLASSES.items()}
# config class, sizes, our heads -> their classes
FAMILIES = {
    "gpt2": (transformers.GPT2Config, GPT, gpt.CLASSES["gpt2"]),
    "gpt1": (transformers.OpenAIGPTConfig, GPT, gpt.CLASSES["openai-gpt"]),
    "llama": (transformers.LlamaConfig, LLAMA, titled("Llama")),
    "mistral": (transformers.MistralConfig, {**LLAMA, "sliding_window": 5}, titled("Mistral")),
    "qwen2": (transformers.Qwen2Config, LLAMA, titled("Qwen2")),
    "qwen3": (transformers.Qwen3Config, {**LLAMA, "head_dim": 4, "tie_word_embeddings": True}, titled("Qwen3")),
    "t5": (transformers.T5Config, T5, t5.CLASSES),
    "t5_1.1": (transformers.T5Config, {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
               t5.CLASSES),
}  # fmt: skip
HEADS = ("none", "classification", "tokens", "span")
CASES = [
    (kind, head)
    for kind, (_, _, classes) in FAMILIES.items()
    for head in HEADS
    if head in classes
    if kind != "t5_1.1" or head == "classification"
]
RNG = np.random.default_rng(0)
T = 14
MASK = np.array([[1] * T, [1] * 10 + [0] * 4, [0] * 3 + [1] * 11])


def test_no_class_of_theirs_is_missing():
    for _, _, classes in FAMILIES.values():
        assert all(hasattr(transformers, name) for name in classes.values())
    for title in ("GPT2", "OpenAIGPT", "Llama", "Mistral", "Qwen2", "Qwen3", "T5"):
        ours = {name for _, _, classes in FAMILIES.values() for name in classes.values()}
        theirs = {n for n in dir(transformers) if n.startswith(f"{title}For")}
        assert theirs - ours == set(), theirs - ours


def make(kind, head, dtype):
    config, sizes, classes = FAMILIES[kind]
    labels = {"num_labels": 3} if head in ("classification", "tokens") else {}
    config = config(**sizes, **labels, attn_implementation="eager")
    return noisy(lambda: getattr(transformers, classes[head])(config), dtype)


def inputs_of(kind, head):
    """Ids and mask for both; theirs counts positions from the left unless told, and T5's decoder sees its padding."""
    mask = np.ones_like(MASK) if head == "span" else MASK  # they let an answer begin in padding, and we do not
    ids = np.where(mask, RNG.integers(2, 61, MASK.shape), 0)
    if kind.startswith("t5"):
        for row, n in zip(ids, mask, strict=True):
            row[np.flatnonzero(n)[[4, -1]]] = 1  # two ends, of which the last counts
        if head == "tokens":
            return ids, mask, {}
        before = np.concatenate([np.zeros_like(ids[:, :1]), ids[:, :-1]], axis=1)
        return ids, mask, {"decoder_input_ids": before, "decoder_attention_mask": mask}
    return ids, mask, {"position_ids": np.maximum(np.cumsum(mask, 1) - 1, 0)}


def labels_of(head, mask):
    """(labels of our objective, their keyword arguments)."""
    if head == "span":
        labels = np.array([[2, 5], [0, 10], [7, 7]])
        return labels, {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    labels = np.array([2, 0, 1])
    labels = np.where(mask, RNG.integers(0, 3, MASK.shape), -100) if head == "tokens" else labels
    return labels, {"labels": labels}


def logits_of(head, out):
    return torch.stack([out.start_logits, out.end_logits], -1) if head == "span" else out.logits


tensors = lambda arrays: {k: torch.tensor(v) for k, v in arrays.items()}


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("kind, head", CASES)
def test_equals_transformers(kind, head, precision, tmp_path, monkeypatch):
    if precision == "fp64":
        use_doubles(monkeypatch)
    tolerance = {"rtol": BOUNDS[precision], "atol": BOUNDS[precision]}
    close = lambda a, b, msg="": np.testing.assert_allclose(np.asarray(a), np.asarray(b), err_msg=msg, **tolerance)
    theirs = make(kind, head, DTYPES[precision])
    theirs.save_pretrained(tmp_path / "in")
    ids, mask, more = inputs_of(kind, head)
    labels, named = (None, {}) if head == "none" else labels_of(head, mask)
    inputs = {"input_ids": ids, "attention_mask": mask}
    want = theirs(**tensors({**inputs, **more, **named}), output_hidden_states=True)
    real = mask.astype(bool)
    with jax.enable_x64(precision == "fp64"):
        ours = interop.load(tmp_path / "in")
        assert ours.config.head == head
        decoded = more if (kind, head) == ("t5", "none") else {}  # with labels its decoder reads the source by itself
        apply = lambda params: ours.model.apply({"params": params}, **inputs, **decoded, output_hidden_states=True)
        objective = Labels(head).for_run(1, ours.config, None) if named else None

        def loss(params):
            prepared = objective.prepare({**inputs, "labels": labels}, jax.random.key(0))
            assert prepared.inputs.keys() == inputs.keys()
            out = apply(params)
            return total_loss(objective, objective.score(out, prepared.targets), prepared.weights), out

        run = jax.value_and_grad(loss, has_aux=True) if named else lambda p: ((None, apply(p)), None)
        (value, out), grads = jax.jit(run)(ours.params)
        pairs = [(out.hidden_states, want.get("hidden_states", want.get("decoder_hidden_states")))]
        pairs += [] if out.encoder is None else [(out.encoder.hidden_states, want.encoder_hidden_states)]
        for ours_, theirs_ in pairs:
            for a, b in zip(ours_, theirs_, strict=True):
                close(a[real], b.detach()[real])
        if not named:
            assert out.logits is None
            return
        keep = ... if head == "classification" else real
        close(out.logits[keep], logits_of(head, want).detach().numpy()[keep])
        close(value, want.loss.detach())
        want.loss.backward()
        check_gradients(grads, theirs, tmp_path / "grads", BOUNDS[precision])


@pytest.mark.parametrize("kind, head", CASES)
def test_export_loads_in_transformers(kind, head, tmp_path):
    theirs = make(kind, head, torch.float32)
    again = exported(theirs, tmp_path)
    assert again.config.id2label == theirs.config.id2label
    ids, mask, more = inputs_of(kind, head)
    call = tensors({"input_ids": ids, "attention_mask": mask, **more})
    with torch.no_grad():
        a, b = again(**call), theirs(**call)
    if head == "none":
        a, b = a.last_hidden_state, b.last_hidden_state
    else:
        a, b = logits_of(head, a), logits_of(head, b)
    assert torch.equal(a, b)


@pytest.mark.parametrize("head", ["classification", "span"])
def test_t5s_decoder_reads_the_source_by_itself(head, tmp_path):
    """With full rows and right padding their default input of the decoder is ours."""
    theirs = make("t5", head, torch.float32)
    theirs.save_pretrained(tmp_path)
    ours = interop.load(tmp_path)
    ids, mask = (x[:2] for x in inputs_of("t5", head)[:2])
    with torch.no_grad():
        want = logits_of(head, theirs(**tensors({"input_ids": ids, "attention_mask": mask})))
    got = ours.model.apply({"params": ours.params}, ids, attention_mask=mask).logits
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_row_without_a_mask_ends_before_the_padding(kind, tmp_path):
    theirs = make(kind, "classification", torch.float32)
    theirs.save_pretrained(tmp_path)
    ours = interop.load(tmp_path)
    ids = inputs_of(kind, "classification")[0][:2]  # padded on the right, where padding changes no real token
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits
    got = ours.model.apply({"params": ours.params}, ids).logits
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
