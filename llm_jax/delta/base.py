"""The frozen model below a delta run, by reference: where it is, what it is, and what checkpoints leave out of it.

A checkpoint of such a run holds what trains and what no file holds (LoRA's `scales`, DoRA's `squares`, a frozen A).
Everything below the deltas comes from the model that the run began with, which a fingerprint identifies:

    params/decoder/layers/mlp/up/kernel/base    left out
    params/decoder/layers/mlp/up/kernel/a       stored
    params/decoder/layers/mlp/up/kernel/b       stored

A base in bfloat16 or int8, or one that PiSSA, OLoRA or LoftQ changed, is computed again from the model, by the same
function as when the run began: bitwise on the same devices, to rounding on others.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from llm_jax.delta import methods, node
from llm_jax.delta.methods import DeltaConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Params
from llm_jax.parallel import processes

FORMS = ("float", "bfloat16", "int8")
PRODUCTS = "products"  # how `delta.starts` finds the largest singular values; by whole decompositions at first


class BaseError(ValueError):
    """A base that is not there, or is another one than the run began with; one line."""

    exit_code = 2  # the same command would fail again


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that a delta run began with.

    Attributes:
      path: absolute path, or the name or address that it was loaded by.
      relative: path from the run's work directory; empty where there is none.
      dtype: that its floating parameters were loaded in; None for mixed ones, as stored.
      head: that it was loaded with; None for its own.
      labels: of that head.
      form: what the run keeps of it: `float` (as loaded), `bfloat16`, or `int8` (kernels under LoRA).
      delta: what was attached; nothing where parameters of the model itself train.
      trainable: patterns of what trains.
      starts: how a start by singular values was computed, where the delta has one.
      prints: fingerprint of every parameter that checkpoints leave out, see `fingerprint`.
    """

    path: str
    relative: str = ""
    dtype: str | None = None
    head: str | None = None
    labels: tuple[str, ...] = ()
    form: str = "float"
    delta: DeltaConfig = DeltaConfig()
    trainable: tuple[str, ...] = ()
    starts: str = ""
    prints: dict[str, str] = dataclasses.field(default_factory=dict)

    def adapt(self, params: Params) -> Params:
        """The parameters as the run began with them; matrices that are drawn at random are other ones."""
        return adapt(params, self.delta, self.form, self.trainable, jax.random.key(0))

    def of_run(self, workdir: epath.PathLike, given: Params, left_out: Collection[str]) -> "Base":
        """Adds what only the run knows: paths that hold from elsewhere, the dtype, the fingerprint.

        Args:
          workdir: of the run.
          given: the parameters of the model, before anything is attached.
          left_out: see `left_out`.
        """
        path, relative = self.path, ""
        if "://" not in path and os.path.exists(path):
            path = os.path.abspath(path)
            relative = "" if "://" in str(workdir) else os.path.relpath(path, workdir)
        dtypes = {x.dtype.name for x in jax.tree.leaves(given) if jnp.issubdtype(x.dtype, jnp.floating)}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        below = [
            p for path, w in paths.flatten(given, weights.is_node) if _feeds(path, left_out) for p in _leaves(path, w)
        ]
        prints = fingerprint(given, below)
        return dataclasses.replace(self, path=path, relative=relative, dtype=dtype, starts=PRODUCTS, prints=prints)

    def check(self, params: Params, where: object) -> None:
        """Refuses other parameters than those that the run began with.

        Args:
          params: of a model, before anything is attached.
          where: its path, for the message.

        Raises:
          BaseError: naming the path, both fingerprints and a parameter that differs; or where an earlier version
            computed the start.
        """
        start = "zero" if self.delta.lora is None else self.delta.lora.start
        if start in ("pissa", "loftq") and self.starts != PRODUCTS:
            raise BaseError(
                f"the run on {self.path} began with {start} of an earlier version, which took another part out of the "
                "base: resume it with that version, or choose another --workdir"
            )
        found = fingerprint(params, self.prints)
        if found == self.prints:
            return
        first = min(p for p in self.prints if found.get(p) != self.prints[p])
        raise BaseError(
            f"the base at {where} (fingerprint {digest(found)}) is not the one that the run began with "
            f"({self.path}, fingerprint {digest(self.prints)}): {first} is {found.get(first, 'missing')} there and was "
            f"{self.prints[first]}; give the model that the run began with, or choose another --workdir"
        )


def _feeds(path: str, left_out: Collection[str]) -> bool:
    """Whether a parameter of the model is left out, as it is or below deltas (`kernel/base/base/values`)."""
    return path in left_out or any(p.startswith(path + "/") for p in left_out)


def _leaves(path: str, w: Any) -> list[str]:
    """Paths of the arrays of a weight at a path."""
    return [f"{path}/{p}".rstrip("/") for p, _ in paths.flatten(w)]


def fingerprint(params: Params, chosen: Iterable[str]) -> dict[str, str]:
    """Type, shape and checksum (CRC-32 of all bytes) of parameters: `float32[2,16,16] 5e4b2a10` by path.

    Args:
      params: on devices or on the host.
      chosen: paths of leaves; those that are not there are left out.
    """
    names = set(chosen)
    return {p: _print(x) for p, x in paths.flatten(params) if p in names}


def _print(x: Any) -> str:
    array = np.ascontiguousarray(np.asarray(processes.whole(x)))
    shape = ",".join(map(str, array.shape))
    return f"{array.dtype.name}[{shape}] {zlib.crc32(array.reshape(-1).view(np.uint8).data):08x}"


def digest(prints: Mapping[str, str]) -> str:
    """A fingerprint in 12 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(prints, sort_keys=True).encode(), digest_size=6).hexdigest()


def adapt(params: Params, config: DeltaConfig, form: str, trainable: Collection[str], key: jax.Array) -> Params:
    """A model's parameters as they will train: the base in its form, deltas attached; pure.

    Args:
      params: of the model.
      config: the deltas.
      form: `float` leaves the base as it is, `bfloat16` rounds what is frozen, `int8` quantizes kernels under LoRA.
      trainable: patterns of what trains, which stays in float32.
      key: draws LoRA's A.

    Raises:
      DeltaError, ValueError: see `delta.methods`.
    """
    if form == "int8":
        params = methods.quantized(params, config)
    if form == "bfloat16":
        trains = paths.matcher(trainable)
        params = paths.map_with_path(lambda p, x: x if trains(p) else weights.cast(x, jnp.bfloat16), params)
    params = methods.attach(params, config, key)
    return jax.tree.map(_wide, params, is_leaf=weights.is_node) if form == "bfloat16" else params


def _wide(w: Any) -> Any:
    """A weight whose deltas are in float32, over a base of any dtype: trained token rows begin as the table's."""
    if not isinstance(w, node.Delta):
        return w
    own = {name: weights.cast(x, jnp.float32) for name, x in w.leaves().items() if x is not None}
    return w.replace(base=_wide(w.base), **own)


def left_out(params: Params, given: Params, trainable: Collection[str]) -> tuple[str, ...]:
    """Paths of the leaves that checkpoints need not hold: frozen, and below all deltas of a parameter of the model.

    Args:
      params: as they train; abstract will do.
      given: of the model; abstract will do.
      trainable: patterns of what trains.
    """
    of_model = {path for path, _ in paths.flatten(given, weights.is_node)}
    trains = paths.matcher(trainable)
    found: list[str] = []
    for path, w in paths.flatten(params, weights.is_node):
        if path in of_model:
            below = _leaves(path + "/base" * len(node.layers_of(w)), node.stripped(w))
            found += [p for p in below if not trains(p)]
    return tuple(found)
