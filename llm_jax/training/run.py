"""A whole training run from one config: the function behind `experiments/train.py` and the notebooks."""

import contextlib
import dataclasses
import functools
import json
import logging
import types
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from llm_jax import config as configs
from llm_jax.data import tokenizers, tokens
from llm_jax.data.corpora import CorpusError
from llm_jax.data.loader import Loader, eval_batches
from llm_jax.delta.base import Base, BaseError, digest, left_out
from llm_jax.interop import referenced
from llm_jax.nn import weights
from llm_jax.nn.protocols import Model, Params
from llm_jax.nn.realized import realize
from llm_jax.nn.ties import Ties, expand
from llm_jax.objectives.objective import Objective
from llm_jax.parallel import processes
from llm_jax.parallel.memory import offload
from llm_jax.parallel.plan import Plan
from llm_jax.storage.checkpoints import CheckpointError, Checkpoints
from llm_jax.storage.digests import FileDigest
from llm_jax.training import flops, metrics
from llm_jax.training.hooks import Evaluation, Report, Saves, profiled
from llm_jax.training.loop import hooks_of, run_loop, summarize
from llm_jax.training.optimizers import learning_rate, make_schedule
from llm_jax.training.precision import Precision
from llm_jax.training.program import Program, build, optimizer_of, resident
from llm_jax.training.recipes import recipe_of
from llm_jax.training.rows import check_cache, check_objective, data_digests, get_tokenizer
from llm_jax.training.run_config import DataConfig, RunConfig
from llm_jax.training.state import TrainState, averaged
from llm_jax.training.workdir import Workdir, WorkdirError, todays

__all__ = ["DataConfig", "HeldOut", "RunConfig", "Trained", "evaluate_rows", "load_config", "run_program", "train"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Trained:
    """Result of a finished run."""

    state: TrainState
    model: Model
    tokenizer: tokenizers.Tokenizer
    evaluation: dict[str, float]
    ties: Ties

    @property
    def params(self) -> Params:
        """Its parameters, their moving average where it kept one, on the devices, as the model takes them.

        What is shared is in every place, and realized nodes are what they become.
        """
        return expand(realize(offload.to_device(averaged(self.state))), self.ties)


def train(
    config: RunConfig,
    workdir: epath.PathLike,
    params: Params | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
    encode: tokens.Encode | None = None,
    kind: str = "text",
    restore_step: int | None = None,
    extra: dict[str, Any] | None = None,
    adapt: Callable[[Params], Params] = lambda params: params,
    accept_changed_data: bool = False,
    base: Base | None = None,
    extra_defaults: dict[str, Any] | None = None,
    ahead: bool = False,
) -> Trained:
    """Trains, or resumes where the work directory's last checkpoint stands.

    Args:
      config: the run.
      workdir: everything the run writes.
      params: start from these parameters (fine-tuning); fresh ones by default. They are taken over: neither they nor
        anything that shares their arrays (a `Generator`) can be used afterwards. To resume, their shapes are enough.
      tokenizer: of the loaded model; the config's by default.
      encode: how documents become ids (chat turns with loss masks); plain text by default.
      kind: names `encode` in the token cache.
      restore_step: checkpoint to resume from; the newest by default.
      extra: what else defines the run (JSON-ready); saved and compared like the config.
      adapt: a pure function of `params`: what is added or exchanged before training (LoRA, quantized weights).
      accept_changed_data: resumes although the data files are not those that the run began with.
      base: where `params` came from and what `adapt` does with them, where part of them is frozen. Checkpoints then
        hold what trains and leave the frozen part out, and `params` must be there to resume.
      extra_defaults: what fields of `extra` mean that an earlier run did not have.
      ahead: `adapt` runs where `params` are, before they are divided over devices: decompositions of matrices, which
        every device would repeat.

    Raises:
      CorpusError, TokenizerError, ConfigError, CheckpointError, WorkdirError, TrainingError, BaseError: each with one
        line.
      Interrupted: on SIGINT or SIGTERM, after saving.
    """
    if recipe_of(config.objective).source.keeps_tokens:
        check_cache(config.data, workdir)
    with Workdir(workdir) as claimed:
        whole = {**config.to_dict(), **(extra or {})}
        defaults = RunConfig(model=type(config.model)(), objective=type(config.objective)())
        claimed.settle_config(whole, {**defaults.to_dict(), **(extra_defaults or {})})
        return _train(
            config,
            claimed,
            params,
            adapt,
            tokenizer,
            encode,
            kind,
            restore_step,
            whole,
            accept_changed_data,
            base,
            ahead,
        )


def _is_gone(params: Any) -> bool:
    return any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(params))


