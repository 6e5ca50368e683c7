"""What a run with objective `Labels` reads: examples from files, tokenized at every start."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, cast

from etils import epath

from llm_jax.config import ConfigError
from llm_jax.data import labeled
from llm_jax.data.labeled import Example
from llm_jax.data.rows.labeled_rows import Encoder, LabeledRows, without_text
from llm_jax.data.rows.source import Row, Rows
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.data.tokens import Encode
from llm_jax.objectives.labels import Labels
from llm_jax.storage.digests import FileDigest

if TYPE_CHECKING:
    from llm_jax.training.run_config import DataConfig, RunConfig

log = logging.getLogger(__name__)


def read(data: "DataConfig", objective: Labels) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples of a run."""
    return labeled.read(
        data.source,
        objective.kind,
        data.fields,
        data.validation,
        data.validation_share,
        layout=data.layout,
        group=data.group,
        encoding=data.encoding,
    )


@dataclasses.dataclass(frozen=True)
class LabeledExamples:
    """Labelled examples: encoded at every start, nothing is stored. The methods are those of `recipes.Corpus`."""

    keeps_tokens: ClassVar[bool] = False
    framed: ClassVar[bool] = False

    def texts(self, config: "RunConfig") -> Iterator[str]:
        """Every text of the training part; the words of a tagged sentence are one."""
        objective = cast(Labels, config.objective)
        examples, _ = read(config.data, objective)
        for example in examples:
            yield from [" ".join(example.inputs)] if objective.kind == "tokens" else example.inputs

    def rows(
        self,
        config: "RunConfig",
        tokenizer: Tokenizer,
        workdir: epath.Path,
        encode: Encode | None,
        kind: str,
        stored: Mapping[str, FileDigest] | None,
    ) -> Rows:
        """Reads and encodes the examples.

        Raises:
          ConfigError: if the model lacks a label of the training part.
        """
        del workdir, encode, kind, stored
        data, objective = config.data, cast(Labels, config.objective)
        train, held_out = read(data, objective)
        found = labeled.names_of(train, objective.kind, data.fields)
        labels = found if objective.kind in ("choice", "regression", "span") else config.model.labels
        if missing := [label for label in found if label not in labels]:
            raise ConfigError(f"model.labels={labels} lacks {', '.join(missing)}: set --config.model.labels to {found}")
        encoder = Encoder.of(config.model, tokenizer, objective.kind, config.training.sequence_length)
        rows = LabeledRows(train, encoder, labels, "training part")
        if not held_out:
            log.warning("nothing is evaluated, nothing is held out (data.validation, data.validation_share)")
            return Rows(rows, None)
        held_out_rows = LabeledRows(held_out, encoder, labels, "held-out part")
        loss, share = without_text(rows, held_out_rows, len(labels))
        if share:
            shown = "%d labels; the most frequent one is right in %.1f %% of the held-out part"
            log.info(shown, len(labels), 100 * share)
        return Rows(rows, held_out_rows, baseline=loss)

    def example(self, config: "RunConfig", tokenizer: Tokenizer) -> Row:
        """Refuses: rows depend on the labels.

        Raises:
          ConfigError: always.
        """
        raise ConfigError("rows of labelled examples come from their data: take another objective")
