"""BERT, RoBERTa, DistilBERT and ALBERT in Hugging Face's names: one table of names a family."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from llm_jax import config as configs
from llm_jax.interop.huggingface import fields, heads
from llm_jax.interop.names import InteropError, Rule, linear, norm, without
from llm_jax.models.bert import BertConfig

CLASSES = {
    "none": "Model",
    "masked_lm": "ForMaskedLM",
    "pretraining": "ForPreTraining",
    "classification": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "choice": "ForMultipleChoice",
}
# the class of a causal masked_lm; the other two have none
DECODERS = {"bert": "BertLMHeadModel", "roberta": "RobertaForCausalLM"}


class Names(NamedTuple):
    """Where a family keeps its tensors; names of layers leave out `.weight` and `.bias`.

    Attributes:
      title: beginning of the names of its classes.
      root: prefix of the encoder.
      layer: prefix of a layer, `{l}` for its index.
      inside: our modules of a layer -> theirs.
      pooler: pooler of a model without a head, with its prefix; None where there is none.
      classifier_pooler: pooler of the classification head, where it is not `pooler`.
      transform: dense layer, norm and bias of the masked-LM head.
      decoder: output layer of the masked-LM head, tied or not.
      pair: output layer of the sentence-pair head.
    """

    title: str
    root: str
    layer: str
    inside: dict[str, str]
    pooler: str | None
    classifier_pooler: str | None
    transform: tuple[str, str, str]
    decoder: str
    pair: str | None


_BERT_LAYER = {
    **{f"attention/{n}": f"attention.self.{n}" for n in ("query", "key", "value")},
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_CLS = "cls.predictions"

TABLE = {
    "bert": Names(
        *("Bert", "bert", "bert.encoder.layer.{l}", _BERT_LAYER, "bert.pooler.dense", None),
        (f"{_CLS}.transform.dense", f"{_CLS}.transform.LayerNorm", f"{_CLS}.bias"),
        *(f"{_CLS}.decoder", "cls.seq_relationship"),
    ),
    "roberta": Names(
        *("Roberta", "roberta", "roberta.encoder.layer.{l}", _BERT_LAYER, "roberta.pooler.dense", "classifier.dense"),
        ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
        *("lm_head.decoder", None),
    ),
    "distilbert": Names(
        *("DistilBert", "distilbert", "distilbert.transformer.layer.{l}"),
        {
            **{f"attention/{n}": f"attention.{n[0]}_lin" for n in ("query", "key", "value")},
            "attention/out": "attention.out_lin",
            "attention_norm": "sa_layer_norm",
            "mlp/up": "ffn.lin1",
            "mlp/down": "ffn.lin2",
            "mlp_norm": "output_layer_norm",
        },
        *(None, "pre_classifier"),
        ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
        *("vocab_projector", None),
    ),
    "albert": Names(
        *("Albert", "albert", "albert.encoder.albert_layer_groups.{l}.albert_layers.0"),
        {
            **{f"attention/{n}": f"attention.{n}" for n in ("query", "key", "value")},
            "attention/out": "attention.dense",
            "attention_norm": "attention.LayerNorm",
            "mlp/up": "ffn",
            "mlp/down": "ffn_output",
            "mlp_norm": "full_layer_layer_norm",
        },
        *("albert.pooler", None),
        ("predictions.dense", "predictions.LayerNorm", "predictions.bias"),
        *("predictions.decoder", "sop_classifier.classifier"),
    ),
}

# ours -> theirs; DistilBERT has its own
FIELDS = {
    "vocab_size": "vocab_size",
    "model_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
    "num_token_types": "type_vocab_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "head_dropout": "classifier_dropout",
    "init_std": "initializer_range",
    "tied": "tie_word_embeddings",
}
DISTIL_FIELDS = {
    "vocab_size": "vocab_size",
    "model_dim": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "hidden_dim": "hidden_dim",
    "activation": "activation",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "head_dropout": "seq_classif_dropout",
    "init_std": "initializer_range",
    "tied": "tie_word_embeddings",
}
ALBERT_FIELDS = FIELDS | {
    "head_dropout": "classifier_dropout_prob",
    "embedding_dim": "embedding_size",
    "num_groups": "num_hidden_groups",
}
# fields that must hold what this library computes
FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "position_embedding_type": ("absolute",),
    "hidden_activation": (None,),
}
READ = (
    "inner_group_num",
    "is_decoder",
    "qa_dropout",
    "max_position_embeddings",
    "pad_token_id",
    "id2label",
    "label2id",
    "num_labels",
    "architectures",
    "model_type",
)
# BERT's and ALBERT's spellings of things without effect
INERT = (
    *("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
    "net_structure_type",
    "gap_size",
    "layers_to_keep",
    "num_memory_blocks",
    "down_scale_factor",
)


def _fields(kind: str) -> dict[str, str]:
    return {"distilbert": DISTIL_FIELDS, "albert": ALBERT_FIELDS}.get(kind, FIELDS)


def config_from_hf(c: dict[str, Any]) -> BertConfig:
    """Our config from the contents of `config.json`."""
    kind = c["model_type"]
    names, theirs_of = TABLE[kind], _fields(kind)
    c = fields.checked(c, {*theirs_of.values(), *READ, *INERT}, FIXED)
    values: dict[str, Any] = {ours: c.get(theirs) for ours, theirs in theirs_of.items()}
    classes = {ours: names.title + theirs for ours, theirs in CLASSES.items()}
    head = heads.of(c, classes, "none", {DECODERS[kind]: "masked_lm"} if kind in DECODERS else {})
    causal = bool(c.get("is_decoder"))
    if causal and (kind not in DECODERS or head not in ("none", "masked_lm")):
        raise InteropError(
            f"is_decoder=True is not supported with {classes[head]}, only with {', '.join(DECODERS.values())}"
        )
    offset = c["pad_token_id"] + 1 if kind == "roberta" else 0
    if kind == "albert":  # their layers are groups of layers, ours are layers
        size = values["group_size"] = c["inner_group_num"]
        values |= {"num_layers": values["num_layers"] * size, "num_groups": values["num_groups"] * size}
    if kind == "distilbert":
        values |= {"num_token_types": 0, "norm_eps": 1e-12}
    values |= {
        "activation": fields.activation(values["activation"]),
        "context_length": c["max_position_embeddings"] - offset,
        "position_offset": offset,
        "head": head,
        "labels": heads.labels_of(c),
        "pooler": _pooler(kind, head),
        "causal": causal,
    }
    if head == "span":  # only DistilBERT drops there
        values["head_dropout"] = c["qa_dropout"] if kind == "distilbert" else None
    elif head == "tokens" and kind == "distilbert":
        values["head_dropout"] = None
    return configs.from_dict(BertConfig, values)


def with_head(config: BertConfig, head: str, labels: Sequence[str]) -> BertConfig:
    """The same encoder under another head, with the pooler that the family's class has there."""
    labels = tuple(labels) or config.labels
    return dataclasses.replace(config, head=head, labels=labels, pooler=_pooler(model_type(config), head))


