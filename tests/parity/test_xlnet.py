"""XLNet equals transformers: both streams, memories, segments, heads, loss and gradients; and exports load back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from theirs import BOUNDS, DTYPES, exported, gradients, noisy, use_doubles

from llm_jax import interop
from llm_jax.interop.huggingface.xlnet import CLASSES
from llm_jax.nn import paths
from llm_jax.objectives.labels import Labels
from llm_jax.objectives.objective import total_loss

SIZES = dict(vocab_size=61, d_model=36, n_layer=3, n_head=3, d_inner=50, use_mems_eval=False)
OPTIONS = {
    "plain": {},
    "clamped": dict(clamp_len=5),
    "backwards": dict(bi_data=True),
    "causal": dict(attn_type="uni"),
    "same_length": dict(attn_type="uni", same_length=True),
}
RNG = np.random.default_rng(0)
T, K = 14, 5
IDS = RNG.integers(5, 61, (2, T))
MASK = np.array([[1] * T, [0] * 3 + [1] * (T - 3)])  # they pad on the left
TYPES = RNG.integers(0, 2, (2, T))
# targets: the last K of an order; the rest is seen by all
TARGETS = np.stack([np.array([4, 11, 7, 9, 13]), np.array([12, 5, 6, 10, 8])])
ORDER = np.full((2, T), -1)
np.put_along_axis(ORDER, TARGETS, np.arange(K)[None], 1)
PERM = ((ORDER[:, :, None] <= ORDER[:, None, :]) & (ORDER[:, None, :] >= 0)).astype(np.float32)
MAPPING = (np.arange(T) == TARGETS[..., None]).astype(np.float32)
LABELS = np.take_along_axis(IDS, TARGETS, 1)


def make(dtype, head="lm", **options):
    options = {**SIZES, **options}
    labels = {"num_labels": 3} if head in ("classification", "tokens") else {}
    config = transformers.XLNetConfig(**options, **labels)
    return noisy(lambda: getattr(transformers, CLASSES[head])(config), dtype)


def cross_entropy(logits, labels):
    logp = jax.nn.log_softmax(logits.astype(jnp.promote_types(jnp.float32, logits.dtype)))
    return -jnp.mean(jnp.take_along_axis(logp, labels[..., None], -1))


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_two_streams_equal_transformers(name, precision, tmp_path, monkeypatch):
    if precision == "fp64":
        use_doubles(monkeypatch)
    tolerance = {"rtol": BOUNDS[precision], "atol": BOUNDS[precision]}
    close = lambda a, b, msg="": np.testing.assert_allclose(np.asarray(a), np.asarray(b), err_msg=msg, **tolerance)
    theirs = make(DTYPES[precision], **OPTIONS[name])
    theirs.save_pretrained(tmp_path / "in")
    call = dict(token_type_ids=TYPES, perm_mask=PERM, target_mapping=MAPPING, attention_mask=MASK)
    # theirs reverses the second half of any batch; here the batch says which rows are reversed
    ours_only = {"backwards": np.array([False, True])} if name == "backwards" else {}
    real, labels, every = MASK.astype(bool), LABELS, 2
    if "attn_type" in OPTIONS[name]:  # theirs fails there on any other mask
        call, real, labels, every = dict(token_type_ids=TYPES), np.ones_like(MASK, bool), IDS, 1
    tensors = {k: torch.tensor(v, dtype=None if v.dtype == int and k != "attention_mask" else DTYPES[precision])
               for k, v in call.items()}  # fmt: skip
    want = theirs(torch.tensor(IDS), **tensors, labels=torch.tensor(labels), output_hidden_states=True)
    with jax.enable_x64(precision == "fp64"):
        ours = interop.load(tmp_path / "in")
        apply = lambda p, **more: ours.model.apply({"params": p}, IDS, **call, **ours_only, **more)
        run = jax.jit(lambda p: apply(p, output_hidden_states=True))
        out = run(ours.params)
        for a, b in zip(out.hidden_states, want.hidden_states[::every], strict=True):
            close(np.asarray(a)[real], b.detach()[real])
        close(out.last_hidden_state, want.hidden_states[-1].detach())
        close(out.logits, want.logits.detach())
        loss = lambda p: cross_entropy(apply(p).logits, labels)
        value, grads = jax.jit(jax.value_and_grad(loss))(ours.params)
        close(value, want.loss.detach())
        want.loss.backward()
        expected = gradients(theirs, tmp_path / "grads")
        for path, g in paths.flatten(grads):
            close(g, expected[path], path)


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("reuse", [None, 6])
def test_memories_equal_transformers(reuse, precision, tmp_path, monkeypatch):
    """Three rows one after the other, the memory filling up and then forgetting; attentions too."""
    if precision == "fp64":
        use_doubles(monkeypatch)
    tolerance = {"rtol": BOUNDS[precision], "atol": BOUNDS[precision]}
    close = lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance)
    theirs = make(DTYPES[precision], mem_len=20, reuse_len=reuse, use_mems_eval=True)
    theirs.save_pretrained(tmp_path)
    with jax.enable_x64(precision == "fp64"):
        ours = interop.load(tmp_path)
        run = jax.jit(lambda p, ids, cache: ours.model.apply({"params": p}, ids, cache=cache, output_attentions=True))
        cache, mems = ours.config.init_carry(2, "float64" if precision == "fp64" else "float32"), None
        for step in range(3):
            ids = np.roll(IDS, step, axis=1)
            want = theirs(torch.tensor(ids), mems=mems, output_attentions=True)
            mems = want.mems
            out = run(ours.params, ids, cache)
            cache = out.cache
            close(out.logits, want.logits.detach())
            held = mems[0].shape[0]
            assert cache.length_B.tolist() == [held] * 2
            for a, b in zip(cache.layers, mems, strict=True):
                close(np.asarray(a)[:, 20 - held :], b.permute(1, 0, 2).detach())
            seen = want.attentions[0].shape[-1]
            for a, b in zip(out.attentions, want.attentions, strict=True):
                close(np.asarray(a)[..., -seen:], b.detach())


@pytest.mark.parametrize("precision", BOUNDS)
def test_left_to_right_equals_transformers_with_that_order(precision, tmp_path, monkeypatch):
    """Theirs needs a token in the place that is predicted, which nobody sees."""
    if precision == "fp64":
        use_doubles(monkeypatch)
    theirs = make(DTYPES[precision])
    theirs.save_pretrained(tmp_path)
    call = dict(perm_mask=np.triu(np.ones((2, T, T))), target_mapping=np.tile(np.eye(T)[1:], (2, 1, 1)))
    want = theirs(torch.tensor(IDS), **{k: torch.tensor(v, dtype=DTYPES[precision]) for k, v in call.items()}).logits
    with jax.enable_x64(precision == "fp64"):
        ours = interop.load(tmp_path)
        cache = ours.config.init_cache(2, T, ours.params["query"].dtype)
        logits = jax.jit(lambda p, c: ours.model.apply({"params": p}, IDS[:, :-1], cache=c).logits)(ours.params, cache)
    np.testing.assert_allclose(logits, want.detach(), rtol=BOUNDS[precision], atol=BOUNDS[precision])


@pytest.mark.parametrize("head", ["none", "classification", "tokens", "span", "choice"])
def test_heads_equal_transformers(head, tmp_path):
    close = lambda a, b, msg="": np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=msg)
    theirs = make(torch.float32, head)
    theirs.save_pretrained(tmp_path / "in")
    ours = interop.load(tmp_path / "in")
    shape = (2, 4, T) if head == "choice" else (2, T)
    call = {"input_ids": RNG.integers(5, 61, shape), "token_type_ids": RNG.integers(0, 2, shape)}
    labels = {"span": np.array([[2, 5], [0, 10]]), "tokens": RNG.integers(0, 3, (2, T))}.get(head, np.array([2, 1]))
    named = {"start_positions": labels[:, 0], "end_positions": labels[:, 1]} if head == "span" else {"labels": labels}
    named = {} if head == "none" else {k: torch.tensor(v) for k, v in named.items()}
    want = theirs(**{k: torch.tensor(v) for k, v in call.items()}, **named)
    out = ours.model.apply({"params": ours.params}, **call)
    if head == "none":
        close(out.last_hidden_state, want.last_hidden_state.detach())
        return
    logits = torch.stack([want.start_logits, want.end_logits], -1) if head == "span" else want.logits
    close(out.logits, logits.detach())
    objective = Labels(head)

    def loss(params):
        prepared = objective.prepare({**call, "labels": labels}, jax.random.key(0))
        out = ours.model.apply({"params": params}, **prepared.inputs)
        return total_loss(objective, objective.score(out, prepared.targets), prepared.weights)

    value, grads = jax.value_and_grad(loss)(ours.params)
    close(value, want.loss.detach())
    want.loss.backward()
    expected = gradients(theirs, tmp_path / "grads")
    for path, g in paths.flatten(grads):
        close(g, expected[path], path)


@pytest.mark.parametrize("head", CLASSES)
def test_export_loads_in_transformers(head, tmp_path):
    theirs = make(torch.float32, head, mem_len=7, clamp_len=9)
    again = exported(theirs, tmp_path)
    assert (again.config.mem_len, again.config.clamp_len, again.config.id2label) == (7, 9, theirs.config.id2label)
