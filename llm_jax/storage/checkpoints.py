"""Checkpoints: Orbax behind a thin facade.

`folder/<step>/` holds `state` (arrays), `structure` (what array files cannot hold: types and static fields of
structured weights), `run` (config, position in the data, library version) and, of a run with state on disk, `mapped`
(copies of its files). Layers are stored stacked, whatever the run used, unless they differ. A checkpoint of either kind
of run resumes as the other.

A checkpoint may leave arrays out that are stored elsewhere, like the frozen base of a delta run; `run["left_out"]` then
holds their shapes and dtypes by path, and whoever restores brings them.
"""

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.typing import DTypeLike
from orbax.checkpoint import checkpoint_managers as policies

import llm_jax
from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Params, Tree
from llm_jax.storage import copied_files
from llm_jax.storage.mapped import MappedArrays


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      step: number of the step.
      state: arrays, shaped and placed like the target.
      run: `config`, `data` (loader position), `version`, ....
    """

    step: int
    state: Tree
    run: dict[str, Any]


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _unkey(tree: Tree) -> Tree:
    """Typed keys as their raw data, which array files can hold."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _rekey(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(lambda x, l: jax.random.wrap_key_data(x) if _is_key(l) else x, tree, like)


def _abstract(target: Tree, shardings: Tree) -> Tree:
    """Shapes, dtypes and a sharding for every leaf, keys as raw data."""
    raw = jax.eval_shape(_unkey, target)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if shardings is None:
        shardings = jax.tree.map(lambda x: x.sharding if isinstance(x, jax.Array) else device, target)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), raw, shardings)


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    return {p: tuple(x.shape) for p, x in paths.flatten(tree)}


