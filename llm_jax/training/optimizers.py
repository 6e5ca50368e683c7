"""Optimizers and schedules from a config.

Sources: Kingma and Ba 2015; Loshchilov and Hutter 2019 (AdamW); Shazeer and Stern 2018 (Adafactor); Chen et al. 2023
(Lion); Jordan et al. 2024 (Muon); Vaswani et al. 2017, section 5.3 (Noam); Hu et al. 2024 (warmup-stable-decay).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Params
from llm_jax.training import rates

Rate = Callable[[Any], Any]  # learning rate as a function of the optimizer step, counted from 0
NAMES = ("adam", "adamw", "adafactor", "lion", "muon", "sgd")
SCHEDULES = ("constant", "linear", "cosine", "wsd", "noam")
UNREAD = {"adafactor": ("b1", "b2", "eps"), "lion": ("eps",), "sgd": ("b2", "eps")}
READ = {"final_ratio": ("linear", "cosine", "wsd"), "decay_steps": ("wsd",), "noam_dim": ("noam",)}  # by schedules
# kernels whose columns are words or labels: Jordan et al. leave them, as they do embeddings, to AdamW
OUTPUTS = ("head/kernel", "head/output/kernel", "classifier/kernel", "pair/kernel")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with its schedule.

    Attributes:
      name: adam, adamw, adafactor, lion, muon (kernels of hidden layers; embeddings, output layers, norms and biases
        take adamw) or sgd.
      learning_rate: peak; for `noam` the factor in front of the paper's formula.
      schedule: constant, linear, cosine, wsd (constant, then linear decay) or noam; all but noam warm up linearly.
      warmup_steps: optimizer steps.
      decay_steps: wsd: length of the last phase, optimizer steps; 0 takes a tenth of all steps.
      final_ratio: last rate over peak.
      b1: first-moment decay (momentum for muon and sgd); adafactor has none.
      b2: second-moment decay, of adam, adamw, muon's adamw and lion.
      eps: denominator offset, of adam, adamw and muon's adamw.
      weight_decay: decoupled decay of what `decay` matches.
      decay: patterns of decayed parameters; matrices by default, never norms and biases. In a run each pattern must
        match something.
      clip_norm: global gradient norm is clipped here; 0 never clips.
      noam_dim: D of the Noam formula; None takes the model's width in a run.
      rates: other learning rates of some parameters, each `pattern=factor`, times the scheduled rate and also on the
        decay: `*/b=16` (LoRA+), `classifier/*=10`. The last that matches decides; in a run each must match something
        that trains.
      layer_decay: factor of the rate from a layer to the one below it, 1 for none. Of L layers, layer l (from 0) learns
        at layer_decay ** (L - l) times the rate, embeddings at layer_decay ** (L + 1), what is above the layers at 1.
        Layers count in their own stack; those that share parameters count once. Multiplies `rates`.

    A field that the optimizer or the schedule does not read must keep its default.
    """

    name: str = "adamw"
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: tuple[str, ...] = ("*kernel*", "*embedding*")
    clip_norm: float = 1.0
    noam_dim: int | None = None
    rates: tuple[str, ...] = ()
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        if self.name not in NAMES:
            raise ValueError(f"optimizer name={self.name!r} is not one of {', '.join(NAMES)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if self.name == "adam" and self.weight_decay:
            raise ValueError(f"adam has no weight decay: set weight_decay=0 (it is {self.weight_decay}) or name=adamw")
        rates.parse(self.rates)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay} must lie in (0, 1]")
        for field in unread(self.name, self.schedule):
            value, default = getattr(self, field), type(self).__dataclass_fields__[field].default
            if value != default:
                raise ValueError(
                    f"{field}={value} has no effect with name={self.name} and schedule={self.schedule}: leave it "
                    f"at {default}"
                )


def unread(name: str, schedule: str) -> tuple[str, ...]:
    """Fields that this optimizer under this schedule does not read."""
    return (*UNREAD.get(name, ()), *(field for field, readers in READ.items() if schedule not in readers))


