"""Every encoder with every head equals transformers: states, attentions, logits, loss and gradients, both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from theirs import BOUNDS, DTYPES, check_gradients, exported, noisy, use_doubles

from llm_jax import interop
from llm_jax.interop.huggingface.bert import CLASSES, TABLE
from llm_jax.objectives.labels import Labels
from llm_jax.objectives.masked_lm import MaskedLM, Targets
from llm_jax.objectives.objective import total_loss

SIZES = dict(
    vocab_size=61, hidden_size=36, num_hidden_layers=3, num_attention_heads=3, intermediate_size=50,
    max_position_embeddings=32,
)  # fmt: skip
DISTIL = dict(vocab_size=61, dim=36, n_layers=3, n_heads=3, hidden_dim=50, max_position_embeddings=32)
CONFIGS = {
    "bert": lambda **kw: transformers.BertConfig(**SIZES, **kw),
    "roberta": lambda **kw: transformers.RobertaConfig(
        **{**SIZES, "max_position_embeddings": 34, "type_vocab_size": 1}, layer_norm_eps=1e-5, **kw
    ),
    "distilbert": lambda **kw: transformers.DistilBertConfig(**DISTIL, activation="relu", **kw),
    "albert": lambda **kw: transformers.AlbertConfig(**SIZES, embedding_size=20, num_hidden_groups=2, **kw),
    "albert inner": lambda **kw: transformers.AlbertConfig(
        **{**SIZES, "num_hidden_layers": 4}, embedding_size=20, num_hidden_groups=2, inner_group_num=2, **kw
    ),
}
CASES = [(k, h) for k in CONFIGS if k in TABLE for h in CLASSES if hasattr(transformers, TABLE[k].title + CLASSES[h])]
CASES += [("albert inner", "masked_lm")]
RNG = np.random.default_rng(0)
T = 14
MASK = np.array([[1] * T, [1] * 11 + [0] * 3])
SPAN = np.array([[2, 5], [0, 10]])


def class_of(kind, head):
    return getattr(transformers, TABLE[kind.split()[0]].title + CLASSES[head])


def make(kind, head, dtype):
    labels = {"num_labels": 3} if head in ("classification", "tokens") else {}
    config = CONFIGS[kind](attn_implementation="eager", **labels)
    return noisy(lambda: class_of(kind, head)(config), dtype)


def inputs_of(kind, head):
    """Ids, mask (right padding with their padding id, as RoBERTa's positions want it) and token types."""
    shape = (2, 4, T) if head == "choice" else (2, T)
    mask = np.broadcast_to(MASK[:, None] if head == "choice" else MASK, shape)
    mask = np.ones_like(mask) if head == "span" else mask  # they let an answer begin in padding, and we do not
    ids = np.where(mask, RNG.integers(5, 61, shape), 1)
    types = {"token_type_ids": RNG.integers(0, 2, shape)} if kind.split()[0] in ("bert", "albert") else {}
    return {"input_ids": ids, "attention_mask": mask.copy(), **types}


def labels_of(kind, head):
    """(their keyword arguments, our objective, our targets, total weights)."""
    if head in ("masked_lm", "pretraining"):
        labels = np.where((RNG.random((2, T)) < 0.4) & (MASK == 1), RNG.integers(5, 61, (2, T)), -100)
        weights = (labels >= 0).astype(np.float32)
        pair = np.array([1, 0]) if head == "pretraining" else None
        every = np.broadcast_to(np.arange(T), (2, T))
        targets = Targets(every, np.maximum(labels, 0), weights, pair, np.ones(2))
        theirs = {"labels": labels}
        if pair is not None:
            theirs["next_sentence_label" if kind == "bert" else "sentence_order_label"] = pair
        objective = MaskedLM(pair=0.0 if pair is None else 1.0)
        return theirs, objective, targets, {"masked_token": weights.sum(), "pair": 2.0}
    if head == "span":
        theirs = {"start_positions": SPAN[:, 0], "end_positions": SPAN[:, 1]}
        return theirs, Labels("span"), (SPAN, SPAN >= 0), {"start": 2.0, "end": 2.0}
    if head == "tokens":
        labels = np.where(MASK, RNG.integers(0, 3, (2, T)), -100)
        return {"labels": labels}, Labels("tokens"), (labels, labels >= 0), {"label": float((labels >= 0).sum())}
    labels = np.array([2, 1])
    return {"labels": labels}, Labels(head), (labels, labels >= 0), {"label": 2.0}


def their_logits(head, out):
    if head == "span":
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.prediction_logits if head == "pretraining" else out.logits


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("kind, head", CASES)
def test_equals_transformers(kind, head, precision, tmp_path, monkeypatch):
    if precision == "fp64":
        use_doubles(monkeypatch)
    tolerance = {"rtol": BOUNDS[precision], "atol": BOUNDS[precision]}
    close = lambda a, b, msg="": np.testing.assert_allclose(np.asarray(a), np.asarray(b), err_msg=msg, **tolerance)
    theirs = make(kind, head, DTYPES[precision])
    theirs.save_pretrained(tmp_path / "in")
    inputs = inputs_of(kind, head)
    tensors = {k: torch.tensor(v) for k, v in inputs.items()}
    real = inputs["attention_mask"].reshape(-1, T).astype(bool)
    with jax.enable_x64(precision == "fp64"):
        ours = interop.load(tmp_path / "in")
        run = jax.jit(
            lambda p: ours.model.apply({"params": p}, **inputs, output_hidden_states=True, output_attentions=True)
        )
        out = run(ours.params)
        labels, objective, targets, totals = (None,) * 4 if head == "none" else labels_of(kind, head)
        more = {} if labels is None else {k: torch.tensor(v) for k, v in labels.items()}
        want = theirs(**tensors, **more, output_hidden_states=True, output_attentions=True)
        for a, b in zip(out.hidden_states, want.hidden_states, strict=True):
            close(a[real], b.detach()[real])
        for a, b in zip(out.attentions, want.attentions, strict=True):
            a, b = (np.moveaxis(np.asarray(x), 2, 1)[real] for x in (a, b.detach()))
            close(a, b)
        if head == "none":
            if out.pooler_output is not None:
                close(out.pooler_output, want.pooler_output.detach())
            return
        a, b = np.asarray(out.logits), their_logits(head, want).detach().numpy()
        close(*((a[real], b[real]) if a.shape[:2] == real.shape and head != "choice" else (a, b)))
        if head == "pretraining":
            close(out.pair_logits, (want.seq_relationship_logits if kind == "bert" else want.sop_logits).detach())

        def loss(params):
            out = ours.model.apply({"params": params}, **inputs)
            wide = jax.tree.map(jnp.asarray, totals)
            return total_loss(objective, objective.score(out, targets), wide).astype(out.logits.dtype)

        value, grads = jax.jit(jax.value_and_grad(loss))(ours.params)
        close(value, want.loss.detach())
        want.loss.backward()
        check_gradients(grads, theirs, tmp_path / "grads", BOUNDS[precision])


@pytest.mark.parametrize("kind, head", CASES)
def test_export_loads_in_transformers(kind, head, tmp_path):
    theirs = make(kind, head, torch.float32)
    assert exported(theirs, tmp_path).config.id2label == theirs.config.id2label
