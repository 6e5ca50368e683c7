"""Where an adapter's arrays are in PEFT's files, from the rules of a family.

PEFT adapts modules. A rule whose name ends in `.weight` names one, and the kernel or table in it. GPT-2's fused
projection is one module with three of our kernels; a kernel that is a bare parameter there (XLNet's attention) is in no
module, and PEFT cannot adapt it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llm_jax.interop import pretrained
from llm_jax.interop.huggingface import bert, peft_match
from llm_jax.interop.names import InteropError, Rule
from llm_jax.models import registry
from llm_jax.models.bert import BertConfig
from llm_jax.models.gpt import GPTConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.models.t5 import T5Config
from llm_jax.models.transformer import TransformerConfig
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import weights
from llm_jax.nn.protocols import ModelConfig

PREFIX = "base_model.model."
TABLE = "embed/embedding"
# modules of their classes that no rule names: a target must not reach them by accident
_UNLISTED = ("pooler.dense",)
# PEFT calls the table of Marian's tokens by the module that looks ids up
_MARIAN_TOKENS = "model.encoder.embed_tokens"


class Site(NamedTuple):
    """One of their linear layers or tables, in every layer of its stack.

    Attributes:
      kernels: our paths; several where theirs is fused, in their order.
      names: theirs, one a layer, or one in all.
      is_stacked: whether ours have a layer axis.
      is_table: a table of rows, and not a kernel.
      transposed: whether their kernel is `[out, in]`.
      shapes: `(in, out)` of our kernels, without padded rows.
    """

    kernels: tuple[str, ...]
    names: tuple[str, ...]
    is_stacked: bool
    is_table: bool
    transposed: bool
    shapes: tuple[tuple[int, int], ...]

    @property
    def widths(self) -> list[int]:
        """Outputs of our kernels."""
        return [out for _, out in self.shapes]


class Layout(NamedTuple):
    """A family's names for one model.

    Attributes:
      config: the model's.
      family: the module of `interop.huggingface`.
      rules: of the parameters that the model has.
      sites: what PEFT can adapt.
      modules: names of all modules, of what holds them too.
    """

    config: ModelConfig
    family: Any
    rules: list[Rule]
    sites: list[Site]
    modules: frozenset[str]

    @property
    def shares_table(self) -> bool:
        """Whether other modules read the token table too, which an adapter of one module would leave behind."""
        return tied_output(self.config) is not None or has_copies(self.config)

    def of_table(self) -> Site:
        """The site of the token table."""
        return next(site for site in self.sites if site.kernels == (TABLE,))


class Written(NamedTuple):
    """LoRA or IA3 as PEFT stores it.

    Attributes:
      tensors: theirs, by name without PEFT's prefix.
      parts: module -> ranks of its parts, where these are side by side.
      fields: of `AdapterConfig`.
      modules: names of the adapted modules.
      transposed: whether kernels of adapted layers are `[out, in]` there.
    """

    tensors: dict[str, Any]
    parts: dict[str, list[int]]
    fields: dict[str, Any]
    modules: list[str]
    transposed: bool


def module_of(name: str) -> str:
    """The module of one of their tensors."""
    return name.rpartition(".")[0]


def without_padding(config: ModelConfig, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one of our parameters in their file: without padded rows."""
    if path not in pretrained.PADDED or getattr(config, "vocab_pad_multiple", 1) == 1:
        return shape
    rows = config.vocab_size
    return (rows, *shape[1:]) if path.endswith(("embedding", "bias")) else (*shape[:-1], rows)


def _sites(config: ModelConfig, rules: Sequence[Rule], flat: Mapping[str, Any]) -> list[Site]:
    groups: dict[str, list[Rule]] = {}
    for rule in rules:
        is_module = rule.theirs.endswith(".weight") and rule.forward is None
        shape = weights.shape_of(flat[rule.ours])
        if is_module and rule.ours.endswith(("/kernel", "/embedding")) and len(shape) - rule.is_stacked == 2:
            groups.setdefault(rule.theirs, []).append(rule)
    sites = []
    for group in groups.values():
        group = sorted(group, key=lambda r: 0 if r.part is None else r.part[0])
        first = group[0]
        names = tuple(module_of(name) for name in first.names(weights.shape_of(flat[first.ours])))
        kernels = tuple(r.ours for r in group)
        shapes = []
        for path in kernels:
            fan_in, fan_out = without_padding(config, path, weights.shape_of(flat[path])[-2:])
            shapes.append((fan_in, fan_out))
        is_table = first.ours.endswith("/embedding")
        sites.append(Site(kernels, names, first.is_stacked, is_table, first.transposed, tuple(shapes)))
    return sites


def layout(config: ModelConfig, flat: Mapping[str, Any]) -> Layout:
    """A family's names for a model with these (stacked, flat) parameters.

    Raises:
      InteropError: if Hugging Face has no such model.
    """
    family = pretrained.WRITERS.get(registry.family_of(config))
    if family is None:
        raise InteropError(f"PEFT adapts models of Hugging Face, which has no {registry.family_of(config)}")
    family.config_to_hf(config)  # refuses a config that their classes cannot hold
    rules = [rule for rule in family.rules(config) if rule.ours in flat]
    modules = {
        above
        for rule in rules
        for name in rule.names(weights.shape_of(flat[rule.ours]))
        for above in peft_match.ancestors(module_of(name))
    }
    output = tied_output(config)
    modules |= {name for name in _UNLISTED if not any(peft_match.is_end(name, module) for module in modules)}
    modules |= set() if output is None else {output}
    return Layout(config, family, rules, _sites(config, rules, flat), frozenset(modules - {""}))


def tied_output(config: ModelConfig) -> str | None:
    """Their name of the output layer that shares the token table; None where the table is read by lookups alone."""
    if isinstance(config, (GPTConfig, LlamaConfig)):
        return "lm_head" if config.tied and config.head == "lm" else None
    if isinstance(config, BertConfig):
        has_output = config.tied and config.head in ("masked_lm", "pretraining")
        return bert.TABLE[bert.model_type(config)].decoder if has_output else None
    return "lm_loss" if isinstance(config, XLNetConfig) and config.head == "lm" else None


def has_copies(config: ModelConfig) -> bool:
    """Whether their lookups go through copies of the table, so that a LoRA on the table itself does nothing there."""
    return isinstance(config, (T5Config, TransformerConfig))


def check_rows(config: ModelConfig) -> None:
    """Refuses trained rows of a table whose tied output layer has a bias: PEFT drops that bias beside them.

    Raises:
      InteropError: for BERT's kin and XLNet with their language-model heads.
    """
    if tied_output(config) is not None and isinstance(config, (BertConfig, XLNetConfig)):
        raise InteropError(f"trained token rows have no place in PEFT's format beside {tied_output(config)}: PEFT "
                           "leaves out the bias of an output layer that shares the table")  # fmt: skip


def tokens_name(config: ModelConfig, site: Site) -> str:
    """PEFT's name for the rows of a table that train."""
    return _MARIAN_TOKENS if isinstance(config, TransformerConfig) else site.names[0]


def ends(layout: Layout, modules: Sequence[str]) -> tuple[str, ...]:
    """The shortest names that PEFT reads as these modules and no others."""
    return tuple(peft_match.shortest(modules, layout.modules - set(modules), peft_match.is_end))


def shape_text(shape: Sequence[int]) -> str:
    """A shape for messages."""
    return str(list(shape))
