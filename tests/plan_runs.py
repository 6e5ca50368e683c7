"""Two optimizer steps of tiny models under a plan, as `training.run` makes them, and the same on one device."""

import dataclasses
import functools

import jax
import numpy as np
from tiny_models import ENCODER_DECODERS, ENCODERS, MODELS, V, abstract, model_params

from llm_jax.models.xlnet import XLNetConfig
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.permutation_lm import PermutationLM
from llm_jax.objectives.seq2seq import Seq2Seq
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.training.optimizers import OptimizerConfig, make_optimizer
from llm_jax.training.state import init_state
from llm_jax.training.step import StepConfig, make_train_step

ROWS, T = 16, 8
MODELS_HERE = {  # sizes that 8 devices divide, but for what a row is about
    "gpt": dataclasses.replace(
        MODELS["gpt_untied_padded"], model_dim=24, num_heads=3, hidden_dim=16, dropout=0.1, attention_dropout=0.1
    ),
    "llama": dataclasses.replace(
        MODELS["llama"], model_dim=16, num_heads=4, head_dim=8, hidden_dim=24, vocab_pad_multiple=8
    ),
    "deep": dataclasses.replace(
        MODELS["gpt_untied_padded"], model_dim=24, num_layers=5, num_heads=3, hidden_dim=16, dropout=0.1,
        attention_dropout=0.1,
    ),
    "deep_tied": dataclasses.replace(
        MODELS["llama"], model_dim=16, num_layers=4, num_heads=4, head_dim=8, hidden_dim=24, vocab_pad_multiple=8,
    ),
    "albert": dataclasses.replace(ENCODERS["albert"], model_dim=16, num_heads=4, hidden_dim=24),
    "bert": dataclasses.replace(
        ENCODERS["bert"], model_dim=16, num_heads=4, vocab_pad_multiple=8, dropout=0.0, attention_dropout=0.0
    ),
    "t5": dataclasses.replace(
        ENCODER_DECODERS["t5_1.1"], model_dim=16, num_heads=4, head_dim=8, hidden_dim=24, dropout=0.0
    ),
    "transformer": dataclasses.replace(
        ENCODER_DECODERS["transformer"], model_dim=16, num_heads=4, hidden_dim=24, dropout=0.0
    ),
    "xlnet": XLNetConfig(
        vocab_size=V, model_dim=16, num_layers=2, num_heads=4, hidden_dim=24, dropout=0.0, vocab_pad_multiple=8,
        memory_length=6,
    ),
    "xlnet_alone": XLNetConfig(
        vocab_size=V, model_dim=16, num_layers=2, num_heads=4, hidden_dim=24, dropout=0.1, vocab_pad_multiple=8
    ),
}  # fmt: skip
RNG = np.random.default_rng(0)
BATCHES = [
    {
        "input_ids": RNG.integers(0, V, (ROWS, T + 1)).astype(np.int32),
        "loss_weights": (RNG.random((ROWS, T + 1)) < 0.8).astype(np.float32),
    }
    for _ in range(2)
]
PADDED = (np.arange(T) < RNG.integers(3, T + 1, ROWS)[:, None]).astype(np.int32)
MASKED = [
    {
        "input_ids": RNG.integers(0, V, (ROWS, T)).astype(np.int32),
        "attention_mask": PADDED,
        "token_type_ids": (np.arange(T) > 2).astype(np.int32) * PADDED,
        "pair_labels": RNG.integers(0, 2, ROWS).astype(np.int32),
        "mask_seed": np.arange(i * ROWS, (i + 1) * ROWS, dtype=np.int32),  # static, so that a row's mask is its own
    }
    for i in range(2)
]
PAIRS = [
    {
        "input_ids": RNG.integers(0, V, (ROWS, T)).astype(np.int32),
        "attention_mask": PADDED,
        "labels": np.where(RNG.random((ROWS, T)) < 0.8, RNG.integers(0, V, (ROWS, T)), -100).astype(np.int32),
    }
    for _ in range(2)
]
PLAIN = [
    {
        "input_ids": RNG.integers(0, V, (ROWS, T)).astype(np.int32),
        "token_type_ids": (np.arange(ROWS * T).reshape(ROWS, T) % 5 > 2).astype(np.int32),
        "continues": np.arange(ROWS) % 3 > 0,
    }
    for _ in range(2)
]
MASKED_LM = MaskedLM(mask_id=3, vocab_size=V)
TASKS = {  # objective and batches, where they are not a decoder's
    "albert": (MASKED_LM, MASKED),
    "bert": (MASKED_LM, MASKED),
    "t5": (Seq2Seq(start_id=0, label_smoothing=0.1), PAIRS),
    "transformer": (Seq2Seq(start_id=0), PAIRS),
    "xlnet": (PermutationLM(carry=True), PLAIN),
    "xlnet_alone": (PermutationLM(), [{k: v for k, v in batch.items() if k != "continues"} for batch in PLAIN]),
}
TX = make_optimizer(OptimizerConfig(learning_rate=1e-2, schedule="constant", eps=1e-3), 2)


def init(params, name):
    carry = MODELS_HERE[name].init_carry(ROWS) if name == "xlnet" else None
    return init_state(params, TX, jax.random.key(3), carry=carry)


@functools.cache
def start(name):
    """On the host: a step donates its buffers."""
    make = jax.jit(lambda p: init(p, name).replace(key=None))
    return jax.device_get(make(model_params(MODELS_HERE[name], std=0.1)))


def two_steps(plan_config, name, accumulation, devices=None):
    """The state after two steps as `training.run` makes them, and both steps' metrics."""
    config = MODELS_HERE[name]
    plan = Plan(plan_config, config, devices)
    plan.check_batch(ROWS, accumulation)
    model = config.make(plan.execution())
    params, axes = abstract(model, np.zeros((1, T), np.int32))
    shardings = plan.state_shardings(jax.eval_shape(lambda p: init(p, name), params), axes)
    grads = plan.grad_shardings(params, axes)
    pin = lambda tree: jax.tree.map(jax.lax.with_sharding_constraint, tree, grads)
    options = StepConfig(accumulation, unroll=plan_config.unroll)
    objective, batches = TASKS.get(name, (CausalLM(z_loss=1e-2), BATCHES))
    pin = pin if plan.mesh.size > 1 else lambda g: g
    pipe = None if plan.schedule is None else (plan.mesh, plan.schedule)
    gather = lambda tree: plan.gather(tree, axes)
    step = make_train_step(model, objective, TX, options, constrain_grads=pin, pipe=pipe, gather=gather)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    state = jax.device_put(start(name).replace(key=jax.random.key(3)), shardings)
    metrics = []
    for batch in batches:
        state, values = step(state, jax.device_put(batch, plan.batch_sharding()))
        metrics.append(jax.device_get(values))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings))
    return state, metrics


@functools.cache
def one_device(name, accumulation=1):
    state, metrics = two_steps(PlanConfig(data=1), name, accumulation, jax.devices()[:1])
    return jax.device_get(state.replace(key=None)), metrics