def make_schedule(config: OptimizerConfig, steps: int) -> Rate:
    """Learning rate as a function of the optimizer step, counted from 0.

    Raises:
      ValueError: for `noam` without a width.
    """
    c, peak, warmup = config, config.learning_rate, config.warmup_steps
    if c.schedule == "noam":
        w, width = max(warmup, 1), c.noam_dim
        if width is None:
            raise ValueError("schedule=noam needs noam_dim, the model's width")
        return lambda t: peak * width**-0.5 * jnp.minimum((t + 1.0) ** -0.5, (t + 1.0) * w**-1.5)
    rest = max(steps - warmup, 1)
    if c.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif c.schedule == "linear":
        after = optax.linear_schedule(peak, peak * c.final_ratio, rest)
    elif c.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, c.final_ratio)
    else:
        tail = min(c.decay_steps or max(steps // 10, 1), rest)
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, peak * c.final_ratio, tail)], [rest - tail]
        )
    if not warmup:
        return after
    ramp = lambda t: peak * (t + 1.0) / warmup  # the first step already learns
    return optax.join_schedules([ramp, after], [warmup])


def learning_rate(rate: Rate, opt_state: Any, updated: bool) -> float:
    """The rate of a step, which steps that were skipped do not move on.

    Args:
      rate: the optimizer's.
      opt_state: after the step.
      updated: whether the step changed anything.
    """
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
    (found,) = filter(is_schedule, jax.tree.leaves(opt_state, is_leaf=is_schedule))
    return float(rate(int(found.count) - updated))


def per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `tx` on every layer of stacked leaves by itself.

    Optimizers whose statistics span a leaf (Adafactor's factors, Muon's orthogonalisation) would otherwise treat a
    stacked tree differently from an unrolled one.
    """
    layered = optax.GradientTransformation(
        lambda p: jax.vmap(tx.init)(p) if jax.tree.leaves(p) else optax.EmptyState(),
        lambda g, s, p=None: jax.vmap(tx.update)(g, s, p) if jax.tree.leaves(g) else (g, s),
    )
    labels = lambda params: paths.map_with_path(lambda p, _: "stacked" if paths.is_stacked(p) else "plain", params)
    return optax.partition({"stacked": layered, "plain": tx}, labels)


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    params: Params | None = None,
    trainable: str | Iterable[str] | None = None,
) -> optax.GradientTransformation:
    """The update rule without clipping, which the step does itself (it needs the norm anyway).

    Args:
      config: the optimizer.
      steps: of the whole run.
      params: all parameters of the run, abstract will do; read by `rates` and `layer_decay` only.
      trainable: patterns of what trains, None for everything.

    Raises:
      ValueError: if `rates` or `layer_decay` do not fit the parameters, or those are not given.
    """
    tx = _make_even(config, steps)
    if not config.rates and config.layer_decay == 1:
        return tx
    if params is None:
        raise ValueError(f"rates={config.rates} and layer_decay={config.layer_decay} need the parameters: pass params")
    return rates.scaled(tx, rates.factors_of(config.rates, config.layer_decay, params, trainable))


def _make_even(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """One learning rate for all parameters."""
    c, rate = config, make_schedule(config, steps)
    match = paths.matcher(c.decay)
    mask = lambda params: paths.map_with_path(lambda p, _: match(p) and not p.endswith("bias"), params)
    decay = optax.add_decayed_weights(c.weight_decay, mask) if c.weight_decay else optax.identity()
    scale = optax.scale_by_learning_rate(rate)
    adam = optax.scale_by_adam(c.b1, c.b2, c.eps)
    if c.name == "adam":
        return optax.chain(adam, scale)
    if c.name == "adamw":
        return optax.chain(adam, decay, scale)
    if c.name == "lion":
        return optax.chain(optax.scale_by_lion(c.b1, c.b2), decay, scale)
    if c.name == "sgd":
        return optax.chain(optax.trace(c.b1) if c.b1 else optax.identity(), decay, scale)
    if c.name == "adafactor":
        factored = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        return optax.chain(per_layer(factored), decay, scale)
    output = paths.matcher(OUTPUTS)
    hidden = lambda p, x: p.endswith("kernel") and weights.is_matrix(p, x) and not output(p)
    kinds = lambda params: paths.map_with_path(lambda p, x: "muon" if hidden(p, x) else "adam", params)
    matrix = lambda tree: jax.tree.map(lambda _: contrib.MuonDimensionNumbers(0, 1), tree)
    muon = contrib.scale_by_muon(beta=c.b1, weight_dimension_numbers=matrix)
    shape = lambda tree: jax.tree.map(lambda u: u * max(1.0, u.shape[1] / u.shape[0]) ** 0.5, tree)
    muon = per_layer(optax.chain(muon, optax.stateless(lambda updates, _: shape(updates))))
    return optax.chain(optax.partition({"muon": muon, "adam": adam}, kinds), decay, scale)
