"""Checkpoints: Orbax behind a thin facade.

`folder/<step>/` holds `state` (arrays), `structure` (what array files cannot hold: types and static fields of
structured weights) and `run` (config, position in the data, library version). Layers are stored stacked, whatever
the run used, unless they differ.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

import llm_jax
from llm_jax.nn import paths, weights


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What came back.

    Attributes:
      step: its number.
      state: arrays, shaped and placed like the target.
      run: `config`, `data` (loader position), `version`, ....
    """

    step: int
    state: Any
    run: dict[str, Any]


def _unkey(tree: Any) -> Any:
    """Typed keys as their raw data, which array files can hold."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def _rekey(tree: Any, like: Any) -> Any:
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x, l: jax.random.wrap_key_data(x) if is_key(l) else x, tree, like)


def _abstract(target: Any, shardings: Any) -> Any:
    """Shapes, dtypes and a sharding for every leaf, keys as raw data."""
    raw = jax.eval_shape(_unkey, target)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if shardings is None:
        shardings = jax.tree.map(lambda x: x.sharding if isinstance(x, jax.Array) else device, target)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), raw, shardings)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {p: tuple(x.shape) for p, x in paths.flatten(tree)}


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        folder: epath.PathLike,
        keep_last: int = 2,
        keep_best: int = 0,
        asynchronous: bool = True,
        read_only: bool = False,
    ) -> None:
        """Opens or creates the folder.

        Args:
          folder: local or remote path.
          keep_last: newest checkpoints kept.
          keep_best: checkpoints with the lowest `eval/loss` kept beside them.
          asynchronous: write in the background.
          read_only: never write or clean up; for readers beside a live run.
        """
        keep: list[Any] = [policies.LatestN(keep_last)]
        if keep_best:
            keep.append(policies.BestN(get_metric_fn=_quality, n=keep_best, keep_checkpoints_without_metrics=False))
        self.folder = epath.Path(folder)
        options = ocp.CheckpointManagerOptions(
            read_only=read_only,
            create=not read_only,
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=_quality,  # stores the metrics, so that a resumed run knows which checkpoints were best
            enable_async_checkpointing=asynchronous,
            cleanup_tmp_directories=not read_only,
        )
        names = ("state", "structure", "run")
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options, item_names=names)

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest one."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, run: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Writes a checkpoint; it appears only once it is complete.

        Those at this step and after it, left by a run that went further before this one restored an older step, are
        dropped: the newest checkpoint is always the live run's.

        Raises:
          CheckpointError: where the disk refuses; earlier checkpoints stay untouched.
        """
        run = {"version": llm_jax.__version__, **run}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_unkey(state)),
            structure=ocp.args.JsonSave(weights.structure(state)),
            run=ocp.args.JsonSave(run),
        )
        try:
            for stale in [s for s in self.steps() if s >= step]:
                self._manager.delete(stale)
            self._manager.save(step, args=args, metrics=metrics, force=True)
        except Exception as e:
            raise CheckpointError(f"checkpoint {step} could not be written to {self.folder}: {_line(e)}") from e

    def wait(self) -> None:
        """Waits for background writes; their errors surface here."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise CheckpointError(f"a checkpoint could not be written to {self.folder}: {_line(e)}") from e

    def close(self) -> None:
        """Waits and closes."""
        self.wait()
        self._manager.close()

    def _offer(self, step: int) -> str:
        earlier = [s for s in self.steps() if s < step]
        return f"; the previous one is {earlier[-1]} (--restore_step={earlier[-1]})" if earlier else ""

    def read_run(self, step: int | None = None) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """The step number, `run` and `structure` of a checkpoint, without its arrays.

        Raises:
          CheckpointError: if there is none, or it cannot be read.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self.steps():
            found = f"; there are {self.steps()}" if self.steps() else ""
            raise CheckpointError(f"no checkpoint {'' if step is None else step} in {self.folder}{found}")
        try:
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
                run, structure = (reader.restore(self._item(step, name)) for name in ("run", "structure"))
        except Exception as e:
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} is damaged or not ours ({_line(e)}){self._offer(step)}"
            ) from e
        return step, run, structure

    def _item(self, step: int, name: str) -> epath.Path:
        return self.folder.absolute() / str(step) / name

    def restore(self, target: Any, step: int | None = None, shardings: Any = None) -> Restored:
        """Restores onto any mesh: shapes and types come from `target`, places from `shardings`.

        Raises:
          CheckpointError: if the checkpoint is missing, damaged or of another model; the message names what differs
            and offers the previous one.
        """
        step, run, structure = self.read_run(step)
        wanted = weights.structure(target)
        if structure != wanted:
            paths_ = sorted(k for k in structure.keys() | wanted.keys() if structure.get(k) != wanted.get(k))
            first = paths_[0]
            raise CheckpointError(
                f"checkpoint {step} holds other structured weights than this run: {first} is "
                f"{structure.get(first)} there and {wanted.get(first)} here"
            )
        abstract = _abstract(target, shardings)
        self._compare(step, abstract)
        try:
            raw = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state
        except Exception as e:
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} is damaged ({_line(e)}){self._offer(step)}"
            ) from e
        return Restored(step, _rekey(raw, target), run)

    def stored_shapes(self, step: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """`{path: (shape, dtype)}` of the arrays of a checkpoint."""
        try:
            with ocp.PyTreeCheckpointer() as reader:
                tree = reader.metadata(self._item(step, "state")).item_metadata.tree
            return {p: (tuple(m.shape), m.dtype) for p, m in paths.flatten(tree)}
        except Exception as e:
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} is damaged ({_line(e)}){self._offer(step)}"
            ) from e

    def _compare(self, step: int, abstract: Any) -> None:
        stored = {p: s for p, (s, _) in self.stored_shapes(step).items()}
        wanted = _shapes(abstract)
        missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
        other = sorted(p for p in wanted.keys() & stored.keys() if wanted[p] != stored[p])
        if missing or extra or other:
            parts = [f"missing {missing[:3]}" if missing else "", f"unexpected {extra[:3]}" if extra else ""]
            parts.append(f"{other[0]} is {stored[other[0]]} there and {wanted[other[0]]} here" if other else "")
            raise CheckpointError(
                f"checkpoint {step} is of another model or optimizer: {', '.join(filter(None, parts))}"
            )

    def restore_params(
        self,
        step: int | None = None,
        *,
        average: bool = False,
        cast: Any = None,
        place: Callable[[Any], Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Parameters only (or their moving average), built from what the checkpoint itself says it holds.

        Args:
          step: the newest by default.
          average: the moving average in the place of trained parameters.
          cast: dtype of floating leaves.
          place: `(abstract params) -> shardings`; one device by default.

        Returns:
          (parameters, `run`).
        """
        step, run, structure = self.read_run(step)
        stored = self.stored_shapes(step)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        everything = paths.nested((p, jax.ShapeDtypeStruct(*x, sharding=device)) for p, x in stored.items())
        prefix = "average" if average else "params"
        if prefix not in everything:
            raise CheckpointError(f"checkpoint {step} of {self.folder} holds no moving average")
        wanted = {"params": everything["params"], **({"average": everything["average"]} if average else {})}
        shapes = jax.eval_shape(lambda p: weights.cast(p, cast), self._as_params(wanted["params"], structure))
        spec = jax.tree.map(lambda _: device, shapes) if place is None else place(shapes)
        put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        wanted["params"] = dict_of(jax.tree.map(put, shapes, spec))
        try:
            raw = self._read_arrays(step, wanted)
        except Exception as e:
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} is damaged ({_line(e)}){self._offer(step)}"
            ) from e
        params = self._as_params(raw["params"], structure)
        if average:
            flat = dict(paths.flatten(raw["average"]))
            params = paths.map_with_path(lambda p, x: flat[p].astype(x.dtype) if p in flat else x, params)
        return params, run

    def _read_arrays(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        """Nested dicts of arrays like `wanted`; large ones one by one, the largest first, to bound what is in memory.

        Orbax holds an array's compressed bytes, the array and its copy on the device at once, of all that one call
        asks for.
        """
        flat = sorted(paths.flatten(wanted), key=lambda item: -weights.bytes_of(item[1]))
        share = weights.bytes_of(wanted) / 50
        turns = [[item] for item in flat if weights.bytes_of(item[1]) > share]
        turns += [small] if (small := flat[len(turns) :]) else []
        arrays = []
        with ocp.PyTreeCheckpointer() as reader:
            for turn in turns:
                part = paths.nested(turn)
                places = ocp.checkpoint_utils.construct_restore_args(part)
                args = ocp.args.PyTreeRestore(part, restore_args=places, partial_restore=True)
                got = reader.restore(self._item(step, "state"), args=args)
                arrays += paths.flatten(jax.block_until_ready(got))  # until then its copy on the host lives on
        return paths.nested(arrays)

    @staticmethod
    def _as_params(tree: Any, structure: dict[str, Any]) -> Any:
        """Nested dicts with structured nodes put back where `structure` names them."""
        nodes = {p.removeprefix("params/"): d for p, d in structure.items() if p.startswith("params/")}

        def walk(tree: Any, path: str) -> Any:
            if path in nodes:
                leaves = dict(paths.flatten(tree))
                return weights.build(nodes[path], lambda p: leaves[p.removeprefix(path + "/")], path)
            if isinstance(tree, dict):
                return {k: walk(v, f"{path}/{k}" if path else k) for k, v in tree.items()}
            return tree

        return walk(tree, "")


def dict_of(tree: Any) -> Any:
    """Structured nodes as plain dicts of their leaves, the way array files hold them."""
    return paths.nested(paths.flatten(tree))


def _quality(metrics: dict[str, float]) -> float:
    loss = metrics["eval/loss"]
    return -math.inf if math.isnan(loss) else -loss


def _line(e: Exception) -> str:
    text = str(e).strip().split("\n")[0][:200]
    return f"{type(e).__name__}: {text}"
