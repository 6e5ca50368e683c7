"""Checkpoints of a delta run: small, resumed bitwise, joined with their base, which a fingerprint identifies."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from binaries import call
from jax.sharding import PartitionSpec as P
from tiny_models import noise

from llm_jax import config as configs
from llm_jax import interop
from llm_jax.data import tokenizers
from llm_jax.delta import dora, lora
from llm_jax.delta.base import Base, BaseError, left_out
from llm_jax.delta.lora import LoraConfig
from llm_jax.interop.names import InteropError
from llm_jax.models import parameters
from llm_jax.models.bert import BertConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.ties import expand, parse
from llm_jax.objectives.labels import Labels
from llm_jax.parallel.memory.disk import EMPTY
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.storage.checkpoints import CheckpointError, Checkpoints
from llm_jax.training import finetune
from llm_jax.training.averaging import average_checkpoints
from llm_jax.training.finetune import FinetuneConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run_config import DataConfig, RunConfig

TEXT = "abc abd abe, abc abd abe. " * 60
HALF, STEPS = 2, 4
KEY = jax.random.key(0)
FINETUNE = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "configs" / "finetune.py"
ALONE = PlanConfig(data=1)
LORA = LoraConfig(rank=2)
ROWS = {  # name: (plan, fields of FinetuneConfig, fields of LoopConfig)
    "zero-3, int8, average": (PlanConfig(data=8, zero=3), {"base": "int8"},
                               {"ema": 0.5, "keep_best": 1, "eval_every": 2}),  # and shared keys and queries, see TIES
    "pipeline, ranks by layer": (
        PlanConfig(data=4, pipe=2, microbatches=2),
        {"lora": dataclasses.replace(LORA, ranks=("layers[0:2].mlp=1",))},
        {},
    ),
    "bfloat16, DoRA": (ALONE, {"base": "bfloat16", "lora": dataclasses.replace(LORA, dora=True)},
                       {"trainable": dora.TRAINABLE, "accumulation": 2}),
    "master copies on disk, frozen A": (
        PlanConfig(data=1, precision="bf16", master="in_optimizer", offload=("disk",)),
        {"lora": dataclasses.replace(LORA, freeze_a=True)},
        {"trainable": ("*/b",)},
    ),
    "PiSSA": (PlanConfig(data=8, zero=3),
              {"lora": dataclasses.replace(LORA, start="pissa", targets=("attention/query/kernel",))}, {}),
    "norms and one kernel": (ALONE, {"lora": None}, {"trainable": ("*norm*/scale", "layers/attention/query/kernel")}),
}  # fmt: skip
TIES = {"zero-3, int8, average": ("decoder/layers/attention/key=decoder/layers/attention/query",)}
LATER = ("pipeline, ranks by layer", "master copies on disk, frozen A")  # in tests/parity/test_delta_runs.py
FIRST = tuple(name for name in ROWS if name not in LATER)
SMALL = ("zero-3, int8, average", "pipeline, ranks by layer", "bfloat16, DoRA", "PiSSA")  # LoRA's few numbers train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of 7 MB and a character tokenizer, as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("models") / "base"
    tokenizer = tokenizers.train([TEXT, "u"], "char", 1)
    config = LlamaConfig(vocab_size=tokenizer.vocab_size, context_length=32, model_dim=192, num_layers=4, num_heads=4,
                         num_kv_heads=4, hidden_dim=512)  # fmt: skip
    model = config.make()
    params = paths.map_with_path(lambda p, x: x * 0 + 1 if p.endswith("scale") else x, noise(model, 0.05))
    interop.save(path, model, params, tokenizer)
    (path / "text.txt").write_text(TEXT)
    return path


def config(folder, name):
    plan, fields, loop = ROWS[name]
    loop = {"checkpoint_every": HALF, "log_every": 1, "keep_last": 3, **loop}
    run = RunConfig(
        data=DataConfig(source=str(folder / "text.txt"), validation_share=0.1, split="tail"),
        optimizer=OptimizerConfig(learning_rate=0.02, schedule="constant", weight_decay=0.0),
        plan=plan,
        ties=TIES.get(name, ()),
        training=LoopConfig(steps=STEPS, batch_size=16, sequence_length=16, **loop),
    )
    return FinetuneConfig(run=run, **{"lora": LORA, **fields})


@contextlib.contextmanager
def on_its_devices(name):
    devices = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        if ROWS[name][0].data == 1:
            patch.setattr(jax, "devices", lambda *_: devices[:1])
        yield


def finetuned(folder, name, workdir, base=None, path="same", **more):
    """A run on the model in `base`, which says that it is at `path`."""
    base = folder if base is None else base
    loaded = finetune.load(str(base), config(folder, name))
    with on_its_devices(name):
        return finetune.run(loaded, config(folder, name), workdir, KEY, path=base if path == "same" else path, **more)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Every row trained once without interruption: (result, work directory)."""

    @functools.cache
    def get(name):
        workdir = tmp_path_factory.mktemp("runs") / "run"
        return finetuned(folder, name, workdir), workdir

    return get


