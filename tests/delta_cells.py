"""Methods of delta tuning on families: one table of cells, and the properties that every cell is held to.

A method is a row of `METHODS`, a family a row of `FAMILIES`. What cannot be is refused with the words of `impossible`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny_models import ENCODER_DECODERS, ENCODERS, MODELS, V, model_params

from llm_jax.delta import lora, methods, node
from llm_jax.delta.lora import LayeredLora, Lora, LoraConfig
from llm_jax.delta.methods import BitFitConfig, DeltaConfig, Ia3Config
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Params
from llm_jax.training.trainable import combine, partition

B, T = 2, 6
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, V, (B, T)).astype(np.int32)
FAMILIES: dict[str, Any] = {
    "gpt2": MODELS["gpt2"],
    "llama": MODELS["llama"],
    "bert": ENCODERS["bert"],
    "roberta": ENCODERS["roberta"],
    "distilbert": ENCODERS["distilbert"],
    "albert": ENCODERS["albert"],
    "t5": ENCODER_DECODERS["t5"],
    "xlnet": XLNetConfig(vocab_size=V, model_dim=12, num_layers=2, num_heads=3, hidden_dim=10, dropout=0.0),
    "transformer": ENCODER_DECODERS["transformer"],
}
BASES = ("float", "int8")
LORA = LoraConfig(rank=3, alpha=6.0)


class Method(NamedTuple):
    """A row of the table.

    Attributes:
      config: what is attached.
      rtol: how near the outputs are at the start; None where nothing is promised.
      merges: whether it folds into the base of every family.
    """

    config: DeltaConfig
    rtol: float | None = 1e-5
    merges: bool = True


METHODS = {
    "lora": Method(DeltaConfig(LORA)),
    "rslora": Method(DeltaConfig(dataclasses.replace(LORA, rs=True))),
    "lora, some layers": Method(DeltaConfig(dataclasses.replace(LORA, targets=("layers[1:]",)))),
    "lora, ranks": Method(DeltaConfig(dataclasses.replace(LORA, ranks=("layers[0].mlp=2",), alphas=("mlp=9",)))),
    "lora-fa": Method(DeltaConfig(dataclasses.replace(LORA, freeze_a=True))),
    "dora": Method(DeltaConfig(dataclasses.replace(LORA, dora=True))),
    "pissa": Method(DeltaConfig(dataclasses.replace(LORA, start="pissa")), 1e-4),
    "olora": Method(DeltaConfig(dataclasses.replace(LORA, start="olora")), 1e-4),
    "loftq": Method(DeltaConfig(dataclasses.replace(LORA, start="loftq")), None),
    "ia3": Method(DeltaConfig(ia3=Ia3Config())),
    "bitfit": Method(DeltaConfig(bitfit=BitFitConfig()), merges=False),
    "norms": Method(DeltaConfig(norms=True)),
    "token rows": Method(DeltaConfig(token_rows=(1, 5))),
    "lora, ia3, norms, rows": Method(DeltaConfig(LORA, Ia3Config(), None, True, (1, 5))),
}
DECODERS = ("gpt2", "llama")


def impossible(method: str, base: str) -> str | None:
    """Words of the error that refuses a cell; None where it runs."""
    chosen = METHODS[method].config.lora
    if base == "int8" and chosen is None:
        return "a quantized base needs lora"
    if base == "int8" and chosen is not None and chosen.start != "zero":
        return f"start={chosen.start} needs a plain matrix"
    return None


@functools.cache
def plain(family: str) -> Params:
    """The family's parameters, on the host."""
    return model_params(FAMILIES[family], std=0.2)


@functools.cache
def attached(method: str, family: str, base: str) -> Params:
    """The family's parameters with the method on them, as they start."""
    config = METHODS[method].config

    def make(params: Params) -> Params:
        params = methods.quantized(params, config) if base == "int8" else params
        return methods.attach(params, config, jax.random.key(0))

    return jax.device_get(jax.jit(make)(plain(family)))


@functools.partial(jax.jit, static_argnums=0)
def outputs(config: Any, params: Params) -> jax.Array:
    """Logits, or the last states where a family has none here."""
    inputs = (IDS, IDS[:, :4]) if config.reads == "source" else (IDS,)
    out = config.make().apply({"params": params}, *inputs)
    return out.last_hidden_state if out.logits is None else out.logits


@functools.cache
def quantized_outputs(method: str, family: str) -> np.ndarray:
    """Outputs of the int8 base alone."""
    return np.asarray(outputs(FAMILIES[family], node.detach(attached(method, family, "int8"))))


