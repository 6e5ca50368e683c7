"""The tokenizer of a run, the digests of its files, and its rows without data."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from llm_jax.config import ConfigError
from llm_jax.data import corpora, tokenizers, tokens
from llm_jax.data.loader import abstract_batch
from llm_jax.data.rows.source import RowSource
from llm_jax.data.tokens import TokenStore
from llm_jax.objectives.bidirectional_lm import BidirectionalLM
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.objective import Objective
from llm_jax.objectives.permutation_lm import PermutationLM
from llm_jax.storage.digests import FileDigest, digest_files
from llm_jax.training import recipes
from llm_jax.training.loop import LoopConfig
from llm_jax.training.recipes import recipe_of
from llm_jax.training.run_config import DataConfig, RunConfig
from llm_jax.training.workdir import has_checkpoint

log = logging.getLogger(__name__)
TOKENIZER_FILES = (".json", ".jinja", ".txt", ".model", ".spm")  # of a folder; what its tokenizer may be read from


def data_digests(data: DataConfig, stored: Mapping[str, FileDigest] | None = None) -> dict[str, FileDigest]:
    """Digests by path of the files that a run reads: sources, held-out ones, the tokenizer.

    Args:
      data: where the files are.
      stored: digests of an earlier start; files that did not change since are not read, unless `data.verify` is set.
    """
    stored = None if data.verify else stored
    found: dict[str, FileDigest] = {}
    for source in (data.source, data.validation):
        if source is not None:
            found |= corpora.file_digests(source, data.layout, stored)
    if data.tokenizer is not None:
        path = epath.Path(data.tokenizer)
        files = [p for p in path.iterdir() if p.name.endswith(TOKENIZER_FILES)] if path.is_dir() else [path]
        found |= digest_files([p for p in files if p.is_file()], stored)
    return found


def check_cache(data: DataConfig, workdir: epath.PathLike) -> None:
    """Says where tokens cannot lie, before anything is tokenized and in every process of a job.

    Raises:
      ConfigError: naming the folder.
    """
    cache = str(data.cache or workdir)
    if "://" in cache:
        raise ConfigError(
            f"tokens are memory-mapped and cannot lie in {cache}: set --config.data.cache=FOLDER, local to every host"
        )


def check_objective(config: RunConfig) -> None:
    """Says what does not fit together before anything is tokenized.

    Raises:
      ConfigError: naming the fields.
    """
    config.objective.for_run(1, config.model, 0)
    recipe_of(config.objective).check(config.objective, config)


def get_tokenizer(config: RunConfig, workdir: epath.Path) -> tokenizers.Tokenizer:
    """The run's tokenizer: named, left by an earlier start, or trained on the training part."""
    size, recipe = config.model.vocab_size, recipe_of(config.objective)
    if config.data.tokenizer is not None:
        tokenizer = tokenizers.load(config.data.tokenizer)
    elif tokenizers.exists(workdir) and has_checkpoint(workdir):
        tokenizer = tokenizers.load(workdir)
    else:
        kind = config.data.tokenizer_kind
        log.info("training a %s tokenizer of %d entries", kind, size)
        texts, sentinels = recipe.source.texts(config), recipe.sentinels(config.objective)
        tokenizer = tokenizers.train(texts, kind, size, recipe.special_tokens, sentinels)
    tokens.check_vocabulary(tokenizer, size)
    return tokenizer


def example_batch(config: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as the loader hands it on, without its values: for what is compiled without data.

    Raises:
      ConfigError: for labelled examples, whose rows depend on their labels.
    """
    recipe = recipe_of(config.objective)
    check_objective(config)
    tokenizer = tokenizers.train(["a b"], "word", 16, recipe.special_tokens)
    return abstract_batch(recipe.source.example(config, tokenizer), config.training.batch_size)


def rows_of_model(
    model: Any, tokenizer: tokenizers.Tokenizer, length: int
) -> tuple[Objective, Callable[[TokenStore], RowSource]]:
    """The objective that a model is made for, and `store -> rows` of a text for it; not for encoder-decoders.

    Args:
      model: the model's config.
      tokenizer: the model's tokenizer.
      length: tokens a row.

    Raises:
      ValueError: if the model's head predicts no tokens.
    """
    ways: dict[str, tuple[Objective, recipes.Cut]] = {
        "causal": (CausalLM(), recipes.next_token_rows),
        "both_sides": (MaskedLM(pair=0.0), recipes.masked_rows),
        "any_order": (PermutationLM(), recipes.permuted_rows),
        "characters": (BidirectionalLM(), recipes.spelled_rows),
    }
    plain, cut = ways[model.reads]
    objective = plain.for_run(1, model, tokenizer.role("mask"))
    config = RunConfig(model=model, objective=objective, training=LoopConfig(sequence_length=length))
    return objective, lambda store: cut(objective, config, tokenizer, store, False)