def copy_of(workdir, to, last=HALF):
    """A work directory as it was after step `last`."""
    shutil.copytree(workdir, to)
    for step in (to / "checkpoints").iterdir():
        if step.name.isdigit() and int(step.name) > last:
            shutil.rmtree(step)
    lines = (to / "metrics.jsonl").read_text().splitlines(keepends=True)
    (to / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= last))
    return to


def bitwise(a, b):
    a, b = (jax.device_get(paths.flatten(tree)) for tree in (a, b))
    for (path, x), (other, y) in zip(a, b, strict=True):
        assert path == other and x.dtype == y.dtype, (path, other)
        np.testing.assert_array_equal(x, y, err_msg=path)


def raw(state):
    return state.replace(key=jax.random.key_data(state.key))


def bytes_below(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@pytest.mark.parametrize("name", FIRST)
def test_a_checkpoint_holds_what_trains_and_no_more(name, folder, whole):
    """Every leaf that the model itself has and that is frozen is left out; all others are there, whole."""
    done, workdir = whole(name)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    stored, left_out = checkpoints.stored_shapes(STEPS), checkpoints.read_run(STEPS)[1]["left_out"]
    trains = paths.matcher(done.trainable)
    of_base = paths.matcher(("base", "base/values", "base/scale", "kernel", "embedding", "*norm/scale"))
    frozen = [f"params/{p}" for p, _ in paths.flatten(done.trained.state.params) if of_base(p) and not trains(p)]
    assert sorted(left_out) == sorted(frozen)
    kept = {p: tuple(x.shape) for p, x in paths.flatten(raw(done.trained.state)) if p not in left_out}
    if "disk" in name:  # where the state in memory has one zero
        kept = {p: stored[p][0] if shape == EMPTY else shape for p, shape in kept.items()}
    assert {p: shape for p, (shape, _) in stored.items()} == kept
    assert all(0 not in shape and shape != EMPTY for shape in kept.values())
    if name in SMALL:
        base = weights.bytes_of(interop.load(folder).params)
        learned = weights.bytes_of([jax.ShapeDtypeStruct(*x) for x in stored.values()])
        # files have descriptions of some 100 KB, and pieces below 1 KB, which only tiny models have, several times
        assert learned < 0.07 * base and bytes_below(workdir / "checkpoints" / str(STEPS)) < 0.3 * base


@pytest.mark.parametrize("name", FIRST)
def test_an_interrupted_run_resumes_bitwise(name, folder, whole, tmp_path):
    done, workdir = whole(name)
    again = finetuned(folder, name, copy_of(workdir, tmp_path / "run"))
    bitwise(raw(again.trained.state), raw(done.trained.state))
    assert again.trained.evaluation == done.trained.evaluation
    bitwise(again.merged, done.merged)


@pytest.mark.parametrize("name", FIRST)
def test_the_work_directory_loads_as_what_the_run_ended_with(name, whole):
    done, workdir = whole(name)
    loaded = interop.load(workdir)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(done.trained.params)
    bitwise(loaded.params, done.trained.params)
    half = interop.load(workdir, dtype=jnp.bfloat16).params
    bitwise(half, weights.cast(done.trained.params, jnp.bfloat16))


@pytest.mark.parametrize("name", ["zero-3, int8, average", "PiSSA"])
def test_a_run_loads_onto_a_mesh(name, whole):
    done, workdir = whole(name)
    plan = Plan(PlanConfig(data=2, model=4, zero=3), done.trained.model.config)
    placed = interop.load(workdir, place=plan.param_shardings).params
    bitwise(placed, done.trained.params)
    up = placed["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert jax.tree.leaves(up)[0].sharding.spec == P(None, "data", "model")
    shardings = plan.param_shardings(placed, parameters.declared(done.trained.model.config)[1])
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), placed, shardings))


def test_the_command_refers_to_its_model(folder, tmp_path):
    flags = {"base": "bfloat16", "lora.rank": 2, "run.data.source": folder / "text.txt", "run.plan.data": 8,
             "run.training.steps": 1, "run.training.batch_size": 8, "run.training.sequence_length": 16}  # fmt: skip
    given = [f"--config.{name}={value}" for name, value in flags.items()]
    call("finetune", f"--model={folder}", f"--config={FINETUNE}", f"--workdir={tmp_path}", *given)
    assert json.loads((tmp_path / "base.json").read_text())["path"] == str(folder)
    stored = Checkpoints(tmp_path / "checkpoints", read_only=True).stored_shapes(1)
    assert not any(p.endswith("base") for p in stored)
    merged, run = interop.load(tmp_path / "merged"), interop.load(tmp_path)
    assert merged.config == run.config and jax.tree.leaves(merged.params)[0].dtype == jnp.float32


