import json

import numpy as np
import pytest

from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.digests import FileDigest
from llm_jax.training.workdir import Workdir, WorkdirError, todays

CONFIG = {"model": {"num_layers": 2}, "plan": {"data": 1}, "training": {"steps": 5, "seed": 0, "log_every": 1}}


def changed(group, name, value):
    return {**CONFIG, group: {**CONFIG[group], name: value}}


def test_one_live_run_at_a_time(tmp_path):
    with Workdir(tmp_path / "new" / "run"):
        with pytest.raises(WorkdirError, match="is in use by a live run; wait for it or choose another --workdir"):
            Workdir(tmp_path / "new" / "run")
        with Workdir(tmp_path / "other"):
            pass
    with Workdir(tmp_path / "new" / "run"):  # given back
        pass


@pytest.mark.parametrize(
    "after, words",
    [
        (CONFIG, None),
        (changed("training", "steps", 9), None),
        (changed("training", "log_every", 3), None),
        (changed("plan", "data", 8), None),
        ({**CONFIG, "data": {"cache": "/tmp/tokens", "verify": True}}, None),  # where tokens lie, and what is checked
        (changed("training", "seed", 1), r"\(training.seed: 0 -> 1\)"),
        (changed("model", "num_layers", 3), r"\(model.num_layers: 2 -> 3\)"),
        (changed("model", "bias", True), r"\(model.bias: None -> true\)"),
    ],
)
def test_a_run_goes_on_with_its_own_config_only(tmp_path, after, words):
    with Workdir(tmp_path) as workdir:
        workdir.settle_config(CONFIG)
        (tmp_path / "checkpoints" / "5").mkdir(parents=True)
        if words is None:
            workdir.settle_config(after)
            assert json.loads((tmp_path / "config.json").read_text()) == after
        else:
            with pytest.raises(WorkdirError, match="holds a run with another config " + words):
                workdir.settle_config(after)
            assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_before_the_first_checkpoint_a_config_may_change(tmp_path):
    with Workdir(tmp_path) as workdir:
        workdir.settle_config(CONFIG)
        workdir.settle_config(changed("training", "seed", 1))
    assert json.loads((tmp_path / "config.json").read_text())["training"]["seed"] == 1


def test_a_field_that_an_older_version_lacked_means_its_default(tmp_path):
    older = {group: dict(fields) for group, fields in CONFIG.items()}
    with Workdir(tmp_path) as workdir:
        workdir.settle_config(older)
        (tmp_path / "checkpoints" / "1").mkdir(parents=True)
        newer = {**older, "model": {**older["model"], "added": 0}}
        workdir.settle_config(newer, {"model": {"added": 0}, "other": {"elsewhere": 1}})
        with pytest.raises(WorkdirError, match="model.added: 0 -> 2"):
            workdir.settle_config({**older, "model": {**older["model"], "added": 2}}, {"model": {"added": 0}})


@pytest.mark.parametrize("damage", [b"", b'{"model": {"num_la', b"\xff\xfe", b"[]", None])
def test_a_damaged_config_is_read_from_the_newest_checkpoint(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path / "checkpoints", asynchronous=False)
    checkpoints.save(1, {"params": {"a": np.zeros(2)}}, {"config": CONFIG})
    checkpoints.close()
    file = tmp_path / "config.json"
    file.write_bytes(damage) if damage is not None else None
    with Workdir(tmp_path) as workdir:
        with pytest.raises(WorkdirError, match="another config .*training.seed: 0 -> 1"):
            workdir.settle_config(changed("training", "seed", 1))
        workdir.settle_config(changed("training", "steps", 9))
        assert json.loads(file.read_text())["training"]["steps"] == 9
        for item in (tmp_path / "checkpoints" / "1" / "run").iterdir():
            item.write_text("{")
        file.write_bytes(b"{")
        with pytest.raises(
            WorkdirError, match="config.json is missing or damaged, and no checkpoint says .*is damaged"
        ):
            workdir.settle_config(CONFIG)


def test_the_direction_of_rows_moved_from_the_model_to_the_objective():
    permuted, labels = {"rate": 0.2, "longest": 5}, {"kind": "classification"}
    old = lambda objective: {"model": {"family": "xlnet", "both_ways": True}, "objective": objective}
    assert todays(old(permuted))["objective"] == {**permuted, "both_ways": True}
    assert todays(old(labels)) == {"model": {"family": "xlnet"}, "objective": labels}
    assert todays(CONFIG) == CONFIG


def test_fields_that_an_optimizer_never_read_do_not_part_runs():
    old = {
        "optimizer": {"name": "adafactor", "schedule": "cosine", "eps": 1e-30, "noam_dim": 512, "learning_rate": 1.0}
    }
    assert todays(old)["optimizer"] == {"name": "adafactor", "schedule": "cosine", "learning_rate": 1.0}
    plain = {"optimizer": {"name": "adamw", "final_ratio": 0.0}}  # of the default schedule, which reads it
    assert todays(plain) == plain
    noam = {"optimizer": {"name": "adam", "schedule": "noam", "eps": 1e-9, "noam_dim": 512}}
    assert todays(noam) == noam


DATA = {f"{n}.txt": FileDigest(12, 3, 4, "boot", f"0{n}") for n in "abc"}
OTHER = FileDigest(1500, 3, 4, "boot", "ff")
GONE = {"a.txt": DATA["a.txt"]}


@pytest.mark.parametrize(
    "after, words",
    [
        (DATA, None),
        (
            {n: d._replace(modified=9, changed=9, boot="another") for n, d in DATA.items()},
            None,
        ),  # touched, or restarted
        ({f"moved/{n}": d for n, d in DATA.items()}, None),
        ({**DATA, "b.txt": OTHER}, r"changed: b.txt was replaced \(12 -> 1,500 bytes\); --accept_changed_data resumes"),
        ({**DATA, "d.txt": OTHER}, "changed: d.txt is new; "),
        (GONE, "changed: b.txt is gone, c.txt is gone; "),
        ({n + "s": OTHER for n in DATA}, "a.txt is gone, b.txt is gone, c.txt is gone, and 3 more; "),
    ],
)
def test_a_run_goes_on_with_its_own_data_unless_told_otherwise(tmp_path, after, words, caplog):
    with Workdir(tmp_path) as workdir:
        workdir.settle_data(GONE)
        workdir.settle_data(DATA)  # before the first checkpoint data may change
        (tmp_path / "checkpoints" / "5").mkdir(parents=True)
        if words is not None:
            with pytest.raises(WorkdirError, match=words) as error:
                workdir.settle_data(after)
            assert workdir.known_data() == DATA and "\n" not in str(error.value)
        workdir.settle_data(after, accept_changed=True)
        assert ("resuming on changed data: " in caplog.text) == (words is not None)
        workdir.settle_data(after)
        assert workdir.known_data() == after


def test_data_of_older_and_of_damaged_work_directories(tmp_path, caplog):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with Workdir(tmp_path) as workdir:
        workdir.settle_data(DATA)  # an older version stored nothing to compare with
        assert workdir.known_data() == DATA and not caplog.text
        (tmp_path / "data.json").write_text("{")
        with pytest.raises(WorkdirError, match="data.json is damaged: .*, so nothing says whether the data changed"):
            workdir.settle_data(DATA)
        workdir.settle_data(DATA, accept_changed=True)
        workdir.settle_data(DATA)
