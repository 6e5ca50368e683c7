"""A bank gives every row what its own adapter alone gives it: in a pass, in decoding, over float and int8 bases."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from delta_cells import filled
from tiny_models import noise

from llm_jax.compress.quantize import quantize
from llm_jax.decoding.beam import BeamConfig, BeamSearch
from llm_jax.decoding.generate import Generator
from llm_jax.decoding.serving import lay_out_params
from llm_jax.delta import bank, dora, lora, node
from llm_jax.delta.describe import describe
from llm_jax.delta.lora import Lora, LoraConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import paths, ports, weights
from llm_jax.nn.stack import unstack
from llm_jax.nn.weights import Axes

LLAMA = LlamaConfig(vocab_size=31, context_length=32, model_dim=24, num_layers=2, num_heads=4, num_kv_heads=2,
                    hidden_dim=40)  # fmt: skip
BERT = tiny_models.ENCODERS["bert"]
ADAPTERS = {  # other targets, ranks, scales and layers each
    "all": LoraConfig(rank=3, alpha=6.0, targets=("embed/embedding", *weights.LAYER_KERNELS)),
    "feeds": LoraConfig(rank=2, alpha=1.0, targets=("mlp",)),
    "layered": LoraConfig(
        rank=1, ranks=("layers[1].attention=4",), alphas=("layers[0].attention=3",), targets=("attention",)
    ),
}
EACH = {name: config for name, config in ADAPTERS.items() if name != "layered"}  # an encoder's layers are its own
ROWS = ["feeds", "base", "all", "layered", "all"]
RNG = np.random.default_rng(0)


@functools.cache
def base(config, quantized=False):
    params = noise(config.make(), 0.3)
    return jax.jit(quantize)(params) if quantized else params


@functools.cache
def adapters(config, quantized=False, unstacked=False):
    found = {}
    for i, (name, how) in enumerate(ADAPTERS.items() if config == LLAMA else EACH.items()):
        tree = filled(lora.attach(base(config, quantized), how, jax.random.key(i)), i)
        found[name] = unstack(tree) if unstacked else tree
    plain = base(config, quantized)
    found["base"] = unstack(plain) if unstacked else plain
    return found


def banked(config, quantized=False, unstacked=False):
    return bank.make({k: v for k, v in adapters(config, quantized, unstacked).items() if k != "base"})


def ids_of(rows, length, config=LLAMA):
    return RNG.integers(0, config.vocab_size, (rows, length)).astype(np.int32)


def close(a, b, bound=1e-6):
    scale = np.abs(np.asarray(b)).max()
    np.testing.assert_allclose(a, b, rtol=0, atol=bound * scale)


@pytest.mark.parametrize(
    "quantized, unstacked, length",  # 35 and 80 tokens: both ways of `by_row`
    [(False, False, 7), (False, False, 16), (False, True, 7), (True, False, 7)],
    ids=["stacked", "many tokens", "unstacked", "int8"],
)
def test_rows_equal_each_row_with_its_own_adapter(quantized, unstacked, length):
    params, names = banked(LLAMA, quantized, unstacked)
    ids = ids_of(len(ROWS), length)
    found = tiny_models.logits(LLAMA, bank.choose(params, ROWS, names), ids)
    alone = {
        name: np.asarray(tiny_models.logits(LLAMA, tree, ids))
        for name, tree in adapters(LLAMA, quantized, unstacked).items()
    }
    for row, name in enumerate(ROWS):
        close(found[row], alone[name][row])
        assert all(np.abs(alone[other][row] - alone[name][row]).max() > 1e-2 for other in alone if other != name)
    if length == 7:
        for name in ("all", "base"):  # one for all
            close(tiny_models.logits(LLAMA, bank.choose(params, name, names), ids), alone[name])


def test_an_encoder_reads_a_padded_batch():
    params, names = banked(BERT)
    ids, mask = ids_of(3, 6, BERT), np.arange(6) < np.array([[6], [3], [4]])
    run = jax.jit(lambda p: BERT.make().apply({"params": p}, ids, attention_mask=mask).last_hidden_state)
    found = run(bank.choose(params, ["all", "feeds", "base"], names))
    for row, name in enumerate(["all", "feeds", "base"]):
        close(found[row][mask[row]], run(adapters(BERT)[name])[row][mask[row]])


PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
CHOSEN = ["layered", "all", "base"]


def test_decoding_equals_each_prompt_alone_and_swapping_compiles_nothing():
    params, names = banked(LLAMA)
    model, key = LLAMA.make(), jax.random.key(0)
    generator, plain = Generator(model, bank.choose(params, CHOSEN, names)), Generator(model, base(LLAMA))

    def alone(tree, prompt):
        plain.params = lay_out_params(node.merge(tree) if node.of(tree) else tree)
        return plain.generate([prompt], 6, key)[0]

    found = generator.generate(PROMPTS, 6, key)
    for row, name in enumerate(CHOSEN):
        want = alone(adapters(LLAMA)[name], PROMPTS[row])
        assert found[row].tokens == want.tokens
        np.testing.assert_allclose(found[row].logprobs, want.logprobs, rtol=1e-5, atol=1e-5)
    generator.params = bank.choose(generator.params, CHOSEN[::-1], names)
    turned = generator.generate(PROMPTS[::-1], 6, key)
    assert [x.tokens for x in turned] == [x.tokens for x in found[::-1]]
    other = filled(lora.attach(base(LLAMA), LoraConfig(rank=2, targets=("mlp",)), key), 9)
    generator.params = bank.put(generator.params, "all", other, names)  # of a stacked tree into one laid out
    swapped = generator.generate(PROMPTS[::-1], 6, key)
    assert [x.tokens for x in swapped[::2]] == [x.tokens for x in turned[::2]]
    want = alone(other, PROMPTS[1])
    np.testing.assert_allclose(swapped[1].logprobs, want.logprobs, rtol=1e-5, atol=1e-5)
    assert want.tokens == swapped[1].tokens and want.logprobs != found[1].logprobs
    assert generator._start._cache_size() == generator._advance._cache_size() == 1


def test_beams_keep_the_adapter_of_their_prompt():
    params, names = banked(LLAMA)
    chosen = bank.choose(params, CHOSEN[1:], names)
    found = BeamSearch(LLAMA.make(), chosen, (), BeamConfig(3)).search(PROMPTS[1:], 4)
    plain = BeamSearch(LLAMA.make(), base(LLAMA), (), BeamConfig(3))
    for hypotheses, prompt, name in zip(found, PROMPTS[1:], CHOSEN[1:], strict=True):
        tree = adapters(LLAMA)[name]
        plain.params = lay_out_params(node.merge(tree) if node.of(tree) else tree)
        ((want,),) = plain.search([prompt], 4)
        assert hypotheses[0].tokens == want.tokens
        assert abs(hypotheses[0].logprob - want.logprob) < 1e-4


def test_an_adapter_comes_out_as_it_went_in():
    params, names = banked(LLAMA)
    for name in names:
        out = node.of(bank.adapter(params, name, names))
        want = dict(paths.flatten(adapters(LLAMA)[name], weights.is_node))
        for path, w in out.items():  # wherever any adapter has LoRA
            np.testing.assert_allclose(w.dense(), weights.dense(want[path]), rtol=1e-6, atol=1e-6)


def node_of(rows):
    """A bank over a 6 x 5 matrix, the adapters' matrices, and the choice of `rows`."""
    rng = np.random.default_rng(1)
    w, a, b = (rng.normal(size=s).astype(np.float32) for s in ((6, 5), (6, 3, 2), (3, 2, 5)))
    scales = np.array([0.5, -1.0, 2.0], np.float32)
    dense = np.stack([*(w + s * a[:, k] @ b[k] for k, s in enumerate(scales)), w])
    return bank.Bank(w, a, b, scales, jnp.asarray(rows, jnp.int32)), dense