def test_a_base_in_bfloat16(folder, whole):
    """What is frozen takes two bytes, what trains four, and so does what is merged."""
    done, _ = whole("bfloat16, DoRA")
    own = {"a", "b", "magnitude", "squares"}
    for path, x in paths.flatten(done.trained.state.params):
        assert x.dtype == (jnp.float32 if path.split("/")[-1] in own else jnp.bfloat16), path
    base = interop.load(folder, dtype=jnp.bfloat16).params
    bitwise(lora.detach(done.trained.state.params), base)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(done.merged))  # small updates are not rounded away
    logits = lambda params: done.trained.model.apply({"params": params}, np.arange(12)[None] % 5).logits
    want = logits(weights.cast(done.trained.params, jnp.float32))
    np.testing.assert_allclose(logits(done.merged), want, rtol=1e-5, atol=1e-5)


def test_averages_of_checkpoints_take_the_base_too(whole):
    done, workdir = whole("zero-3, int8, average")
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    last = interop.load(workdir, average=False).params
    mean = average_checkpoints(checkpoints, [STEPS], last)
    bitwise(expand(mean, parse(TIES["zero-3, int8, average"])), last)
    with pytest.raises(CheckpointError, match=r"holds a delta without its frozen base, which is .*interop.load"):
        average_checkpoints(checkpoints)


@pytest.fixture
def other(folder, tmp_path):
    """The same model but for one number."""
    loaded = interop.load(folder)
    there = tmp_path / "other"
    kernel = loaded.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    loaded.params["decoder"]["layers"]["mlp"]["up"]["kernel"] = kernel.at[3, 5, 7].add(1e-3)
    interop.save(there, loaded.model, loaded.params, loaded.tokenizer)
    shutil.copy(folder / "text.txt", there)
    return there


ROW = "norms and one kernel"


def test_another_base_is_refused(folder, whole, other, tmp_path):
    _, workdir = whole(ROW)
    run = copy_of(workdir, tmp_path / "run")
    before = (run / "base.json").read_text()
    words = (
        r"the base at \S*other \(fingerprint \w{12}\) is not the one that the run began with \(\S*base, fingerprint "
    )
    for read in (lambda: finetuned(folder, ROW, run, other), lambda: interop.load(run, base=other)):
        with pytest.raises(BaseError, match=words) as error:
            read()
        message = str(error.value)
        assert "\n" not in message and "decoder/layers/mlp/up/kernel is float32[4,192,512]" in message
    assert (run / "base.json").read_text() == before


def test_a_base_that_moved(folder, whole, tmp_path):
    """Alone: one line says what to do, in three ways. Together with the run: found."""
    done, workdir = whole(ROW)
    (tmp_path / "a").mkdir()
    run, moved = copy_of(workdir, tmp_path / "a" / "run", STEPS), tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    noted = json.loads((run / "base.json").read_text())
    assert noted["path"] == str(folder)
    write = lambda **changes: (run / "base.json").write_text(json.dumps({**noted, **changes}))
    write(path=str(tmp_path / "gone"), relative="../gone")
    with pytest.raises(
        InteropError, match=r"its base is not at \S*gone nor at \S*run/../gone: write its new path into"
    ) as e:
        interop.load(run)
    assert "\n" not in str(e.value)
    bitwise(interop.load(run, base=moved).params, done.trained.params)
    write(path=str(tmp_path / "gone"), relative="../../elsewhere")
    bitwise(interop.load(run).params, done.trained.params)
    write(path=str(tmp_path / "gone"), relative="../gone")
    finetuned(folder, ROW, run, moved)
    assert json.loads((run / "base.json").read_text()) == {"path": str(moved), "relative": "../../elsewhere"}
    bitwise(interop.load(run).params, done.trained.params)
    (run / "base.json").write_text("{")
    with pytest.raises(InteropError, match=r"base.json is damaged"):
        interop.load(run)
    (run / "base.json").unlink()  # the checkpoint says where the base was
    bitwise(interop.load(run).params, done.trained.params)