@functools.cache
def trained(method: str, family: str, base: str) -> Params:
    """After one large step of gradient descent on what trains, which `methods.trainable` chooses."""
    config, params = FAMILIES[family], attached(method, family, base)
    chosen = methods.trainable(params, METHODS[method].config)

    @jax.jit
    def step(params: Params) -> Params:
        learn, frozen = partition(params, chosen)
        # A's gradient is zero while B is: first everything that trains moves a little
        learn = jax.tree.map(lambda x: x + 0.01 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), learn)
        learn = masked(learn, params)
        loss = lambda learn: jnp.square(outputs(config, combine(learn, frozen))).mean()
        updates = jax.grad(loss)(learn)
        return combine(optax.apply_updates(learn, jax.tree.map(lambda g: -g, updates)), frozen)

    return jax.device_get(step(params))


def masked(learn: Params, params: Params) -> Params:
    """Zeros where A and B are padding."""
    real = {}
    for path, w in node.of(params).items():
        for depth, delta in enumerate(node.layers_of(w)):
            if isinstance(delta, LayeredLora):
                columns, where = lora.columns(delta.ranks, delta.a.shape[-1]), path + "/base" * depth
                real |= {f"{where}/a": columns[:, None, :], f"{where}/b": columns[:, :, None]}
    return paths.map_with_path(lambda p, x: jnp.where(real[p], x, 0) if p in real else x, learn)


def filled(params: Params, seed: int) -> Params:
    """Random B for every LoRA, zero behind the real ranks, so that the update counts."""
    rng = np.random.default_rng(seed)

    def fill(w: Any) -> Any:
        if not isinstance(w, Lora):
            return w
        b = rng.normal(size=w.b.shape).astype(np.float32) * 0.2
        if ranks := lora.ranks_of(w):
            b *= lora.columns(ranks, w.a.shape[-1])[..., None]
        return w.replace(b=jnp.asarray(b))

    return jax.tree.map(fill, params, is_leaf=lambda x: isinstance(x, Lora))


def check_start(method: str, family: str, base: str) -> None:
    """Attaching changes no output."""
    if METHODS[method].rtol is None:
        return
    want = outputs(FAMILIES[family], plain(family)) if base == "float" else quantized_outputs(method, family)
    got = outputs(FAMILIES[family], attached(method, family, base))
    np.testing.assert_allclose(got, want, rtol=METHODS[method].rtol, atol=METHODS[method].rtol)


def check_training(method: str, family: str, base: str) -> None:
    """What should train moves, in every leaf; everything else keeps its bits, padding too."""
    before, after = (dict(paths.flatten(f(method, family, base))) for f in (attached, trained))
    chosen = set(paths.select(before, methods.trainable(attached(method, family, base), METHODS[method].config)))
    assert chosen
    for path, x in before.items():
        moved = not np.array_equal(x, after[path])
        assert moved == (path in chosen), path
    for path, w in node.of(trained(method, family, base)).items():
        for delta in node.layers_of(w):
            if isinstance(delta, LayeredLora):
                padding = ~lora.columns(delta.ranks, delta.a.shape[-1])
                assert not np.any(np.asarray(delta.a).swapaxes(-1, -2)[padding]), path
                assert not np.any(np.asarray(delta.b)[padding]), path


def check_merge(method: str, family: str, base: str) -> None:
    """Plain parameters with the deltas folded in give the same outputs; taken out again, the base is there."""
    params = trained(method, family, base)
    if not node.of(params):
        return
    config, want = FAMILIES[family], outputs(FAMILIES[family], params)
    merged = node.merge(params)
    assert not node.of(merged)
    np.testing.assert_allclose(outputs(config, merged), want, rtol=1e-4, atol=1e-5)


def check_stored(method: str, family: str, base: str) -> None:
    """Described and rebuilt from its arrays, a tree is the same to the bit, types and static fields too."""
    params = trained(method, family, base)
    described, arrays = weights.structure(params), dict(paths.flatten(params))
    flat = {
        path: weights.build(described[path], arrays.__getitem__, path) if weights.is_node(w) else w
        for path, w in paths.flatten(params, weights.is_node)
    }
    back = paths.nested(flat.items())
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True))


def check_decoding(method: str, family: str, base: str) -> None:
    """A token at a time through a cache gives the logits of one pass."""
    config, params = FAMILIES[family], trained(method, family, base)
    want = outputs(config, params)
    got = _decode(config, params)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def _decode(config: Any, params: Params) -> jax.Array:
    model = config.make()

    def one(cache: Any, ids: jax.Array) -> tuple[Any, jax.Array]:
        out = model.apply({"params": params}, ids[:, None], cache=cache)
        return out.cache, out.logits[:, 0]

    return jax.lax.scan(one, config.init_cache(B, T), IDS.T)[1].swapaxes(0, 1)


CHECKS = {"start": check_start, "training": check_training, "merge": check_merge, "stored": check_stored}
CELLS = [(m, f, b) for m in METHODS for f in FAMILIES for b in BASES]
FEW = [  # every method once and every family, in turn
    (
        method,
        list(FAMILIES)[(2 * i) % len(FAMILIES)],
        "int8" if i % 3 == 1 and impossible(method, "int8") is None else "float",
    )
    for i, method in enumerate(METHODS)
]
