"""Names for what passes between the parts: trees, batches, models.

Annotations only; nothing here computes. Every part declares what it needs of the others by these.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

import jax

if TYPE_CHECKING:
    from llm_jax.nn.execution import Execution

Tree: TypeAlias = Any  # any pytree; JAX has no narrower type for one
Params: TypeAlias = Mapping[str, Any]  # nested names; leaves are arrays, `weights.Weight` nodes, or their shapes
Axes: TypeAlias = Mapping[str, Any]  # the same names; leaves are tuples of logical axes
Batch: TypeAlias = Mapping[str, jax.Array]  # one entry a field, `[B, ...]`


class ModelConfig(Protocol):
    """What every family's config has beside its own sizes."""

    @property
    def reads(self) -> str:
        """What a token sees of its text, see `models/registry.py`."""
        ...

    @property
    def vocab_size(self) -> int:
        """V, the entries of the vocabulary without padding."""
        ...

    @property
    def model_dim(self) -> int:
        """D, the width of the residual stream."""
        ...

    def make(self, execution: "Execution" = ...) -> "Model":
        """The module, whose parameters `init` makes."""
        ...


class Model(Protocol):
    """A Linen module that returns `models.shared.output.Output`."""

    @property
    def config(self) -> Any:
        """The family's config that the module was made from."""
        ...

    @property
    def execution(self) -> "Execution":
        """How the module runs."""
        ...

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Linen's `init`: variables whose fresh parameters are in boxes that name their axes."""
        ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Linen's `apply`: the output of a call with these variables."""
        ...

    def clone(self, **updates: Any) -> Self:
        """Linen's `clone`: the same module with other fields."""
        ...
