"""Names for what passes between the parts: trees, batches, models.

Annotations only; nothing here computes. Every part declares what it needs of the others by these.
"""

from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeAlias

import jax

from llm_jax.nn.execution import Execution

Tree: TypeAlias = Any  # any pytree; JAX has no narrower type for one
Params: TypeAlias = Mapping[str, Any]  # nested names; leaves are arrays, `weights.Weight` nodes, or their shapes
Axes: TypeAlias = Mapping[str, Any]  # the same names; leaves are tuples of logical axes
Batch: TypeAlias = Mapping[str, jax.Array]  # one entry a field, `[B, ...]`


class ModelConfig(Protocol):
    """What every family's config has beside its sizes.

    Attributes:
      reads: what a token sees of its text, see `models/registry.py`.
    """

    @property
    def reads(self) -> str:
        """See the class."""
        ...

    @property
    def vocab_size(self) -> int:
        """V, without padding."""
        ...

    @property
    def model_dim(self) -> int:
        """D."""
        ...

    def make(self, execution: Execution = ...) -> "Model":
        """The module."""
        ...


class Model(Protocol):
    """A Linen module that returns `models.shared.output.Output`."""

    @property
    def config(self) -> Any:
        """What it was made from: a family's config."""
        ...

    @property
    def execution(self) -> Execution:
        """How it runs."""
        ...

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Linen's: variables with fresh parameters in boxes that name their axes."""
        ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Linen's: the output."""
        ...

    def clone(self, **updates: Any) -> Self:
        """Linen's: the same module with other fields."""
        ...
