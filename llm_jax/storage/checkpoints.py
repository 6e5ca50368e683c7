"""Checkpoints: Orbax behind a thin facade.

`folder/<step>/` holds `state` (arrays), `structure` (what array files cannot hold: types and static fields of
structured weights), `run` (config, position in the data, library version) and, of a run with state on disk, `mapped`
(copies of its files). Layers are stored stacked, whatever the run used, unless they differ. A checkpoint of either kind
of run resumes as the other.
"""

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from numpy.lib import format as npy
from orbax.checkpoint import checkpoint_managers as policies

import llm_jax
from llm_jax.nn import paths, weights
from llm_jax.storage.mapped import MappedArrays


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


class _FilesHandler(ocp.CheckpointHandler):
    """Copies the files of mapped arrays, which are never in memory as a whole."""

    def save(self, directory: epath.Path, args: Any) -> None:
        for name in args.arrays:
            to = directory / f"{name}.npy"
            to.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(args.arrays.file(name)).copy(to, overwrite=True)

    def restore(self, directory: epath.Path, args: Any = None) -> Any:
        raise NotImplementedError(f"files of {directory} are opened one by one")


@ocp.args.register_with_handler(_FilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _FilesSave(ocp.args.CheckpointArgs):
    arrays: MappedArrays


class Checkpoints:
    """The checkpoints of one run."""

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
          keep_last: newest checkpoints kept.
          keep_best: checkpoints with the lowest `eval/loss` kept beside them.
          asynchronous: write in the background.
          read_only: never write or clean up; for readers beside a live run.
          mapped: the part of the state that lies in files.
        """
        self._mapped = mapped
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
            **({} if self._mapped is None else {"mapped": _FilesSave(self._mapped)}),
        )
        try:
            for stale in [s for s in self.steps() if s >= step]:
                self._manager.delete(stale)
            self._manager.save(step, args=args, metrics=metrics, force=True)
        except Exception as e:
            raise CheckpointError(f"checkpoint {step} could not be written to {self.folder}: {_line(e)}") from e

    def saving(self, seconds: float = 0.05) -> bool:
        """Whether background writes go on after this many seconds; their errors surface in `wait`."""
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
            raw = self._restore(step, abstract)
        except Exception as e:
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} is damaged ({_line(e)}){self._offer(step)}"
            ) from e
        return Restored(step, _rekey(raw, target), run)

    def _files(self, step: int) -> dict[str, epath.Path]:
        """Copied files of a checkpoint, by the array that each holds."""
        folder = self._item(step, "mapped")
        found = _below(folder) if folder.exists() else []
        return {str(f.relative_to(folder)).removesuffix(".npy"): f for f in found if f.suffix == ".npy"}

    def _restore(self, step: int, abstract: Any) -> Any:
        """Arrays like `abstract`; those of mapped arrays go to their files one by one, and are one zero here."""
        flat, files = dict(paths.flatten(abstract)), self._files(step)
        arrays = self._mapped
        if not files and arrays is None:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            return self._manager.restore(step, args=args).state
        mapped = [] if arrays is None else [p for p in flat if p in arrays]

        def read(wanted: Collection[str]) -> dict[str, Any]:
            part = paths.map_with_path(lambda p, x: x if p in wanted else ocp.PLACEHOLDER, abstract)
            with ocp.PyTreeCheckpointer() as reader:
                places = ocp.checkpoint_utils.construct_restore_args(part)
                got = reader.restore(self._item(step, "state"), ocp.args.PyTreeRestore(part, restore_args=places))
            return {p: x for p, x in paths.flatten(got, lambda x: x is ocp.PLACEHOLDER) if p in wanted}

        out = read([p for p in flat if p not in mapped and p not in files])
        for path in mapped:
            assert arrays is not None
            arrays.fill(path, _open(files[path]) if path in files else read([path])[path])
            out[path] = jnp.zeros((1,), flat[path].dtype)
        for path in files.keys() & flat.keys() - set(mapped):
            out[path] = jax.device_put(_open(files[path]), flat[path].sharding)
        return jax.tree.unflatten(jax.tree.structure(abstract), [out[p] for p in flat])

    def stored_shapes(self, step: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """`{path: (shape, dtype)}` of the arrays of a checkpoint."""
        try:
            with ocp.PyTreeCheckpointer() as reader:
                tree = reader.metadata(self._item(step, "state")).item_metadata.tree
            found = {p: (tuple(m.shape), m.dtype) for p, m in paths.flatten(tree)}
            return found | {name: _header(file) for name, file in self._files(step).items()}
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
        files, everything = self._files(step), paths.flatten(wanted)
        arrays = [(p, jax.device_put(_open(files[p]), x.sharding)) for p, x in everything if p in files]
        flat = sorted(
            (item for item in everything if item[0] not in files), key=lambda item: -weights.bytes_of(item[1])
        )
        share = sum(weights.bytes_of(x) for _, x in flat) / 50
        turns = [[item] for item in flat if weights.bytes_of(item[1]) > share]
        turns += [small] if (small := flat[len(turns) :]) else []
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


def _below(folder: epath.Path) -> list[epath.Path]:
    """All files."""
    return [f for path in folder.iterdir() for f in (_below(path) if path.is_dir() else [path])]


def _open(file: epath.Path) -> np.ndarray:
    """The array of a `.npy` file; mapped where the file is local."""
    if "://" not in str(file):
        return np.load(str(file), mmap_mode="r")
    with file.open("rb") as f:
        return np.load(f)


def _header(file: epath.Path) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a `.npy` file."""
    with file.open("rb") as f:
        npy.read_magic(f)
        shape, _, dtype = npy.read_array_header_1_0(f)
    return shape, dtype


def _quality(metrics: dict[str, float]) -> float:
    loss = metrics["eval/loss"]
    return -math.inf if math.isnan(loss) else -loss


def _line(e: Exception) -> str:
    text = str(e).strip().split("\n")[0][:200]
    return f"{type(e).__name__}: {text}"
