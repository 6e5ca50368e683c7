"""Every parameter and every port of every family is read, and what no module reads is refused by its path."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.interpreters import partial_eval
from tiny_models import BERT, ENCODER_DECODERS, ENCODERS, MODELS, V

from llm_jax.decoding import predict
from llm_jax.decoding.beam import BeamSearch
from llm_jax.decoding.fill_mask import fill
from llm_jax.decoding.generate import Generator
from llm_jax.interop import save, save_own
from llm_jax.models import parameters
from llm_jax.models.bert import BertConfig
from llm_jax.models.elmo import ElmoConfig
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import paths, ports, weights
from llm_jax.nn.stack import unstack

FAMILIES: dict[str, Any] = {
    **{name: MODELS[name] for name in ("gpt2", "gpt_deberta", "qwen3")},
    **{name: ENCODERS[name] for name in ("bert", "albert")},
    **{name: ENCODER_DECODERS[name] for name in ("transformer", "t5_1.1")},
    "xlnet": XLNetConfig(vocab_size=V, model_dim=12, num_layers=2, num_heads=3, hidden_dim=10),
    "elmo": ElmoConfig(vocab_size=V, max_characters=9, character_dim=3, widths=(1, 2), filters=(2, 3), num_highways=1,
                       model_dim=6, hidden_dim=8, num_layers=2),
}  # fmt: skip


class Shift(ports.PortNode):
    """Adds a vector."""

    value: Any

    def __call__(self, x, residual, norm, key):
        return x + self.value.reshape(1, 1, -1)


def with_ports(config, name=None):
    """Abstract parameters with a node at every port, and how many; `name` instead of a port's where given."""
    items, count = dict(paths.flatten(parameters.declared(config)[0])), 0
    for module in {p.rpartition("/")[0].rpartition("/")[0] for p in items}:
        if module.split("/")[-1] in ports.SUBLAYERS:
            lead = config.num_groups or 0 if hasattr(config, "num_groups") else 0
            depth = lead or getattr(config, "depth", (config.num_layers,) * 2)["decoder" in module]
            node = Shift(jax.ShapeDtypeStruct((depth, config.model_dim), np.float32))
            items |= {f"{module}/{port}": node for port in ([name] if name else ports.PORTS)}
            count += len(ports.PORTS)
    return paths.nested(items.items()), count


@pytest.mark.parametrize("name", FAMILIES)
def test_every_port_is_read(name):
    """Whether an output depends on an input is seen in the traced program, without compiling it."""
    config = FAMILIES[name]
    params, count = with_ports(config)
    assert count or name == "elmo"
    ids = np.ones((2, 3, 9) if name == "elmo" else (2, 3), np.int32)
    inputs = (ids, ids) if config.reads == "source" else (ids,)
    last = lambda p: config.make().apply({"params": p}, *inputs).last_hidden_state
    program = jax.make_jaxpr(last)(params).jaxpr
    used = partial_eval.dce_jaxpr(program, [True])[1]
    unread = [path for (path, _), is_read in zip(paths.flatten(params), used, strict=True) if not is_read]
    assert not [path for path in unread if any(port in path for port in ports.PORTS)]
    parameters.check(config.make(), params)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_no_module_reads_is_refused(name):
    config = FAMILIES[name]
    declared = parameters.declared(config)[0]
    leaf = jax.ShapeDtypeStruct((2, 3), np.float32)
    elsewhere = dict(paths.flatten(declared))
    some = next(p for p in elsewhere if p.endswith("kernel"))
    wrong = {
        some.replace("kernel", "gate"): leaf,
        f"{some}/more": leaf,
        some: Shift(leaf),
        f"{some.rpartition('/')[0]}/adapter": Shift(leaf),
        "classifier_2/kernel": leaf,
        "logits_scale": leaf,
    }
    for path, node in wrong.items():
        items = {k: v for k, v in elsewhere.items() if not path.startswith(f"{k}/")} | {path: node}
        with pytest.raises(ValueError, match=f"no module reads {path} "):
            parameters.check(config.make(), paths.nested(items.items()))
    if name != "elmo":
        with pytest.raises(ValueError, match="no module reads .*/prefix .Shift.: it would change nothing"):
            parameters.check(config.make(), with_ports(config, "prefix")[0])


def test_both_forms_of_a_stack_and_structured_weights_are_known():
    config = ENCODER_DECODERS["t5"]
    fill_in = lambda path, x: np.zeros(x.shape, x.dtype)
    params = paths.map_with_path(fill_in, parameters.declared(config)[0])
    turned = weights.replace(unstack(params), "query/kernel", lambda _, w: weights.Transposed(w.T))
    turned["decoder"]["layers"]["1"]["mlp"]["adapter"] = Shift(np.zeros(12))
    turned["decoder"]["per_layer"] = {"0": {"attention": {"adapter": Shift(np.zeros(12))}}}
    parameters.check(config.make(), turned)
    turned["decoder"]["layers"]["1"]["mlp"]["prefix"] = Shift(np.zeros(12))
    with pytest.raises(ValueError, match="no module reads decoder/layers/1/mlp/prefix"):
        parameters.check(config.make(), turned)


def test_every_entrance_checks(tmp_path):
    """Generation, search, masks, labels and saving ask before anything is compiled."""

    def given(config):
        declared = parameters.declared(config)[0]
        params = paths.map_with_path(lambda _, x: np.zeros(x.shape, x.dtype), declared)
        return config.make(), {**params, "spare": {"kernel": np.zeros((2, 2), np.float32)}}

    decoder, encoder = given(MODELS["gpt2"]), given(ENCODERS["bert"])
    tagger = given(BertConfig(**BERT, head="tokens", pooler=None))
    calls = [
        lambda: Generator(*decoder),
        lambda: BeamSearch(*decoder),
        lambda: fill(*encoder, np.ones((1, 2), int), np.ones((1, 2), int)),
        lambda: predict.predict(*tagger, None, [("a",)]),  # type: ignore[arg-type]
        lambda: save_own(tmp_path, *decoder),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"no module reads spare/kernel \(an array of shape \[2, 2\]\)"):
            call()
    with pytest.raises(ValueError, match="spare/kernel have no place in that format"):
        save(tmp_path, *decoder)


def test_parameters_as_they_are_initialised_are_known():
    """With the boxes that carry their logical axes."""
    model = MODELS["gpt2"].make()
    parameters.check(model, jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), int))["params"])
