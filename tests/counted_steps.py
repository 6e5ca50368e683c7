"""A training step of every family and objective, large enough that matrix products are nearly all of its FLOPs."""

import dataclasses

import jax
import numpy as np
from plan_runs import MODELS_HERE, task

from llm_jax.delta import methods
from llm_jax.delta.lora import LoraConfig
from llm_jax.delta.methods import DeltaConfig, Ia3Config
from llm_jax.models.elmo import ElmoConfig
from llm_jax.models.text_classifier import TextClassifierConfig
from llm_jax.nn import weights
from llm_jax.nn.stack import unstack
from llm_jax.objectives.bidirectional_lm import BidirectionalLM
from llm_jax.objectives.labels import Labels
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.seq2seq import Seq2Seq
from llm_jax.training import flops
from llm_jax.training.trainable import combine, partition

ROWS, T = 2, 32
SIZES = dict(
    vocab_size=500, model_dim=128, context_length=64, hidden_dim=256, num_heads=4, dropout=0.0, attention_dropout=0.0
)
BERT = MODELS_HERE["bert"]
ELMO = ElmoConfig(max_characters=9, character_dim=32, widths=(2, 3), filters=(64, 64), num_highways=1, dropout=0.0)
of = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)
IDS, MASKED = {"input_ids": of(ROWS, T)}, {"input_ids": of(ROWS, T), "attention_mask": of(ROWS, T)}
# name -> (model, objective, batch, patterns of what trains, or deltas that do)
STEPS = {
    **{n: (MODELS_HERE[n], *task(n), None) for n in ("gpt", "llama", "bert", "albert", "t5", "transformer")},
    "xlnet": (MODELS_HERE["xlnet_alone"], task("xlnet_alone")[0], IDS, None),
    "masked words only": (BERT, MaskedLM(pair=0.0), MASKED, None),
    "spans": (MODELS_HERE["t5"], Seq2Seq("spans", end_id=1, start_id=0), IDS, None),
    "classes": (
        dataclasses.replace(BERT, head="classification", pooler="tanh"), Labels(), {**MASKED, "labels": of(ROWS)}, None,
    ),
    "tags": (dataclasses.replace(BERT, head="tokens"), Labels("tokens"), {**MASKED, "labels": of(ROWS, T)}, None),
    "llama with LoRA": (MODELS_HERE["llama"], *task("llama"), DeltaConfig(lora=LoraConfig())),
    "llama with DoRA": (MODELS_HERE["llama"], *task("llama"), DeltaConfig(lora=LoraConfig(dora=True))),
    "llama with IA3": (MODELS_HERE["llama"], *task("llama"), DeltaConfig(ia3=Ia3Config())),
    "bert, its last norms alone": (BERT, *task("bert"), ("mlp_norm/*",)),
    # XLA counts a loop's body once, so one word a row; the backward direction predicts none
    "elmo": (ELMO, BidirectionalLM(), {"input_ids": of(50, 2), "character_ids": of(50, 2, 9)}, None),
    "cnn": (TextClassifierConfig(kind="cnn"), Labels(), {"input_ids": of(ROWS, T), "labels": of(ROWS)}, None),
}  # fmt: skip


def resized(model):
    fields = {k: v for k, v in SIZES.items() if hasattr(model, k)}
    fields |= {"head_dim": 32} if getattr(model, "head_dim", None) else {}
    return dataclasses.replace(model, **fields)


def counted(name):
    """(our count, the gradient's lowered program)."""
    model, objective, batch, trainable = STEPS[name]
    model = resized(model)
    objective = objective.for_run(8, model, 3)
    longer = lambda x: jax.ShapeDtypeStruct((ROWS, *(T + n - 8 for n in x.shape[1:])), x.dtype)
    batch = jax.tree.map(longer, batch[0]) if isinstance(batch, list) else batch
    module = model.make()
    boxed = jax.eval_shape(lambda key, ids: module.init(key, ids)["params"], jax.random.key(0), of(1, 2))
    params = jax.eval_shape(unstack, weights.split_axes(boxed)[0])
    if isinstance(trainable, DeltaConfig):
        params = jax.eval_shape(lambda p, config=trainable: methods.attach(p, config, jax.random.key(0)), params)
        trainable = methods.trainable(params, trainable)
    learn, frozen = partition(params, trainable)

    def loss(learn, frozen, batch):
        prepared = objective.prepare(batch, jax.random.key(0))
        out = module.apply({"params": combine(learn, frozen)}, **prepared.inputs)
        scores = objective.score(out, prepared.targets)
        return sum(c * scores[term] for term, c in objective.coefficients.items())

    return flops.of_step(model, objective, params, batch, trainable), jax.jit(jax.grad(loss)).lower(
        learn, frozen, batch
    )
