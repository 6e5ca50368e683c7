"""A plan: how a run is spread over devices, as one object built from a config.

Data parallelism, hybrid replicas, tensor parallelism (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053), context
parallelism (Liu et al. 2023, https://arxiv.org/abs/2310.01889), pipelines and ZeRO 1-3.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.nn import paths, weights
from llm_jax.nn.execution import Execution
from llm_jax.parallel import explicit, zero
from llm_jax.parallel.memory import offload
from llm_jax.parallel.mesh import AXES, make_mesh
from llm_jax.parallel.pipeline import schedules
from llm_jax.parallel.ring import Ring
from llm_jax.parallel.rules import TENSOR_PARALLEL, Rules, logical_axes, place, without
from llm_jax.parallel.splash import Splash


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """How a run is spread over devices.

    Attributes:
      data: devices along the batch; -1 takes all that are left.
      replica: groups of `data` devices that hold whole copies (hybrid ZeRO divides inside a group only).
      pipe: devices along the layers (pipeline parallelism). Evaluation runs no pipeline: it gathers the layers.
      schedule: of the pipeline: gpipe, 1f1b (holds least), eager_1f1b, interleaved (with chunks the fastest) or
        zero_bubble.
      microbatches: micro-batches of the pipeline; 0 takes twice as many as stages.
      chunks: pieces of layers a device, for schedule=interleaved.
      seq: devices along the sequence (context parallelism): attention is `parallel.ring`'s where its mask is of
        positions and segments and nothing is added to its scores or dropped; elsewhere keys and values are gathered.
      model: devices along heads, feed-forward and vocabulary (tensor parallelism).
      zero: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters divided over `data`
        and `seq`.
      explicit: of zero=3: layers gather their parameters and scatter gradients themselves (`parallel.explicit`) instead
        of the compiler; half the bytes of gradients on TPUs. Dropout draws other masks.
      remat: see `nn.Execution`. A pipeline of one stack computes every layer again, as with `full`.
      attention: see `nn.Execution`.
      offload: what lies in host memory between steps: `optimizer` (state, master copy, average; streamed through the
        device for the update) or `update` (the same, and the update is computed on the host), with `update` also
        `parameters` (those of layers: each comes up when it runs); or in files: `disk` (one device; the update reads,
        computes and writes them layer by layer, see `parallel.memory.disk`).
      precision: fp32, bf16 or fp16.
      master: `in_params`, `in_optimizer` or `none`: where the float32 copy of the weights lives.
      compiler: options of the compiler for the train step, `name=value` each.
      unroll: run layers unrolled rather than scanned (faster steps on a CPU, compile time grows with depth).
    """

    data: int = -1
    replica: int = 1
    pipe: int = 1
    schedule: str = "1f1b"
    microbatches: int = 0
    chunks: int = 1
    seq: int = 1
    model: int = 1
    zero: int = 0
    explicit: bool = False
    remat: str = "none"
    attention: str = "auto"
    offload: tuple[str, ...] = ()
    precision: str = "fp32"
    master: str = "in_params"
    compiler: tuple[str, ...] = ()
    unroll: bool = False

    def __post_init__(self) -> None:
        """Checks ranges."""
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero={self.zero} is not one of 0, 1, 2, 3")
        for name in ("replica", "pipe", "chunks", "seq", "model"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.explicit and (self.zero != 3 or self.pipe > 1 or self.seq > 1 or self.unroll):
            raise ValueError("plan.explicit is of zero=3, without plan.pipe, plan.seq and plan.unroll")
        if self.explicit and self.remat.startswith(("none", "every")):
            raise ValueError(f"plan.explicit would keep gathered layers with plan.remat={self.remat}: set full or dots")
        if unknown := set(self.offload) - set(offload.KINDS):
            raise ValueError(f"offload={', '.join(sorted(unknown))} is not one of {', '.join(offload.KINDS)}")
        if "disk" in self.offload and len(self.offload) > 1:
            raise ValueError("plan.offload=disk stands alone: what lies on disk lies not in host memory")
        if "parameters" in self.offload:
            if "update" not in self.offload:
                raise ValueError("plan.offload=parameters goes with update: their gradients lie on the host")
            if self.pipe > 1 or self.explicit or self.unroll:
                raise ValueError("plan.offload=parameters excludes plan.pipe, plan.explicit and plan.unroll")
            if self.remat.startswith(("none", "every")):
                raise ValueError(f"plan.offload=parameters would keep layers with plan.remat={self.remat}: set full")
            if self.precision != "fp32" and (self.precision == "fp16" or self.master == "in_params"):
                raise ValueError(
                    "plan.offload=parameters keeps what computes: set plan.precision=fp32, or bf16 and "
                    "plan.master=in_optimizer"
                )
        if wrong := [option for option in self.compiler if not option.partition("=")[2]]:
            raise ValueError(f"plan.compiler holds {wrong[0]!r}, which is not of the form name=value")
        if self.schedule not in schedules.NAMES:
            raise ValueError(f"schedule={self.schedule!r} is not one of {', '.join(schedules.NAMES)}")
        if self.pipe > 1:
            self.make_schedule()
            if self.remat.startswith("every:"):
                raise ValueError(f"plan.remat={self.remat} and plan.pipe exclude each other: take full, dots or names")
            if self.seq > 1:
                raise ValueError("plan.pipe and plan.seq exclude each other: set plan.model inside stages")
            if self.unroll:
                raise ValueError("plan.pipe and plan.unroll exclude each other: stages scan their layers")
        elif self.microbatches or self.chunks > 1:
            raise ValueError("plan.microbatches and plan.chunks are of a pipeline: set plan.pipe")
        Execution(remat=self.remat, attention=self.attention)

    def make_schedule(self) -> schedules.Schedule | None:
        """The pipeline's schedule, None without a pipeline.

        Raises:
          ValueError: if its numbers do not go together.
        """
        if self.pipe == 1:
            return None
        micros = self.microbatches or 2 * self.pipe
        if micros < self.pipe:
            raise ValueError(
                f"plan.microbatches={micros} leave stages of plan.pipe={self.pipe} idle: take {self.pipe} or more"
            )
        return schedules.make(self.schedule, self.pipe, micros, self.chunks)


class Plan:
    """A plan config on real devices.

    Attributes:
      config: the config.
      mesh: the devices.
      schedule: of the pipeline, None without.
      rules: logical to mesh axes, for one model.
      zero_axes: mesh axes that ZeRO divides over.
      notes: what stays replicated for the whole model, and why.
    """

    def __init__(self, config: PlanConfig, model_config: Any, devices: Any = None) -> None:
        """Builds the mesh and the rules.

        Heads are divided only where the axis divides both query and key heads; otherwise attention is replicated.
        """
        self.config = config
        sizes = {axis: getattr(config, axis) for axis in AXES}
        self.schedule = config.make_schedule()
        self.mesh = make_mesh(sizes, devices)
        if "disk" in config.offload and self.mesh.size > 1:
            raise ValueError(
                f"plan.offload=disk is for one device, the mesh has {self.mesh.size}: take optimizer or update"
            )
        if self.offloads:
            offload.check_memory(self.mesh.devices.flat[0])
        self.rules: Rules = dict(TENSOR_PARALLEL)
        self.notes: list[str] = []
        if config.pipe > 1:  # a tick's turns reshard nothing: devices at other turns would never come
            self.rules = {**self.rules, "sequence": None}
        self.zero_axes = ("data", "seq") if config.seq > 1 else "data"
        heads = getattr(model_config, "num_heads", 1)
        kv = getattr(model_config, "num_kv_heads", heads)
        decoder = getattr(model_config, "num_decoder_heads", None) or heads
        if heads % config.model or kv % config.model or decoder % config.model:
            if config.pipe > 1:  # whole heads between divided kernels would be resharded inside a tick's turns
                raise ValueError(
                    f"plan.pipe={config.pipe} needs heads that divide by plan.model={config.model}: "
                    f"there are {heads} query and {kv} key heads" + f", {decoder} in the decoder" * (decoder != heads)
                )
            self.rules = {**self.rules, "heads": None, "kv": None}
            self.notes.append(
                f"attention is replicated: {heads} query and {kv} key heads"
                + f", {decoder} in the decoder," * (decoder != heads)
                + f" do not divide by model={config.model}"
            )

    @property
    def offloads(self) -> bool:
        """Whether any state is stored in host memory."""
        return bool(set(self.config.offload) - {"disk"})

    @property
    def keeps_parameters_on_host(self) -> bool:
        """Whether the parameters of layers lie in host memory between steps."""
        return "parameters" in self.config.offload

    @property
    def batch_divisor(self) -> int:
        """Rows of every micro-batch must divide by this."""
        return self.mesh.shape["replica"] * self.mesh.shape["data"]

    def micros(self, accumulation: int) -> int:
        """Micro-batches of a step: a pipeline's, or those that are accumulated."""
        return accumulation if self.schedule is None else self.schedule.micros

    @property
    def alive(self) -> float:
        """Micro-batches whose activations a device keeps at once, of its own layers."""
        return 1.0 if self.schedule is None else max(self.schedule.live()) / self.schedule.chunks

    def data_blocks(self) -> tuple[tuple[int, ...], int]:
        """(blocks, count): which of the `count` equal blocks of every batch this process reads, ascending.

        A block is what one coordinate of the replica and data axes holds, so the rows of a batch keep their order
        whatever the mesh gives to which process. Processes whose devices hold the same rows (the model axis crosses
        processes) read the same blocks.

        Raises:
          ValueError: if the rows of two processes overlap in part.
        """
        owners = [{d.process_index for d in row} for row in self.mesh.devices.reshape(self.batch_divisor, -1)]
        processes = sorted(set().union(*owners))
        blocks_of = {p: tuple(i for i, owner in enumerate(owners) if p in owner) for p in processes}
        shares = sorted(set(blocks_of.values()))
        if sum(map(len, shares)) != len(owners) or len({len(s) for s in shares}) > 1:
            raise ValueError(f"mesh {dict(self.mesh.shape)} cuts rows across processes unevenly; change plan.model")
        return blocks_of[jax.process_index()], len(owners)

    def check_batch(self, batch_size: int, accumulation: int = 1, length: int | None = None) -> None:
        """Raises ValueError where the batch or the length of its rows does not divide."""
        if length is not None and length % self.config.seq:
            low = length // self.config.seq * self.config.seq
            raise ValueError(
                f"training.sequence_length={length} does not divide by plan.seq={self.config.seq}: "
                f"take {low or low + self.config.seq} or {low + self.config.seq}"
            )
        if accumulation > 1 and self.keeps_parameters_on_host:
            raise ValueError(
                f"training.accumulation={accumulation} with plan.offload=parameters: set it to 1; "
                "plan.remat=offload:block makes room for larger batches"
            )
        name, parts = "accumulation", accumulation
        if self.schedule is not None:
            if accumulation > 1:
                raise ValueError(f"training.accumulation={accumulation} with plan.pipe: set plan.microbatches")
            name, parts = "microbatches", self.schedule.micros
        need = self.batch_divisor * parts
        if batch_size % need:
            raise ValueError(
                f"training.batch_size={batch_size} does not divide by {need} "
                f"(data={self.batch_divisor} x {name}={parts})"
            )

    def check_optimizer(self, name: str, layer_decay: float = 1.0) -> None:
        """Raises ValueError where the update runs on the host or by pieces and the optimizer's cannot."""
        kinds = set(self.config.offload) & {"update", "disk"}
        if kinds and name not in offload.ELEMENTWISE:
            raise ValueError(
                f"plan.offload={', '.join(kinds)} computes elementwise optimizers on the host or by pieces "
                f"({', '.join(offload.ELEMENTWISE)}), not {name}: set plan.offload=('optimizer',)"
            )
        if layer_decay != 1 and "disk" in kinds:
            raise ValueError(
                f"optimizer.layer_decay={layer_decay} with plan.offload=disk, whose pieces do not know their layer: "
                "set plan.offload=('update',) or layer_decay=1"
            )

    def execution(self, **changes: Any) -> Execution:
        """How the model runs under this plan."""
        fields = {"remat": self.config.remat, "attention": self.config.attention, "constrain": self.constrain}
        rows, heads = ("replica", "data"), "model" if self.rules["heads"] else None
        if self.config.seq > 1:
            fields["kernel"] = Ring(self.mesh, rows, heads, sequence="seq")
        elif self.mesh.devices.flat[0].platform == "tpu":
            fields["kernel"] = Splash(self.mesh, rows, heads)
        return Execution(**{**fields, **changes})

    def constrain(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """Pins an activation's sharding; dimensions that do not divide stay free."""
        if self.mesh.size == 1:
            return x
        inside = jax.sharding.get_abstract_mesh()  # of a pipeline's stage, or of explicit ZeRO: some axes are manual
        rules = self.rules if inside.empty else without(self.rules, inside.manual_axes)
        spec = place(P(*axes), x.shape, rules, self.mesh).spec
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh if inside.empty else inside, spec))

    def _named(self, specs: Any) -> Any:
        return jax.tree.map(lambda s: NamedSharding(self.mesh, s), specs, is_leaf=lambda s: isinstance(s, P))

    def _stored(self, specs: Any, params: Any) -> Any:
        """Shardings of parameters, or of what is like them, in the memory that the plan keeps them in."""
        named = self._named(specs)
        return offload.layers_to_host(named, params) if self.keeps_parameters_on_host else named

    def batch_sharding(self) -> NamedSharding:
        """Sharding of batches: rows over the replica and data axes."""
        return NamedSharding(self.mesh, P(("replica", "data")))

    def specs(self, params: Any, axes: Any, divided: bool) -> Any:
        """Mesh axes of every parameter leaf; `divided` adds ZeRO's axis."""
        names = logical_axes(params, axes)
        is_spec = lambda x: isinstance(x, P)
        flat = [
            place(n, x.shape, self.rules, self.mesh).spec
            for n, x in zip(jax.tree.leaves(names, is_leaf=is_spec), jax.tree.leaves(params), strict=True)
        ]
        specs = jax.tree.unflatten(jax.tree.structure(params), flat)
        if not divided:
            return specs
        own = self.config.explicit or (
            self.schedule is not None and self.config.zero >= 3
        )  # layers gather kernels themselves
        turned = explicit.kernels(names) if own else None
        return zero.divide_tree(specs, params, names, self.mesh, self.zero_axes, turned)

    def staged(self, params: Any, axes: Any) -> Any:
        """Mesh axes of parameters between a pipeline's turns: matrices of layers as stored, all else whole."""
        names, whole, stored = logical_axes(params, axes), *(self.specs(params, axes, d) for d in (False, True))
        between = lambda names, w, s: P(w[0], *s[1:]) if explicit.is_layer_matrix(names) else w
        return jax.tree.map(between, names, whole, stored, is_leaf=lambda x: isinstance(x, P))

    def param_shardings(self, params: Any, axes: Any) -> Any:
        """Shardings in which parameters are stored."""
        return self._stored(self.specs(params, axes, self.config.zero >= 3), params)

    def grad_shardings(self, params: Any, axes: Any) -> Any:
        """Shardings of gradients."""
        return self._stored(self.specs(params, axes, self.config.zero >= 2), params)

    def update_shardings(self, params: Any, axes: Any) -> Any:
        """Shardings that the optimizer sees gradients and parameters in."""
        return self._stored(self.specs(params, axes, self.config.zero >= 1), params)

    def state_shardings(self, state: Any, axes: Any) -> Any:
        """Shardings of a whole `TrainState` (abstract)."""
        stored = self.specs(state.params, axes, self.config.zero >= 3)
        inner = self.specs(state.params, axes, self.config.zero >= 1)
        flat = zip(paths.flatten(state.params), jax.tree.leaves(inner, is_leaf=lambda x: isinstance(x, P)), strict=True)
        by_path = {path: (tuple(leaf.shape), spec) for (path, leaf), spec in flat}
        axes_or_none = self.zero_axes if self.config.zero >= 1 else None
        whole = zero.state_specs(state.replace(params=None), by_path, self.mesh, axes_or_none)
        rows = jax.tree.map(lambda _: self.batch_sharding().spec, state.carry)
        named = self._named(whole.replace(params=stored, carry=rows))
        named = named.replace(params=self._stored(stored, state.params))
        if "disk" in self.config.offload:  # of one device, and one zero stands for every array in a file
            return jax.tree.map(lambda _: NamedSharding(self.mesh, P()), named)
        if self.offloads:
            lower = lambda name: offload.to_host(getattr(named, name), getattr(state, name))
            named = named.replace(**{name: lower(name) for name in ("opt_state", "master", "average")})
        return named

    def bytes_per_device(self, state: Any, axes: Any) -> dict[str, int]:
        """What one device holds of a state and of the gradients between backward and update, in bytes by kind.

        With `master=in_optimizer` in half precision and Adam these are the terms of the ZeRO paper's table: 2P, 2P and
        12P undivided.

        Args:
          state: an abstract `TrainState`.
          axes: logical axes of its parameters.
        """

        def bytes_of(tree: Any, shardings: Any) -> int:
            shard = lambda x, s: weights.bytes_of(jax.ShapeDtypeStruct(s.shard_shape(tuple(x.shape)), x.dtype))
            return sum(jax.tree.leaves(jax.tree.map(shard, tree, shardings)))

        shardings = self.state_shardings(state, axes)
        rest = lambda s: (s.opt_state, s.master, s.average)
        return {
            "parameters": bytes_of(state.params, shardings.params),
            "gradients": bytes_of(state.params, self.grad_shardings(state.params, axes)),
            "optimizer": bytes_of(rest(state), rest(shardings)),
        }

    def describe(self, params: Any, axes: Any) -> str:
        """Per parameter: shape, logical axes, mesh axes, bytes per device, and what stays replicated and why."""
        names = logical_axes(params, axes)
        is_spec = lambda x: isinstance(x, P)
        specs = jax.tree.leaves(self.specs(params, axes, self.config.zero >= 3), is_leaf=is_spec)
        logical = jax.tree.leaves(names, is_leaf=is_spec)
        lines = [f"mesh { {a: n for a, n in self.mesh.shape.items() if n > 1} }, zero {self.config.zero}", *self.notes]
        for (path, leaf), spec, name in zip(paths.flatten(params), specs, logical, strict=True):
            shard = NamedSharding(self.mesh, spec).shard_shape(tuple(leaf.shape))
            size = weights.bytes_of(jax.ShapeDtypeStruct(shard, leaf.dtype))
            why = place(name, leaf.shape, self.rules, self.mesh).why
            dtype = jnp.dtype(leaf.dtype).name
            lines.append(f"{path}  {dtype}{list(leaf.shape)}  {tuple(name)}  {tuple(spec)}  {size:,} B  {why}".rstrip())
        return "\n".join(lines)