@pytest.mark.parametrize("rows, length", [([2, -1, 0, 1], 1), ([2, -1, 0, 1], 30), ([1], 2)])  # the last: K > 2 B
def test_every_product_of_the_node_is_that_of_its_matrices(rows, length):
    w, dense = node_of(rows)
    x = np.random.default_rng(2).normal(size=(len(rows), length, 6)).astype(np.float32)
    ids = np.random.default_rng(3).integers(0, 6, (len(rows), length))
    run = jax.jit(
        lambda w: (
            weights.matmul(x, w),
            weights.matmul_t(x[..., :5], w),
            weights.take(w, ids),
            weights.matmul(x[:, 0], w),
        )
    )
    for got in (run(w), run(jax.jit(lambda w, ids: bank.choose({"k": w}, ids)["k"])(w, jnp.asarray(rows)))):
        for row, k in enumerate(rows):
            np.testing.assert_allclose(got[0][row], x[row] @ dense[k], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(got[1][row], x[row, :, :5] @ dense[k].T, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(got[2][row], dense[k][ids[row]], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(got[3][row], x[row, 0] @ dense[k], rtol=1e-5, atol=1e-5)
    wrong = [np.asarray(x) for x in run(w.replace(ids=jnp.asarray([3, -2, 2, 1][: len(rows)])))]  # not refused: traced
    bad = min(2, len(rows))
    assert all(np.isnan(x[:bad]).all() and np.isfinite(x[bad:]).all() for x in wrong)


@pytest.mark.parametrize("length", [1, 30])
def test_a_row_without_an_adapter_never_meets_one(length):
    """In half precision the product with the first adapter, whose matrix would be copied for it, is infinite."""
    w, _ = node_of([-1, -1, -1, -1])
    w = w.replace(a=w.a * 1e4).cast(jnp.float16)
    x = jnp.full((4, length, 6), 10, jnp.float16)
    np.testing.assert_array_equal(weights.matmul(x, w), weights.matmul(x, w.base))


def test_a_bank_is_stored_with_its_structure():
    w, _ = node_of([0, 1])
    for tree in ({"k": w}, {"k": w.replace(ids=None)}):
        text = json.dumps(weights.structure(tree))
        flat = dict(paths.flatten(tree))
        back = weights.build(json.loads(text)["k"], flat.__getitem__, "k")
        assert jax.tree.structure(back) == jax.tree.structure(tree["k"])
        assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True))
    assert "a bank of LoRAs" in describe(bank.make({"a": adapters(LLAMA)["all"]})[0])


def test_sizes_and_axes():
    w, _ = node_of([0, 1])
    axes = weights.axes_of(w, Axes("embed", "mlp"))
    assert (axes.base, axes.a, axes.b) == (Axes("embed", "mlp"), Axes("embed", None, None), Axes(None, None, "mlp"))
    assert (axes.scales, axes.ids) == (Axes(None), Axes(None))
    stacked = bank.Bank(*(jnp.stack([jnp.asarray(x)] * 2) for x in jax.tree.leaves(w)))
    axes = weights.axes_of(stacked, Axes("layers", "embed", "mlp"))
    assert axes.a == Axes("layers", "embed", None, None) and axes.ids == Axes("layers", None)
    assert jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, Axes)) == jax.tree.structure(stacked)
    cast = weights.cast(w, jnp.bfloat16)
    assert cast.a.dtype == cast.b.dtype == cast.base.dtype == jnp.bfloat16
    assert cast.scales.dtype == jnp.float32 and cast.ids.dtype == jnp.int32