class Checkpoints:
    """Reads and writes the checkpoints of one run."""

    def __init__(
        self,
        folder: epath.PathLike,
        keep_last: int = 2,
        keep_best: int = 0,
        asynchronous: bool = True,
        read_only: bool = False,
        mapped: MappedArrays | None = None,
    ) -> None:
        """Opens or creates the folder.

        Args:
          folder: local or remote path.
          keep_last: number of newest checkpoints that stay.
          keep_best: number of checkpoints with the lowest `eval/loss` that stay besides.
          asynchronous: write in the background.
          read_only: never write or clean up; for readers beside a live run.
          mapped: the part of the state that lies in files.
        """
        self._mapped = mapped
        self._left_out: frozenset[str] = frozenset()
        self._waiting: threading.Thread | None = None
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
        names = ("state", "structure", "run", "mapped")
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options, item_names=names)

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest step with a finished checkpoint."""
        return self._manager.latest_step()

    def leave_out(self, names: Collection[str]) -> None:
        """Saves nothing at these paths from here on (`params/embed/embedding`): it is stored elsewhere."""
        self._left_out = frozenset(names)

    def save(self, step: int, state: Tree, run: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Writes a checkpoint; it appears only once it is complete.

        Checkpoints of this step and of later ones are deleted: a run that went further left them, before this one
        restored an older step. So the newest checkpoint is always the live run's.

        Raises:
          CheckpointError: where the disk refuses; earlier checkpoints stay untouched.
        """
        run = {"version": llm_jax.__version__, **run}
        if self._left_out:
            absent = {p: (x.shape, x.dtype.name) for p, x in paths.flatten(state) if p in self._left_out}
            if missing := sorted(self._left_out - absent.keys()):
                raise CheckpointError(f"checkpoint {step} cannot leave out {missing[0]}, which the state lacks")
            run["left_out"] = {p: [list(shape), dtype] for p, (shape, dtype) in absent.items()}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_unkey(_without(state, self._left_out))),
            structure=ocp.args.JsonSave(weights.structure(state)),
            run=ocp.args.JsonSave(run),
            **({} if self._mapped is None else {"mapped": copied_files.CopyFiles(self._mapped)}),
        )
        try:
            for stale in [s for s in self.steps() if s >= step]:
                self._manager.delete(stale)
            self._manager.save(step, args=args, metrics=metrics, force=True)
        except Exception as e:
            raise CheckpointError(f"checkpoint {step} could not be written to {self.folder}: {_line(e)}") from e

    def saving(self, seconds: float = 0.05) -> bool:
        """Whether background writes still run after this many seconds; their errors surface in `wait`."""
        if self._waiting is None:
            self._waiting = threading.Thread(target=self._try_to_wait, daemon=True)
            self._waiting.start()
        self._waiting.join(seconds)
        if self._waiting.is_alive():
            return True
        self._waiting = None
        return False

    def _try_to_wait(self) -> None:
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()

    def wait(self) -> None:
        """Waits for background writes; their errors surface here."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise CheckpointError(f"a checkpoint could not be written to {self.folder}: {_line(e)}") from e

    def close(self) -> None:
        """Waits for checkpoints that are being written, and closes."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _reading(self, step: int, what: str = "damaged") -> Iterator[None]:
        """Turns any error into one that names the checkpoint and offers the previous one."""
        try:
            yield
        except Exception as e:
            earlier = [s for s in self.steps() if s < step]
            offer = f"; the previous one is {earlier[-1]} (--restore_step={earlier[-1]})" if earlier else ""
            raise CheckpointError(f"checkpoint {self.folder / str(step)} is {what} ({_line(e)}){offer}") from e

    def read_run(self, step: int | None = None) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """The step number, `run` and `structure` of a checkpoint, without its arrays.

        Raises:
          CheckpointError: if there is none, or it cannot be read.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self.steps():
            found = f"; there are {self.steps()}" if self.steps() else ""
            raise CheckpointError(f"no checkpoint {'' if step is None else step} in {self.folder}{found}")
        with self._reading(step, "damaged or not ours"), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            run, structure = (reader.restore(self._item(step, name)) for name in ("run", "structure"))
        return step, run, structure

    def _item(self, step: int, name: str) -> epath.Path:
        return self.folder.absolute() / str(step) / name

    def restore(self, target: Tree, step: int | None = None, shardings: Tree = None, rest: Tree = None) -> Restored:
        """Restores onto any mesh: shapes and types come from `target`, devices from `shardings`.

        Args:
          target: the state's shapes and types; arrays or abstract.
          step: the newest by default.
          shardings: of `target`; where its arrays are, or one device, by default.
          rest: a state like `target` that gives what the checkpoint leaves out; None where it holds everything.

        Raises:
          CheckpointError: if the checkpoint is missing, damaged or of another model; the message names what differs
            and offers the previous one.
        """
        step, run, structure = self.read_run(step)
        wanted = weights.structure(target)
        if structure != wanted:
            first = min(k for k in structure.keys() | wanted.keys() if structure.get(k) != wanted.get(k))
            raise CheckpointError(
                f"checkpoint {step} holds other structured weights than this run: {first} is "
                f"{structure.get(first)} there and {wanted.get(first)} here"
            )
        abstract, absent = _abstract(target, shardings), self._absent(step, run, rest)
        self._compare(step, abstract, absent)
        with self._reading(step):
            raw = self._restore(step, _without(abstract, absent))
        state = _rekey(raw, _without(target, absent))
        return Restored(step, _filled(state, rest) if absent else state, run)

    def _absent(self, step: int, run: Mapping[str, Any], rest: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
        """`{path: (shape, dtype)}` of what a checkpoint leaves out, which `rest` has to bring."""
        absent = {p: (tuple(shape), jnp.dtype(dtype)) for p, (shape, dtype) in run.get("left_out", {}).items()}
        if absent and rest is None:
            base = run.get("base", {}).get("path", "another model")
            raise CheckpointError(
                f"checkpoint {step} of {self.folder} holds a delta without its frozen base, which is {base}: "
                "interop.load of the work directory joins them"
            )
        return absent

    def _files(self, step: int) -> dict[str, epath.Path]:
        return copied_files.files_in(self._item(step, "mapped"))

    def _restore(self, step: int, abstract: Tree) -> Tree:
        """Arrays like `abstract`; mapped ones are written to their files one by one, and are `zeros([1])` here."""
        flat, files = dict(paths.flatten(abstract)), self._files(step)
        arrays = self._mapped
        if not files and arrays is None:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            return self._manager.restore(step, args=args).state
        mapped = [] if arrays is None else [p for p in flat if p in arrays]

        def read(wanted: Collection[str]) -> dict[str, Any]:
            part = paths.map_with_path(lambda p, x: x if p in wanted else ocp.PLACEHOLDER, abstract)
            with ocp.PyTreeCheckpointer() as reader:
                args = ocp.args.PyTreeRestore(part, restore_args=ocp.checkpoint_utils.construct_restore_args(part))
                restored = reader.restore(self._item(step, "state"), args)
            return {p: x for p, x in paths.flatten(restored, lambda x: x is ocp.PLACEHOLDER) if p in wanted}

        out = read([p for p in flat if p not in mapped and p not in files])
        for path in mapped:
            assert arrays is not None
            arrays.fill(path, copied_files.open_array(files[path]) if path in files else read([path])[path])
            out[path] = jnp.zeros((1,), flat[path].dtype)
        for path in files.keys() & flat.keys() - set(mapped):
            out[path] = jax.device_put(copied_files.open_array(files[path]), flat[path].sharding)
        return jax.tree.unflatten(jax.tree.structure(abstract), [out[p] for p in flat])

    def stored_shapes(self, step: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """`{path: (shape, dtype)}` of the arrays of a checkpoint."""
        with self._reading(step):
            with ocp.PyTreeCheckpointer() as reader:
                tree = reader.metadata(self._item(step, "state")).item_metadata.tree
            found = {p: (tuple(m.shape), m.dtype) for p, m in paths.flatten(tree)}
            return found | {name: copied_files.header(file) for name, file in self._files(step).items()}

    def _compare(self, step: int, abstract: Tree, absent: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
        stored = {p: s for p, (s, _) in (self.stored_shapes(step) | dict(absent)).items()}
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
        average: bool | None = False,
        cast: DTypeLike | None = None,
        place: Callable[[Params], Tree] | None = None,
        rest: Mapping[str, Any] | None = None,
    ) -> tuple[Params, dict[str, Any]]:
        """Parameters only (or their moving average), built from what the checkpoint itself says it holds.

        Args:
          step: the newest by default.
          average: the moving average instead of the trained parameters; None takes it where there is one.
          cast: dtype of floating leaves.
          place: `(abstract params) -> shardings`; one device by default.
          rest: arrays by path that give what the checkpoint leaves out of the parameters (see `leave_out`).

        Returns:
          (parameters, `run`).

        Raises:
          CheckpointError: if the checkpoint is missing or damaged, holds no average, or leaves out what `rest` lacks.
        """
        step, run, structure = self.read_run(step)
        absent = self._absent(step, run, rest)
        stored = self.stored_shapes(step) | absent
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        everything = paths.nested((p, jax.ShapeDtypeStruct(*x, sharding=device)) for p, x in stored.items())
        average = "average" in everything if average is None else average
        prefix = "average" if average else "params"
        if prefix not in everything:
            raise CheckpointError(f"checkpoint {step} of {self.folder} holds no moving average")
        shapes = jax.eval_shape(lambda p: weights.cast(p, cast), self._as_params(everything["params"], structure))
        spec = jax.tree.map(lambda _: device, shapes) if place is None else place(shapes)
        placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, spec)
        given = {p.removeprefix("params/"): shape for p, (shape, _) in absent.items()}
        flat = dict(paths.flatten(placed))
        wanted = {"params": paths.nested((p, x) for p, x in flat.items() if p not in given)}
        if average:
            like = lambda p, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=flat[p].sharding)
            wanted["average"] = paths.map_with_path(like, everything["average"])
        with self._reading(step):
            raw = self._read_arrays(step, wanted)
        read = dict(paths.flatten(raw["params"]))
        for path, shape in given.items():
            if rest is None or path not in rest or tuple(rest[path].shape) != shape:
                raise CheckpointError(
                    f"checkpoint {step} leaves out {path} {list(shape)}, which its base does not have"
                )
            read[path] = jax.device_put(rest[path].astype(flat[path].dtype), flat[path].sharding)
        params = self._as_params(paths.nested(read.items()), structure)
        if average:
            mean = dict(paths.flatten(raw["average"]))
            params = paths.map_with_path(lambda p, x: mean[p].astype(x.dtype) if p in mean else x, params)
        return params, run

    def _read_arrays(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        """Nested dicts of arrays like `wanted`; large ones one by one, the largest first, to bound what is in memory.

        Orbax holds an array's compressed bytes, the array and its copy on the device at once, of all that one call
        asks for.
        """
        files, everything = self._files(step), paths.flatten(wanted)
        copied = [(path, x.sharding) for path, x in everything if path in files]
        arrays = [(path, jax.device_put(copied_files.open_array(files[path]), sharding)) for path, sharding in copied]
        rest = [item for item in everything if item[0] not in files]
        rest.sort(key=lambda item: -weights.bytes_of(item[1]))
        large = sum(weights.bytes_of(x) for _, x in rest) / 50
        calls = [[item] for item in rest if weights.bytes_of(item[1]) > large]
        calls += [small] if (small := rest[len(calls) :]) else []
        with ocp.PyTreeCheckpointer() as reader:
            for items in calls:
                part = paths.nested(items)
                restore_args = ocp.checkpoint_utils.construct_restore_args(part)
                args = ocp.args.PyTreeRestore(part, restore_args=restore_args, partial_restore=True)
                read = reader.restore(self._item(step, "state"), args=args)
                arrays += paths.flatten(jax.block_until_ready(read))  # until then its copy on the host lives on
        return paths.nested(arrays)

    @staticmethod
    def _as_params(tree: Params, structure: dict[str, Any]) -> Params:
        """Nested dicts with structured nodes put back where `structure` names them."""
        nodes = {p.removeprefix("params/"): d for p, d in structure.items() if p.startswith("params/")}

        def walk(tree: Tree, path: str) -> Tree:
            if path in nodes:
                leaves = dict(paths.flatten(tree))
                return weights.build(nodes[path], lambda p: leaves[p.removeprefix(path + "/")], path)
            if isinstance(tree, dict):
                return {k: walk(v, f"{path}/{k}" if path else k) for k, v in tree.items()}
            return tree

        return walk(tree, "")


def _without(tree: Tree, absent: Collection[str]) -> Tree:
    """The tree with None at these paths."""
    return paths.map_with_path(lambda p, x: None if p in absent else x, tree) if absent else tree


def _filled(tree: Tree, rest: Tree) -> Tree:
    """Undoes `_without` with the leaves of `rest`."""
    return jax.tree.map(lambda x, r: r if x is None else x, tree, rest, is_leaf=lambda x: x is None)


def _quality(metrics: dict[str, float]) -> float:
    loss = metrics["eval/loss"]
    return -math.inf if math.isnan(loss) else -loss


def _line(e: Exception) -> str:
    text = str(e).strip().split("\n")[0][:200]
    return f"{type(e).__name__}: {text}"
