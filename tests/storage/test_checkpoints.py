"""Checkpoints: bitwise, onto any mesh, and every way they can be wrong is one line that names what differs."""

import math
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.compress.quantize import Quantized
from llm_jax.delta.lora import Lora
from llm_jax.nn import paths
from llm_jax.parallel.mesh import make_mesh
from llm_jax.storage.checkpoints import CheckpointError, Checkpoints

RUN = {"config": {"model": {"family": "gpt"}}, "data": {"next_index": 7}}


def state(seed=0, scale=2.0, rank=3):
    """One leaf of every kind that a training state holds."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    lora = Lora(Quantized(jnp.asarray(rng.integers(-9, 9, (8, 4)), jnp.int8), normal(1, 4)), normal(8, rank),
                normal(rank, 4), scale)  # fmt: skip
    params = {"a": normal(8, 4), "half": normal(5).astype(jnp.bfloat16), "layers": {"kernel": lora}}
    trained = {"a": None, "half": None, "layers": {"kernel": lora.replace(base=Quantized(None, None))}}
    return {
        "step": jnp.int32(seed),
        "params": params,
        "opt_state": (jnp.zeros(()), trained),
        "average": jax.tree.map(lambda x: x + 1, trained),
        "key": jax.random.key(seed),
        "nothing": None,
    }


def bits(tree):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    raw = jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)
    return [(p, x.dtype, x.shape, np.asarray(x).tobytes()) for p, x in paths.flatten(raw)]


def one_line(message, call):
    with pytest.raises(CheckpointError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value), str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the steps 1 and 2; only read."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, state(step), RUN)
    checkpoints.close()
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A copy to damage."""
    for file in saved.rglob("*"):
        if file.is_file():
            there = tmp_path / "copy" / file.relative_to(saved)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(file.read_bytes())
    return tmp_path / "copy"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_restore_is_bitwise(asynchronous, tmp_path):
    checkpoints = Checkpoints(tmp_path, asynchronous=asynchronous)
    for step in (1, 2):
        checkpoints.save(step, state(step), RUN)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2] and checkpoints.latest() == 2
    for target in (state(0), jax.eval_shape(state)):  # shapes are enough
        found = checkpoints.restore(target)
        assert found.step == 2 and bits(found.state) == bits(state(2))
        assert jax.tree.structure(found.state) == jax.tree.structure(state(0))
    assert bits(checkpoints.restore(state(0), 1).state) == bits(state(1))
    assert found.run.items() >= RUN.items() and found.run["version"]
    assert float(jax.random.uniform(found.state["key"])) == float(jax.random.uniform(jax.random.key(2)))
    checkpoints.close()


LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: math.nan, 5: 5.0, 6: None, 7: 4.0}
KEPT = [((1, 0), [7]), ((3, 0), [5, 6, 7]), ((1, 1), [2, 7]), ((2, 2), [2, 3, 6, 7]), ((1, 5), [1, 2, 3, 5, 7])]


@pytest.mark.parametrize("keep, want", KEPT)
def test_keeps_the_newest_and_the_best_also_across_restarts(keep, want, tmp_path):
    small = {"params": jnp.arange(3.0)}
    for steps in ((1, 2, 3), (4, 5), (6, 7)):
        checkpoints = Checkpoints(tmp_path, *keep)
        for step in steps:
            loss = LOSSES[step]
            checkpoints.save(step, small, {}, None if loss is None else {"eval/loss": loss})
        checkpoints.close()
    assert Checkpoints(tmp_path, read_only=True).steps() == want


def test_a_run_that_went_back_writes_a_step_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for seed in (1, 2):
        checkpoints.save(5, state(seed), RUN)
        checkpoints.wait()
        assert bits(checkpoints.restore(state(0)).state) == bits(state(seed))
    checkpoints.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore's cancelled reads