def two(name="b", **changes):
    """A bank of the adapter "a" and another."""
    one = lora.attach(base(LLAMA), LoraConfig(rank=2, targets=("mlp",)), jax.random.key(0))
    other = lora.attach(base(LLAMA), LoraConfig(rank=3, targets=("mlp.up",)), jax.random.key(1))
    return bank.make({"a": one, name: changes["change"](other) if changes else other})


def elsewhere(params):
    moved = {**params["decoder"], "final_norm": {"scale": params["decoder"]["final_norm"]["scale"] + 1}}
    return {**params, "decoder": moved}


def spoiled(params):
    break_ = lambda w: w.replace(a=w.a.at[0, 0, 0].set(jnp.nan)) if isinstance(w, Lora) else w
    return jax.tree.map(break_, params, is_leaf=weights.is_node)


def run_rows(rows, ids=ids_of(4, 5)):
    params, names = two()
    chosen = params if rows is None else bank.choose(params, rows, names)
    return jax.eval_shape(lambda p: LLAMA.make().apply({"params": p}, ids).logits, chosen)


XLNET = XLNetConfig(vocab_size=31, model_dim=12, num_layers=2, num_heads=3, hidden_dim=10)
at = lambda targets, rank=2, config=LLAMA: lora.attach(
    base(config), LoraConfig(rank=rank, targets=targets), jax.random.key(5)
)
ERRORS = [
    (lambda: bank.make({}), "one adapter at least"),
    (lambda: two("base"), "cannot be called 'base'"),
    (lambda: bank.make({"a": base(LLAMA)}), "adapter 'a' has no LoRA"),
    (lambda: two(change=dora.attach), "adapter 'b' carries DoRA at decoder/layers/mlp/up/kernel"),
    (lambda: two(change=unstack), "stack or unstack both"),
    (lambda: two(change=spoiled), "adapter 'b' holds numbers at decoder/layers/mlp/up/kernel that are not finite"),
    (lambda: bank.make({"a": at(("attention",), config=XLNET)}), "leave it out of targets"),
    (lambda: bank.choose(base(LLAMA), ["a"]), "there is no bank"),
    (lambda: run_rows(["a", "c", "b", "base"]), "adapter 'c' is not in the bank: there are a, b, base"),
    (lambda: run_rows([0, 1, 2, -1]), "adapter 2 is not in the bank: there are 0 to 1, and -1 for none"),
    (lambda: bank.choose(two()[0], "a", ("a",)), "1 names for a bank of 2 adapters"),
    (lambda: run_rows(["a", "b"]), "chosen for 2 rows, and a product has 4"),
    (lambda: run_rows(None), "no adapter of the bank is chosen"),
    (lambda: bank.put(two()[0], "a", at(("attention",)), ("a", "b")), "where the bank has none: make a new bank"),
    (lambda: bank.put(two()[0], 0, at(("mlp.down",), 3)), "has rank 3 at decoder/layers/mlp/down/kernel, the bank 2"),
    (lambda: bank.put(two()[0], "base", at(("mlp",)), ("a", "b")), "have no place in the bank"),
    (lambda: node.merge(bank.choose(two()[0], 0)), "a bank of LoRAs cannot be merged"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


class Shift(ports.PortNode):
    """Adds a vector."""

    value: Any

    def __call__(self, x, residual, norm, key):
        return x + jnp.broadcast_to(self.value, x.shape)


def test_nodes_in_ports_must_be_the_same():
    def at_port(params, value):
        mlp = {**params["decoder"]["layers"]["mlp"], "adapter": Shift(jnp.full((2, 24), value))}
        return {**params, "decoder": {**params["decoder"], "layers": {**params["decoder"]["layers"], "mlp": mlp}}}

    a, b = (lora.attach(base(LLAMA), LoraConfig(rank=2, targets=("mlp.up",)), jax.random.key(i)) for i in (0, 1))
    bank.make({"a": at_port(a, 0.5), "b": at_port(b, 0.5)})
    with pytest.raises(ValueError, match="'b' was made for another base.*mlp/adapter differs"):
        bank.make({"a": at_port(a, 0.5), "b": at_port(b, 0.25)})
    with pytest.raises(ValueError, match="'b' misses decoder/layers/mlp/adapter, unlike the others"):
        bank.make({"a": at_port(a, 0.5), "b": b})


def test_an_adapter_of_another_base_is_refused():
    params = base(LLAMA)
    other = paths.map_with_path(lambda p, x: x.at[1, 0, 0].add(1e-3) if p.endswith("up/kernel") else x, params)
    attached = lora.attach(other, LoraConfig(rank=2, targets=("mlp",)), jax.random.key(0))
    with pytest.raises(ValueError, match="made for another base.*decoder/layers/mlp/up/kernel differs"):
        bank.make({"a": at(("mlp",)), "b": attached})
    with pytest.raises(ValueError, match="made for another base"):
        bank.put(two()[0], 0, attached)
    wide = dataclasses.replace(LLAMA, hidden_dim=48)
    with pytest.raises(ValueError, match="made for another base.*is \\(2, 48, 24\\), not \\(2, 40, 24\\)"):
        bank.make({"a": at(("mlp",)), "b": at(("mlp",), config=wide)})
