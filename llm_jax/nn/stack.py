"""N equal blocks over one parameter tree, scanned or unrolled.

Linen's own `scan` and `remat` change initialisation and dropout and cannot share weights between layers; here the
block is applied as a pure function, so that both forms give the same numbers.

The tree's shape decides: stacked leaves (a leading layer axis) run in `lax.scan`, children `0, 1, ...` run
unrolled. `stack` and `unstack` convert.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from llm_jax.nn import weights
from llm_jax.nn.execution import Call, Execution
from llm_jax.nn.protocols import Tree


def is_unstacked(layers: Tree) -> bool:
    """True for a tree with children `0, 1, ...`."""
    return isinstance(layers, Mapping) and "0" in layers


def _num_stacked(layers: Tree) -> int:
    return jax.tree.leaves(layers)[0].shape[0]


def _merge(base: Tree, extra: Tree) -> Tree:
    if not isinstance(base, Mapping) or not isinstance(extra, Mapping):
        return extra
    return {**base, **{k: _merge(base[k], v) if k in base else v for k, v in extra.items()}}


def _every(tree: Tree, fn: Callable[[Tree], Tree]) -> Tree:
    """Applies `fn` to every subtree called `layers` or `per_layer`."""
    if not isinstance(tree, Mapping):
        return tree
    return {k: fn(v) if k in ("layers", "per_layer") else _every(v, fn) for k, v in tree.items()}


def unstack(params: Tree) -> Tree:
    """Splits every stacked `layers` subtree into children `0, 1, ...`."""
    return _every(params, lambda layers: layers if is_unstacked(layers) else _split(layers))


def stack(params: Tree) -> Tree:
    """Stacks every unrolled `layers` subtree.

    Raises:
      ValueError: if layers differ in structure or shape (such a tree runs unrolled only).
    """

    def join(layers: Tree) -> Tree:
        if not is_unstacked(layers):
            return layers
        each = [layers[str(i)] for i in range(len(layers))]
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), e) for e in each]
        if any(s != shapes[0] for s in shapes[1:]):
            raise ValueError("layers differ in structure or shape and cannot be stacked; keep them unrolled")
        return _join(each)

    return _every(params, join)


# jitted, so that a call outside of a trace compiles once and not once a leaf


@functools.partial(jax.jit, inline=True)
def _split(layers: Tree) -> Tree:
    count = _num_stacked(layers)
    # split, whose gradient is one concatenation; that of x[i] pads every layer to the whole stack and adds
    leaves, tree = jax.tree.flatten(layers)
    pieces = [jax.lax.split(x, [1] * count) for x in leaves]
    return {str(i): jax.tree.unflatten(tree, [jnp.squeeze(p[i], 0) for p in pieces]) for i in range(count)}


@functools.partial(jax.jit, inline=True)
def _join(each: Tree) -> Tree:
    return jax.tree.map(lambda *x: jnp.stack(x), *each)


class Stack(nn.Module):
    """Runs `num_layers` blocks made by `make_block`.

    A block is a Linen module called as `block(carry, per_layer, *shared, train=...) -> (carry, output)`.

    Attributes:
      make_block: makes an unbound block, called with `parent=None`.
      num_layers: L.
      num_groups: G parameter sets; None means as many as layers.
      group_size: S consecutive sets run in turn before these or the next S run again (layers inside ALBERT's groups);
        with S = 1 layer l uses set l * G // L.
      execution: remat policy and stack runner.
    """

    make_block: Callable[..., nn.Module]
    num_layers: int
    num_groups: int | None = None
    execution: Execution = Execution()
    group_size: int = 1

    def _init(self, key: jax.Array, carry: Tree, per_layer: Tree, shared: tuple[Tree, ...]) -> Tree:
        groups = self.num_groups or self.num_layers
        block = self.make_block(parent=None)
        first = _pick(per_layer, 0)

        def init(group: jax.Array) -> Tree:
            return block.init(jax.random.fold_in(key, group), carry, first, *shared, train=False)["params"]

        boxed = jax.vmap(init)(jnp.arange(groups))
        is_box = lambda x: isinstance(x, weights.Boxed)
        return jax.tree.map(lambda b: b.add_axis(0, {"name": "layers"}), boxed, is_leaf=is_box)

    @nn.compact
    def __call__(
        self, carry: Tree, per_layer: Tree = None, shared: tuple[Tree, ...] = (), train: bool = False
    ) -> tuple[Tree, Tree]:
        """Runs all layers.

        Args:
          carry: what flows from layer to layer.
          per_layer: per-layer inputs, a tuple with one tree a layer, or None.
          shared: inputs that all layers see.
          train: turns dropout on; needs a `dropout` stream.

        Returns:
          (last carry, tuple of per-layer outputs, or None where blocks return None).

        Raises:
          ValueError: if the parameters hold another number of layers, or a stack runner meets layers that differ.
        """
        count, groups = self.num_layers, self.num_groups or self.num_layers
        if self.is_initializing():
            self.param("layers", lambda key: self._init(key, carry, per_layer, shared))
        params, _ = weights.split_axes(self.get_variable("params", "layers"))
        extra = self.get_variable("params", "per_layer") if self.has_variable("params", "per_layer") else None
        stored = len(params) if is_unstacked(params) else _num_stacked(params)
        if stored != groups:
            raise ValueError(f"{'/'.join(self.path)}/layers holds {stored} layers, the config asks for {groups}")
        key = self.make_rng("dropout") if train else None
        block = self.make_block(parent=None)
        sowing = self.is_mutable_collection("intermediates") and not self.is_initializing()

        # what a layer sees beside its parameters and the carry is an argument: a runner may cut it into micro-batches
        def layer(p: Tree, index: jax.Array | int, carry: Tree, inputs: Tree, context: Tree) -> tuple[Tree, Tree, Tree]:
            shared, key = context
            carry = jax.tree.map(lambda x: checkpoint_name(x, "block"), carry)
            rngs = {} if key is None else {"dropout": jax.random.fold_in(key, index)}
            run = lambda **kw: block.apply({"params": p}, carry, inputs, *shared, train=train, rngs=rngs, **kw)
            if not sowing:
                return *run(), None
            (carry, out), sown = run(mutable=["intermediates"])
            return carry, out, sown.get("intermediates", {})

        size = self.group_size
        group_of = [l // size * (groups // size) // (count // size) * size + l % size for l in range(count)]
        if self.execution.stack_runner is not None:
            if extra is not None:
                raise ValueError("a stack_runner runs layers that share their structure: no per_layer")
            call = Call(self.path, layer, params, tuple(group_of), carry, per_layer, (shared, key))
            return self.execution.stack_runner(call)
        run = _unrolled if is_unstacked(params) else scanned

        def in_context(p: Tree, index: jax.Array | int, carry: Tree, inputs: Tree) -> tuple[Tree, Tree, Tree]:
            return layer(p, index, carry, inputs, (shared, key))

        carry, outputs, sown = run(in_context, params, extra, group_of, carry, per_layer, self.execution)
        if sowing:
            for index, tree in enumerate(sown):
                self.sow("intermediates", str(index), tree)
        return carry, outputs


def _pick(per_layer: Tree, index: int) -> Tree:
    return None if per_layer is None else per_layer[index]


def _chunks(execution: Execution, count: int) -> int:
    every = execution.remat_every() or 1
    if count % every:
        raise ValueError(f"remat={execution.remat!r} does not divide {count} layers")
    return every


def _unrolled(layer, params, extra, group_of, carry, per_layer, execution):
    every, outputs, sown = _chunks(execution, len(group_of)), [], []

    def params_of(index):
        p = params[str(group_of[index])]
        if extra is None:
            return p
        more = extra[str(index)] if is_unstacked(extra) else jax.tree.map(lambda x: x[index], extra)
        return _merge(p, more)

    def several(start, trees, inputs, carry):
        out = []
        for i, (p, x) in enumerate(zip(trees, inputs, strict=True)):
            carry, *rest = layer(p, start + i, carry, x)
            out.append(rest)
        return carry, out

    for start in range(0, len(group_of), every):
        run = lambda trees, inputs, carry, start=start: several(start, trees, inputs, carry)
        if execution.remat_every():
            run = jax.checkpoint(run, policy=execution.remat_policy())
        indices = range(start, start + every)
        carry, out = run([params_of(i) for i in indices], [_pick(per_layer, i) for i in indices], carry)
        outputs += [o for o, _ in out]
        sown += [s for _, s in out]
    return carry, None if all(o is None for o in outputs) else tuple(outputs), sown


def scanned(
    layer: Callable[..., tuple[Tree, Tree, Tree]],
    params: Tree,
    extra: Tree,
    group_of: Sequence[int],
    carry: Tree,
    per_layer: Tree,
    execution: Execution,
) -> tuple[Tree, Tree, list[Tree]]:
    """Runs layers in one `lax.scan`.

    Args:
      layer: `(params, index, carry, inputs) -> (carry, output, sown)`.
      params: the parameter sets, stacked.
      extra: parameters that layers have beside those of their sets, or None.
      group_of: which set each layer has.
      carry: what flows from layer to layer.
      per_layer: per-layer inputs or None.
      execution: its remat policy.

    Returns:
      (last carry, outputs by layer or None, what each layer sowed).
    """
    count, every = len(group_of), _chunks(execution, len(group_of))
    if len(set(group_of)) != count:
        params = jax.tree.map(lambda x: x[jnp.asarray(group_of)], params)
    if extra is not None:
        params = _merge(
            params,
            jax.tree.map(lambda *x: jnp.stack(x), *(extra[str(i)] for i in range(count)))
            if is_unstacked(extra)
            else extra,
        )
    inputs = None if per_layer is None else jax.tree.map(lambda *x: jnp.stack(x), *per_layer)
    xs = (params, jnp.arange(count), inputs)

    def step(carry, x):
        p, index, inputs = x
        carry, out, sown = layer(p, index, carry, inputs)
        return carry, (out, sown)

    checkpoint = lambda f: jax.checkpoint(f, policy=execution.remat_policy(), prevent_cse=False)
    if every == 1:
        carry, ys = jax.lax.scan(checkpoint(step) if execution.remat_every() else step, carry, xs)
    else:
        grouped = jax.tree.map(lambda x: x.reshape(count // every, every, *x.shape[1:]), xs)
        steps = functools.partial(jax.lax.scan, step)
        carry, ys = jax.lax.scan(checkpoint(steps), carry, grouped)
        ys = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), ys)
    out, sown = ys
    split = lambda tree: [jax.tree.map(lambda x: x[i], tree) for i in range(count)]  # noqa: B023
    return carry, None if out is None else tuple(split(out)), split(sown) if sown else []