def test_every_damaged_file_is_noticed_and_the_previous_step_offered(copied):
    """Truncates, alters, removes each file of step 2: restored bitwise all the same, or refused in one line."""
    want, refused = bits(state(2)), set()
    files = sorted(f for f in (copied / "2").rglob("*") if f.is_file())
    for file in files:
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 0x10
        for damaged in (data[: len(data) // 2], bytes(flipped), None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            checkpoints = Checkpoints(copied, read_only=True)
            try:
                if 2 in checkpoints.steps():
                    found = checkpoints.restore(state(0), 2)
                    assert bits(found.state) == want and found.run["data"] == RUN["data"], file
            except CheckpointError as e:
                assert "\n" not in str(e)
                assert "(--restore_step=1)" in str(e) or "of another model" in str(e) or "structured" in str(e), file
                refused.add((str(file.relative_to(copied / "2")), damaged is None))
            file.write_bytes(data)
    needed = {"state/_METADATA", "state/manifest.ocdbt", "structure/metadata", "run/metadata"}
    needed |= {str(f.relative_to(copied / "2")) for f in (copied / "2" / "state" / "d").iterdir()}
    assert refused >= {(name, removed) for name in needed for removed in (True, False)}
    assert bits(Checkpoints(copied, read_only=True).restore(state(0), 1).state) == bits(state(1))


def test_what_is_not_there(saved, tmp_path):
    one_line("no checkpoint  in", lambda: Checkpoints(tmp_path / "new").restore(state(0)))
    one_line("no checkpoint 7 in", lambda: Checkpoints(saved, read_only=True).restore(state(0), 7))
    one_line("there are [1, 2]", lambda: Checkpoints(saved, read_only=True).restore_params(7))


def test_a_foreign_folder_is_no_checkpoint(copied):
    (copied / "3").mkdir()
    (copied / "3" / "model.bin").write_bytes(b"theirs")
    (copied / "notes").mkdir()
    checkpoints = Checkpoints(copied, read_only=True)
    if 3 in checkpoints.steps():
        one_line("is damaged or not ours", lambda: checkpoints.restore(state(0), 3))
        one_line("the previous one is 2", lambda: checkpoints.restore(state(0)))
    assert bits(checkpoints.restore(state(0), 2).state) == bits(state(2))


def test_an_unfinished_checkpoint_is_ignored_and_cleaned_by_the_writer_only(copied):
    unfinished = copied / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "state").mkdir()
    reader = Checkpoints(copied, read_only=True)
    assert reader.steps() == [1, 2] and reader.latest() == 2 and unfinished.exists()
    writer = Checkpoints(copied)
    writer.save(3, state(3), RUN)
    writer.close()
    assert writer.steps() == [2, 3] and not unfinished.exists()


def changed(change):
    target = state(0)
    change(target)
    return target


OTHERS = {
    "missing params/b": lambda s: s["params"].update(b=jnp.zeros(2)),
    "unexpected params/half": lambda s: s["params"].pop("half"),
    "params/a is (8, 4) there and (8, 5) here": lambda s: s["params"].update(a=jnp.zeros((8, 5))),
}


@pytest.mark.parametrize("message", OTHERS)
def test_another_model_is_named(message, saved):
    target = changed(OTHERS[message])
    with pytest.raises(CheckpointError) as error:
        Checkpoints(saved, read_only=True).restore(target)
    text = str(error.value).replace("['", "").replace("']", "")
    assert "is of another model or optimizer" in text and message in text and "\n" not in text


def test_other_structured_weights_are_an_error(saved):
    checkpoints = Checkpoints(saved, read_only=True)
    one_line("/layers/kernel is", lambda: checkpoints.restore(changed(lambda s: s.update(state(0, scale=4.0)))))
    plain = lambda s: s["params"]["layers"].update(kernel=jnp.zeros((8, 4)))
    one_line("holds other structured weights", lambda: checkpoints.restore(changed(plain)))
    one_line("is of another model", lambda: checkpoints.restore(state(0, rank=4)))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 4, "model": 2})


def test_restores_onto_another_mesh(saved, mesh):
    def place(x):
        axes = [a if x.shape[i : i + 1] and x.shape[i] % n == 0 else None for i, (a, n) in enumerate(SIZES)]
        return NamedSharding(mesh, P(*axes[: x.ndim]))

    SIZES = (("data", 4), ("model", 2))
    shapes = jax.eval_shape(state)
    raw = jax.eval_shape(lambda: jax.tree.map(lambda x: x, state()))
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, P()) if x.ndim == 0 else place(x), raw)
    found = Checkpoints(saved, read_only=True).restore(shapes, shardings=shardings).state
    assert found["params"]["a"].sharding == NamedSharding(mesh, P("data", "model"))
    assert found["params"]["a"].addressable_shards[0].data.shape == (2, 2)
    assert found["params"]["layers"]["kernel"].base.values.sharding.spec == P("data", "model")
    assert bits(found) == bits(state(2))


def test_saved_from_a_mesh_restored_on_one_device(mesh, tmp_path):
    spread = jax.device_put(jnp.arange(32.0).reshape(8, 4), NamedSharding(mesh, P("model", "data")))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"params": {"a": spread}}, {})
    checkpoints.wait()
    found = checkpoints.restore(jax.eval_shape(lambda: {"params": {"a": jnp.zeros((8, 4))}})).state["params"]["a"]
    assert len(found.devices()) == 1
    np.testing.assert_array_equal(found, spread)
    params, _ = checkpoints.restore_params()
    np.testing.assert_array_equal(params["a"], spread)
    checkpoints.close()