def _pooler(kind: str, head: str) -> str | None:
    if head in ("classification", "choice"):
        return "relu" if kind == "distilbert" else "tanh"
    return "tanh" if head in ("none", "pretraining") and kind != "distilbert" else None


def fit(config: BertConfig, tensors: Collection[str]) -> BertConfig:
    """The same, with the pair head that a file holds beyond its class, or without the pooler that it lacks."""
    names = TABLE[model_type(config)]
    pair = None if config.causal else names.pair
    if config.head == "masked_lm" and pair is not None and f"{pair}.weight" in tensors:
        return dataclasses.replace(config, head="pretraining", pooler="tanh")
    if config.head == "none" and names.pooler is not None:
        stem = names.pooler.removeprefix(f"{names.root}.")
        if not any(t in (f"{stem}.weight", f"{names.pooler}.weight") for t in tensors):
            return dataclasses.replace(config, pooler=None)
    return config


def model_type(config: BertConfig) -> str:
    """Which of their architectures holds this config.

    Raises:
      InteropError: if none does.
    """
    if config.embedding_dim is not None and config.num_groups is not None:
        kind = "albert"
    elif config.num_token_types == 0:
        kind = "distilbert"
    else:
        kind = "roberta" if config.position_offset else "bert"
    shared = config.embedding_dim is not None or config.num_groups is not None
    if kind != "albert" and shared:
        raise InteropError("ALBERT's format has both embedding_dim and num_groups, the others neither")
    if kind == "albert" and (config.position_offset or config.num_token_types == 0):
        raise InteropError("ALBERT's format has token types and no position_offset")
    if kind == "distilbert" and (config.norm_eps != 1e-12 or config.position_offset):
        raise InteropError("DistilBERT's format has norm_eps=1e-12 and no position_offset")
    if config.head == "pretraining" and TABLE[kind].pair is None:
        raise InteropError(f"{TABLE[kind].title}'s format has no sentence-pair head")
    if config.causal and kind not in DECODERS:
        raise InteropError(f"{TABLE[kind].title}'s format has no is_decoder=True; there are {', '.join(DECODERS)}")
    if config.head in ("classification", "choice") and config.pooler != _pooler(kind, config.head):
        raise InteropError(f"{TABLE[kind].title}'s format pools with {_pooler(kind, config.head)}")
    return kind