def test_a_start_of_an_earlier_version_is_refused(folder, whole):
    """Its first singular vectors differ by more than rounding, and the base would be another one."""
    _, workdir = whole("PiSSA")
    stored = Checkpoints(workdir / "checkpoints", read_only=True).read_run(STEPS)[1]["base"]
    params = interop.load(folder).params
    configs.from_dict(Base, stored).check(params, folder)
    del stored["starts"]
    with pytest.raises(BaseError, match=r"began with pissa of an earlier version, .* choose another --workdir$"):
        configs.from_dict(Base, stored).check(params, folder)


def test_a_base_that_is_not_given(folder, whole, tmp_path):
    _, workdir = whole(ROW)
    run = copy_of(workdir, tmp_path / "run")
    with pytest.raises(BaseError, match=r"holds a delta of \S*base: give train\(\) that model and its base"):
        finetuned(folder, ROW, run, path=None)
    loaded = finetune.load(str(folder), config(folder, ROW))
    for x in jax.tree.leaves(loaded.params):
        x.delete()
    gone = pytest.raises(ValueError, match="an earlier run took these parameters over; load the model again")
    with gone, on_its_devices(ROW):
        finetune.run(loaded, config(folder, ROW), run, KEY, path=folder)
    with pytest.raises(InteropError, match="is not a work directory of ours and takes no base="):
        interop.load(folder, base=folder)


def test_a_run_that_holds_its_base_resumes_as_it_began(folder, whole, tmp_path):
    """As runs of earlier versions do: with their own base, whatever the path says, and into whole checkpoints."""
    done, _ = whole(ROW)
    earlier = finetuned(folder, ROW, tmp_path / "earlier", path=None)
    run = copy_of(tmp_path / "earlier", tmp_path / "run")
    again = finetuned(folder, ROW, run)
    for result in (earlier, again):
        bitwise(raw(result.trained.state), raw(done.trained.state))
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    assert checkpoints.steps() == [HALF, STEPS]
    assert all(not checkpoints.read_run(step)[1].keys() & {"base", "left_out"} for step in checkpoints.steps())
    assert not (run / "base.json").exists()
    bitwise(checkpoints.restore_params()[0], interop.load(run).params)
    with pytest.raises(InteropError, match="holds its whole model and takes no base="):
        interop.load(run, base=folder)


def test_a_base_that_is_a_delta_run_itself(folder, whole, tmp_path):
    """Its own base is found in turn; a run that freezes LoRA's matrices refers to them too."""
    _, first = whole("zero-3, int8, average")
    done = finetuned(folder, ROW, tmp_path / "second", whole(ROW)[1])
    bitwise(interop.load(tmp_path / "second").params, done.trained.params)
    given = interop.load(first).params
    names = left_out(given, given, ("*norm*/scale",))
    assert {p.split("/")[-1] for p in names} == {"embedding", "values", "scale", "kernel"} - {"kernel"}
    below = Base(str(first)).of_run(tmp_path, given, names).prints
    assert {p.split("/")[-1] for p in below} == {"embedding", "values", "scale", "a", "b"}


def test_a_head_with_labels_beside_lora(tmp_path):
    """What the model's folder lacks is drawn again, where it is frozen."""
    words = tokenizers.train(["ab cd ef gh"] * 9, "wordpiece", 40)
    model = BertConfig(vocab_size=words.vocab_size, context_length=16, model_dim=16, num_layers=2, num_heads=2,
                       hidden_dim=32, head="masked_lm", pooler=None).make()  # fmt: skip
    interop.save(tmp_path / "base", model, noise(model, 0.1), words)
    rows = [f"{'ab cd' if i % 2 else 'ef gh'}\t{'ab'[i % 2]}" for i in range(24)]
    (tmp_path / "data.tsv").write_text("\n".join(["text\tlabel", *rows]))
    loop = LoopConfig(2, 8, 8, trainable=("*/a", "*/b", "classifier/*"))  # the new pooler stays as it was drawn
    data = DataConfig(str(tmp_path / "data.tsv"), fields=("text", "label"), validation_share=0.2)
    tuning = FinetuneConfig(RunConfig(data=data, objective=Labels(), plan=ALONE, training=loop), LORA)
    with on_its_devices(ROW):
        loaded = finetune.load(str(tmp_path / "base"), tuning)
        done = finetune.run(loaded, tuning, tmp_path / "run", KEY, path=tmp_path / "base")
    stored = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).stored_shapes(2)
    top = {p.split("/")[1] for p in stored if p.startswith("params/")}
    assert top == {"encoder", "classifier"} and "pooler" in done.trained.params
    bitwise(interop.load(tmp_path / "run").params, done.trained.params)


def test_what_trains_is_not_rounded():
    with pytest.raises(ValueError, match="base='bfloat16' is of what does not train: give it a delta, or"):
        FinetuneConfig(lora=None, base="bfloat16")
