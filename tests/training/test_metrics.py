import json

from llm_jax.training import metrics


def write(folder, first_step, rows):
    writer = metrics.MetricsWriter(folder, first_step)
    for step, values in rows:
        writer.write(step, values)
    writer.close()


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    write(tmp_path, 0, [(step, {"train/loss": 10.0 - step}) for step in range(1, 6)])
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "train/lo')  # cut short by a kill
    write(tmp_path, 3, [(4, {"train/loss": 1.5})])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == metrics.read_metrics(tmp_path)
    assert [(r["step"], r["train/loss"]) for r in rows] == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 1.5)]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_what_is_not_finite_is_null(tmp_path):
    write(tmp_path, 0, [(1, {"a": float("nan"), "b": float("inf"), "c": 2.0})])
    assert metrics.read_metrics(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 2.0}]
    assert metrics.read_metrics(tmp_path / "nowhere") == []


def test_the_plot_is_a_picture_and_lives_without_an_evaluation(tmp_path):
    write(tmp_path, 0, [(1, {"train/loss": 2.0}), (2, {"train/loss": float("nan")}), (3, {"eval/loss": 1.0})])
    path = metrics.plot_loss(tmp_path)
    assert path.name == "loss.png" and path.read_bytes()[:4] == b"\x89PNG"


def test_an_object_store_appends_nothing(tmp_path):
    """There the whole file is written again, with the lines of the runs before."""

    class Store:
        """A path of etils on gs://, whose files cannot be opened for appending."""

        def __str__(self):
            return "gs://bucket/metrics.jsonl"

        def write_text(self, text):
            self.text = text

    write(tmp_path, 0, [(1, {"a": 1.0})])
    writer = metrics.MetricsWriter(tmp_path, 1)
    writer.file = Store()
    for step in (2, 3):
        writer.write(step, {"a": float(step)})
    writer.close()
    assert [json.loads(line)["step"] for line in writer.file.text.splitlines()] == [1, 2, 3]
