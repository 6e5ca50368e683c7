"""Heads: the fields of Hugging Face's configs that name one, and the names of its tensors."""

from collections.abc import Mapping
from typing import Any

from llm_jax.interop.names import InteropError, Rule, linear

# first parts of our paths that belong to a head, which a file of the bare model or of another head lacks
PARTS = ("classifier", "pooler", "head", "pair", "logits_bias")
# what transformers looks for before the classes of tokens of a decoder, whose config classes have neither
READ = ("classifier_dropout", "hidden_dropout")


def of(config: Mapping[str, Any], classes: Mapping[str, str], usual: str, also: Mapping[str, str] = {}) -> str:
    """Our head of the class that wrote a folder.

    Args:
      config: the contents of `config.json`.
      classes: our heads -> their classes.
      usual: the head of a folder that names no class.
      also: further classes of theirs -> our heads.

    Raises:
      InteropError: naming a class that is not here.
    """
    supported = {**{theirs: ours for ours, theirs in classes.items()}, **also}
    name = (config.get("architectures") or [classes[usual]])[0]
    if name not in supported:
        raise InteropError(f"architectures {name!r} is not supported; there are {', '.join(supported)}")
    return supported[name]


def class_of(head: str, classes: Mapping[str, str]) -> str:
    """Their class of our head; undoes `of`.

    Raises:
      InteropError: if they have no such class.
    """
    if head not in classes:
        raise InteropError(f"no Hugging Face class has head={head!r} there; there are {', '.join(classes.values())}")
    return classes[head]


def labels_of(config: Mapping[str, Any]) -> list[str]:
    """Names of the classes, in order."""
    labels = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    return [str(labels[k]) for k in sorted(labels, key=int)]


def labels_to_hf(config: Any) -> dict[str, Any]:
    """`id2label` and `label2id` of a config's labels; undoes `labels_of`."""
    return {
        "id2label": {str(i): name for i, name in enumerate(config.labels)},
        "label2id": {name: i for i, name in enumerate(config.labels)},
    }


def on_decoder(config: Mapping[str, Any], classes: Mapping[str, str]) -> dict[str, Any]:
    """Our fields of a decoder's head: head, labels, dropout before the classes of tokens, padding."""
    rate = next((config[name] for name in READ if config.get(name) is not None), 0.1)
    head = of(config, classes, "lm")
    return {"head": head, "labels": labels_of(config), "head_dropout": rate, "pad_id": config.get("pad_token_id")}


def on_decoder_to_hf(config: Any, classes: Mapping[str, str]) -> dict[str, Any]:
    """Their fields of a decoder's head; undoes `on_decoder`. A language model's folder has no labels."""
    out: dict[str, Any] = {"architectures": [class_of(config.head, classes)]}
    out |= {} if config.pad_id is None else {"pad_token_id": config.pad_id}
    out |= labels_to_hf(config) if config.head in ("classification", "tokens") else {}
    return out | ({READ[0]: config.head_dropout} if config.head == "tokens" else {})


def rules_on_decoder(config: Any, tokens: str) -> list[Rule]:
    """The rules of a decoder's head.

    Args:
      config: our config.
      tokens: their name of the layer that classifies tokens.
    """
    if config.head == "lm":
        return [] if config.tied else linear("head", "lm_head", bias=False)
    if config.head == "classification":
        return linear("classifier", "score", bias=False)
    return {"tokens": linear("classifier", tokens), "span": linear("classifier", "qa_outputs")}.get(config.head, [])