def _release(params: Any) -> None:
    """Deletes all arrays, so that nobody who still holds the tree holds its memory."""
    for x in jax.tree.leaves(params):
        if isinstance(x, jax.Array):
            x.delete()


def _first_process_first(what: str, prepare: Callable[[], Any]) -> Any:
    """Runs `prepare` in every process, in the others when the first has written what they then read."""
    done = prepare() if jax.process_index() == 0 else None
    processes.wait_for_all(what)
    return prepare() if done is None else done


def _settle_data(config: RunConfig, claimed: Workdir, accept: bool) -> dict[str, FileDigest]:
    """Digests of the run's data, which are those that it began with."""
    stored: dict[str, FileDigest] = {}
    with contextlib.suppress(ValueError):  # `settle_data` says so
        stored = claimed.known_data()
    found = data_digests(config.data, stored)
    claimed.settle_data(found, accept)
    return found


def _check_same_rows(rows: Any) -> None:
    """Refuses a job whose processes read different corpora: their batches would not be parts of one."""
    if jax.process_count() == 1:
        return
    ends = b"".join(np.ascontiguousarray(v).tobytes() for i in (0, len(rows) - 1) for v in rows[i].values())
    seen = np.asarray(multihost_utils.process_allgather(np.array([len(rows), zlib.crc32(ends)], np.uint32)))
    if (seen != seen[0]).any():
        counts = ", ".join(f"{int(n):,}" for n in seen[:, 0])
        raise CorpusError(f"the processes read different data (rows: {counts}): put the same corpus on every host")


def _settle_rule(tokenizer: tokenizers.Tokenizer, workdir: epath.Path, accept: bool) -> None:
    """Refuses to resume a run whose rows lacked what the tokenizer puts around a text: earlier versions left it out."""
    begin, end = tokenizer.rule
    if not begin and end in ((), (tokenizer.separator,)):
        return
    around = " and ".join(repr(tokenizer.token(i)) for i in (*begin, *end))
    said = f"rows of the run in {workdir} lack {around}, which its tokenizer puts around a text"
    if not accept:
        raise WorkdirError(f"{said}: --accept_changed_data resumes with it; or choose another --workdir")
    log.warning("%s; from here on they have it", said)


def _train(
    config: RunConfig,
    claimed: Workdir,
    params: Params | None,
    adapt: Callable[[Params], Params],
    tokenizer: tokenizers.Tokenizer | None,
    encode: tokens.Encode | None,
    kind: str,
    restore_step: int | None,
    whole: dict[str, Any],
    accept: bool,
    base: Base | None,
    ahead: bool,
) -> Trained:
    c, workdir = config.training, claimed.path
    limit = getattr(config.model, "context_length", None)
    if limit is not None and c.sequence_length > limit:
        raise configs.ConfigError(f"training.sequence_length={c.sequence_length} exceeds model.context_length={limit}")
    plan = Plan(config.plan, config.model)
    plan.check_batch(c.batch_size, c.accumulation, c.sequence_length)
    check_objective(config)
    source = recipe_of(config.objective).source

    def prepare() -> tuple[tokenizers.Tokenizer, dict[str, FileDigest] | None]:
        if jax.process_index():
            return tokenizer or tokenizers.load(workdir), None
        if claimed.began_before_digests() and encode is None and source.framed:
            _settle_rule(tokenizer or get_tokenizer(config, workdir), workdir, accept)
        stored = _settle_data(config, claimed, accept)
        chosen = tokenizer or get_tokenizer(config, workdir)
        chosen.save(workdir)
        return chosen, stored

    tokenizer, stored = _first_process_first("tokenizer", prepare)
    read = lambda: source.rows(config, tokenizer, workdir, encode, kind, stored)
    # a folder of its own on every host is filled by all hosts at once, the work directory's by the first process
    rows = read() if config.data.cache else _first_process_first("tokens", read)
    _check_same_rows(rows.train)
    loader = Loader(rows.train, c.batch_size, c.seed, *plan.data_blocks(), shuffle=not config.objective.carry)

    program = build(config, plan, tokenizer.role("mask"), params, adapt, workdir / "on_disk", ahead)
    constants = {"eval/baseline_loss": rows.baseline} if rows.baseline else {}
    if cut := getattr(rows.held_out, "cut_tokens", 0):
        constants["eval/cut_tokens"] = float(cut)
    held_out = HeldOut(rows.held_out, rows.tokens_per_byte, constants)
    state, evaluation = run_program(program, config, plan, loader, held_out, workdir, whole, params, restore_step, base)
    return Trained(state, config.model.make(), tokenizer, evaluation, program.ties)