def test_parameters_alone(saved, mesh):
    checkpoints = Checkpoints(saved, read_only=True)
    want = state(2)
    params, run = checkpoints.restore_params()
    assert run["data"] == RUN["data"]
    assert jax.tree.structure(params) == jax.tree.structure(want["params"]) and bits(params) == bits(want["params"])
    first, _ = checkpoints.restore_params(1)
    assert bits(first) == bits(state(1)["params"])

    cast, _ = checkpoints.restore_params(cast=jnp.bfloat16)
    kernel, mine = cast["layers"]["kernel"], want["params"]["layers"]["kernel"]
    assert kernel.base.scale.dtype == jnp.float32 and kernel.base.values.dtype == jnp.int8
    assert kernel.a.dtype == cast["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel.a, mine.a.astype(jnp.bfloat16))

    average, _ = checkpoints.restore_params(average=True)
    kernel = average["layers"]["kernel"]
    np.testing.assert_array_equal(kernel.a, mine.a + 1)
    np.testing.assert_array_equal(kernel.base.values, mine.base.values)  # what is not averaged is as trained
    np.testing.assert_array_equal(average["a"], want["params"]["a"])

    rows = lambda x: NamedSharding(mesh, P("data" if x.shape[0] % 4 == 0 else None))
    placed, _ = checkpoints.restore_params(place=lambda shapes: jax.tree.map(rows, shapes))
    assert placed["a"].sharding.spec == P("data") and bits(placed) == bits(want["params"])
    assert placed["layers"]["kernel"].a.addressable_shards[0].data.shape == (2, 3)


BASE = ("params/half", "params/layers/kernel/base/values", "params/layers/kernel/base/scale")


def test_what_is_stored_elsewhere_is_left_out(mesh, tmp_path):
    """Restored bitwise around what the caller brings, also when only parameters are read, cast or placed."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.leave_out(BASE)
    checkpoints.save(1, state(1), RUN)
    checkpoints.wait()
    assert not checkpoints.stored_shapes(1).keys() & set(BASE)
    assert checkpoints.read_run()[1]["left_out"]["params/half"] == [[5], "bfloat16"]
    brought = {**state(2), "params": state(1)["params"]}
    found = checkpoints.restore(jax.eval_shape(state), rest=brought).state
    assert bits(found) == bits(state(1)) and jax.tree.structure(found) == jax.tree.structure(state(1))
    rest = dict(paths.flatten(state(1)["params"]))
    for average in (False, True):
        params, _ = checkpoints.restore_params(average=average, rest=rest)
        assert jax.tree.structure(params) == jax.tree.structure(state(1)["params"])
        assert average or bits(params) == bits(state(1)["params"])
    rows = lambda x: NamedSharding(mesh, P("data" if x.shape[0] % 4 == 0 else None))
    place = lambda shapes: jax.tree.map(rows, shapes)
    placed, _ = checkpoints.restore_params(cast=jnp.float32, place=place, rest=rest)
    assert placed["half"].dtype == jnp.float32 and placed["layers"]["kernel"].base.values.sharding.spec == P("data")
    one_line("holds a delta without its frozen base", lambda: checkpoints.restore(state(0)))
    one_line("holds a delta without its frozen base", checkpoints.restore_params)
    one_line("leaves out half [5], which its base", lambda: checkpoints.restore_params(rest={}))
    checkpoints.leave_out(["params/other"])
    one_line("cannot leave out params/other", lambda: checkpoints.save(2, state(2), RUN))
    checkpoints.close()


def test_no_average(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"params": {"a": jnp.ones(2)}}, {})
    checkpoints.close()
    one_line("holds no moving average", lambda: Checkpoints(tmp_path, read_only=True).restore_params(average=True))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_one_line_and_earlier_checkpoints_stay(asynchronous, tmp_path):
    """The kernel refuses files above a limit, as it does on a full disk."""
    checkpoints = Checkpoints(tmp_path, asynchronous=asynchronous)
    checkpoints.save(1, state(1), RUN)
    checkpoints.wait()
    noise = {"params": jnp.asarray(np.random.default_rng(0).normal(size=2**16), jnp.float32)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write():
        checkpoints.save(2, noise, RUN)
        checkpoints.wait()

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        one_line("could not be written to", write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Checkpoints(tmp_path, read_only=True)
    assert again.steps() == [1] and bits(again.restore(state(0)).state) == bits(state(1))


def test_no_space_left_is_named(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    one_line("No space left on device", lambda: checkpoints.save(1, state(1), RUN))