def config_to_hf(config: BertConfig) -> dict[str, Any]:
    """The contents of `config.json` for our config."""
    kind = model_type(config)
    out: dict[str, Any] = {their: getattr(config, ours) for ours, their in _fields(kind).items()}
    out["activation" if kind == "distilbert" else "hidden_act"] = fields.activation_to_hf(config.activation)
    if config.head == "span":
        out.pop(_fields(kind)["head_dropout"])
        out |= {"qa_dropout": config.head_dropout or 0.0} if kind == "distilbert" else {}
    elif kind in ("distilbert", "albert") and config.head_dropout is None:
        out[_fields(kind)["head_dropout"]] = config.dropout
    name = DECODERS[kind] if config.causal and config.head == "masked_lm" else TABLE[kind].title + CLASSES[config.head]
    out |= {
        "model_type": kind,
        "architectures": [name],
        "max_position_embeddings": config.context_length + config.position_offset,
        **heads.labels_to_hf(config),
    }
    if kind == "albert":
        out |= {
            "inner_group_num": config.group_size,
            "num_hidden_layers": config.num_layers // config.group_size,
            "num_hidden_groups": (config.num_groups or 0) // config.group_size,
        }
    out |= {"is_decoder": True} if config.causal else {}
    return out | ({"pad_token_id": config.position_offset - 1} if kind == "roberta" else {})


def root(config: BertConfig) -> str:
    """The prefix of the encoder's names in their classes with a head."""
    return f"{TABLE[model_type(config)].root}."


def rules(config: BertConfig) -> list[Rule]:
    """Where each of our parameters is; their kernels are `[out, in]`."""
    kind = model_type(config)
    names = TABLE[kind]
    out = []
    tables = {"embed": "word", "positions": "position"} | (
        {"token_types": "token_type"} if config.num_token_types else {}
    )
    for ours, theirs in tables.items():
        out.append(Rule(f"{ours}/embedding", f"{names.root}.embeddings.{theirs}_embeddings.weight"))
    out += norm("embed_norm", f"{names.root}.embeddings.LayerNorm")
    if config.embedding_dim is not None:
        out += linear("embed_projection", f"{names.root}.encoder.embedding_hidden_mapping_in")
    layer = names.layer if config.group_size == 1 else names.layer.replace("layers.0", "layers.{inner}")
    for ours, theirs in names.inside.items():
        made = (norm if ours.endswith("_norm") else linear)(f"encoder/layers/{ours}", f"{layer}.{theirs}")
        out += [dataclasses.replace(r, group_size=config.group_size) for r in made]
    if config.pooler is not None:
        is_classifiers = config.head == "classification" or (config.head == "choice" and kind == "distilbert")
        pooler = names.classifier_pooler if is_classifiers and names.classifier_pooler is not None else names.pooler
        if pooler is None:
            raise InteropError(f"{names.title}'s format has no pooler with head={config.head!r}")
        out += linear("pooler", pooler)
    if config.head in ("masked_lm", "pretraining"):
        transform, its_norm, bias = names.transform
        out += linear("head/transform", transform)
        out += norm("head/norm", its_norm)
        out.append(Rule("head/bias" if config.tied else "head/output/bias", bias))
        if not config.tied:
            out.append(Rule("head/output/kernel", f"{names.decoder}.weight", transposed=True))
    if config.head == "pretraining":
        assert names.pair is not None  # model_type has seen to it
        out += linear("pair", names.pair)
    elif config.head in ("classification", "tokens", "choice"):
        apart = kind == "roberta" and config.head == "classification"
        out += linear("classifier", "classifier.out_proj" if apart else "classifier")
    elif config.head == "span":
        out += linear("classifier", "qa_outputs")
    return without(f"{names.root}.", out) if config.head == "none" else out  # so do their headless classes


def ignored(config: BertConfig, name: str) -> bool:
    """Whether their tensor has no counterpart here: a buffer, a tied copy, a pooler or head without use."""
    names = TABLE[model_type(config)]
    if name.endswith(("embeddings.position_ids", "embeddings.token_type_ids")):
        return True
    copies = [f"{names.decoder}.bias"] if names.transform[2] != f"{names.decoder}.bias" else []
    copies += [f"{names.decoder}.weight"] if config.tied else []
    spelled = {r.theirs for r in rules(config)}
    pooler = None if names.pooler is None else names.pooler.removeprefix(f"{names.root}.")
    unused = [None if {f"{pooler}.bias", f"{names.root}.{pooler}.bias"} & spelled else names.pooler]
    unused += [None] if config.head in ("masked_lm", "pretraining") else [names.decoder, *names.transform]
    unused += [None] if config.head == "pretraining" else [names.pair]
    stems = [u for u in unused if u is not None]
    stems += [u.removeprefix(f"{names.root}.") for u in stems]
    return name in copies or name.startswith(tuple(stems))