class HeldOut(NamedTuple):
    """What a run is measured on.

    Attributes:
      rows: held out, None without.
      tokens_per_byte: 0 where bits of bytes say nothing.
      constants: numbers that stand beside every measurement.
    """

    rows: Any
    tokens_per_byte: float = 0.0
    constants: Mapping[str, float] = types.MappingProxyType({})


def run_program(
    program: Program,
    config: RunConfig,
    plan: Plan,
    loader: Loader,
    held_out: HeldOut,
    workdir: epath.Path,
    whole: dict[str, Any],
    params: Params | None = None,
    restore_step: int | None = None,
    base: Base | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """Runs what was built, from its first state or from a checkpoint of the work directory; see `train`.

    Returns:
      (last state, numbers of the last evaluation).
    """
    c, objective = config.training, program.objective
    on_disk = program.on_disk
    mapped = None if on_disk is None else on_disk.arrays
    checkpoints = Checkpoints(workdir / "checkpoints", c.keep_last, c.keep_best, mapped=mapped)
    _describe(program, config, plan, workdir)
    resumes = restore_step is not None or checkpoints.latest() is not None
    info: dict[str, Any] = {"config": whole}
    if (reference := _refer(program, checkpoints, restore_step, resumes, workdir, params, base)) is not None:
        info["base"] = configs.to_dict(reference)
    if not resumes:
        state = _begin(program, c.seed, params)
    else:
        first = None if reference is None else _begin(program, c.seed, params)
        _release(params)
        state = _resume(program, config, checkpoints, restore_step, loader, workdir, first)

    rows_sharding = plan.batch_sharding()
    local = functools.partial(jax.make_array_from_process_local_data, rows_sharding)
    batches = ({k: local(v) for k, v in batch.items()} for batch in loader)
    plain = objective.plain()

    def measure(state: TrainState) -> dict[str, float]:
        if held_out.rows is None:
            return {}
        numbers = evaluate_rows(
            plain,
            program.evaluate,
            averaged(resident(state, on_disk)),
            held_out.rows,
            c.batch_size,
            c.eval_batches,
            lambda batch: jax.device_put(batch, rows_sharding),
            held_out.tokens_per_byte,
        )
        return {**numbers, **held_out.constants}

    rate = make_schedule(optimizer_of(config), c.steps)
    peak = flops.peak_flops()
    work = flops.of_step(config.model, objective, program.params, loader.abstract(), c.trainable, program.ties)
    report = Report(
        metrics.MetricsWriter(workdir, int(state.step)),
        first=int(state.step),
        steps=c.steps,
        flops_per_step=work.total,
        peak_flops=None if peak is None else peak * jax.device_count(),
        learning_rate=lambda m: learning_rate(rate, m.state.opt_state, not int(m.metrics["bad_steps"])),
    )
    evaluation = Evaluation(measure, report)
    saves = Saves(checkpoints, info, loader.state, evaluation)
    hooks = hooks_of(c, report, evaluation, saves)
    together = True
    try:
        with profiled(program.step, workdir / "profile", c.profile_start, c.profile_steps) as step:
            state = run_loop(state, step, batches, c.steps, saves, hooks)
        numbers = evaluation.of(state)
        state = resident(state, on_disk)
    except Exception as e:
        together = not processes.lost(str(e))
        raise
    finally:
        report.close()
        if together:  # without the others a save never ends, and jax ends this process before it can say why
            checkpoints.close()
        if mapped is not None:
            mapped.remove()  # what it holds is in the last checkpoint
        if together and jax.process_index() == 0 and metrics.read_metrics(workdir):
            metrics.plot_loss(workdir, objective.loss_unit)
    return state, numbers


def _describe(program: Program, config: RunConfig, plan: Plan, workdir: epath.Path) -> None:
    """Says what runs where, in the log and in `parameters.txt`."""
    for note in plan.notes:
        log.info("%s", note)
    if config.training.ema:
        log.info("evaluations, keep_best and the final parameters are those of the moving average (training.ema)")
    log.info("%s parameters in %s", f"{weights.count(program.params):,}", workdir)
    if jax.process_index() == 0:
        dtypes = Precision(config.plan.precision, config.plan.master).describe(program.shapes)
        shardings = plan.describe(program.shapes.params, program.axes)
        (workdir / "parameters.txt").write_text(f"{shardings}\n\n{dtypes}\n")


def _refer(
    program: Program,
    checkpoints: Checkpoints,
    restore_step: int | None,
    resumes: bool,
    workdir: epath.Path,
    params: Params | None,
    base: Base | None,
) -> Base | None:
    """The base that checkpoints leave out, None where they hold everything; a resumed run stays as it began.

    Raises:
      BaseError: where the run began with another base, or its base was not given.
    """
    stored = checkpoints.read_run(restore_step)[1].get("base") if resumes else None
    if resumes and stored is None:
        return None
    if base is None or params is None:
        if stored is None:
            return None
        raise BaseError(f"the run in {workdir} holds a delta of {stored['path']}: give train() that model and its base")
    _check_there(params)
    if stored is not None:
        configs.from_dict(Base, stored).check(params, base.path)
    names = left_out(program.params, params, base.trainable)
    checkpoints.leave_out([f"params/{name}" for name in names])
    reference = base.of_run(workdir, params, names)
    if jax.process_index() == 0:
        referenced.note(workdir, reference)
    log.info("checkpoints hold the delta; its base is %s (fingerprint %s)", reference.path, digest(reference.prints))
    return reference


def _check_there(params: Params | None) -> None:
    if _is_gone(params):
        raise ValueError("an earlier run took these parameters over; load the model again")


def _begin(program: Program, seed: int, params: Params | None) -> TrainState:
    """Builds the first state; `params` are donated to it."""
    _check_there(params)
    placed = None if params is None else jax.device_put(program.ahead(params), program.given_placement)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # those that change their dtype
        state = program.init(jax.random.key(seed), placed)
    _release(params)
    return state


def _resume(
    program: Program,
    config: RunConfig,
    checkpoints: Checkpoints,
    restore_step: int | None,
    loader: Loader,
    workdir: epath.Path,
    first: TrainState | None,
) -> TrainState:
    """The state of a checkpoint, the newest by default, around the frozen base of the first one.

    The loader goes to where it stood.
    """
    try:
        restored = checkpoints.restore(program.shapes, restore_step, program.shardings, first)
    except CheckpointError as e:
        if config.optimizer.name == "muon" and "opt_state" in str(e):
            hint = f"start a new --workdir from its parameters (experiments.finetune --model={workdir})"
            raise CheckpointError(f"{e}; Muon of earlier versions took output layers too: {hint}") from e
        raise
    loader.restore(restored.run["data"])
    log.info("resuming from step %d", restored.step)
    return restored.state


def evaluate_rows(
    objective: Objective,
    eval_step: Callable[[Params, Any], tuple[Mapping[str, Any], Mapping[str, Any]]],
    params: Params,
    rows: Any,
    batch_size: int,
    limit: int,
    place: Callable[[Any], Any],
    tokens_per_byte: float = 0.0,
) -> dict[str, float]:
    """Sums an objective's scores over held-out rows (`limit` batches, 0 for all) and summarizes them."""
    sums: dict[str, float] = {}
    totals: dict[str, float] = {}
    for batch in eval_batches(rows, batch_size, limit or None):
        scores, counts = jax.device_get(eval_step(params, place(batch)))
        for into, values in ((sums, scores), (totals, counts)):
            for name, value in values.items():
                into[name] = into.get(name, 0.0) + float(value)
    return summarize(objective, sums, totals, tokens_per_byte)


def load_config(workdir: epath.PathLike) -> RunConfig:
    """The config that a run left in its work directory, also one of an earlier version."""
    file = epath.Path(workdir) / "config.json"
    if not file.exists():
        raise configs.ConfigError(f"{workdir} holds no run: config.json is missing")
    try:
        values = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as e:
        raise configs.ConfigError(f"{file} is damaged ({e}); the run's own command writes it again") from e
    return RunConfig.from_dict(todays(values))
