import json

import numpy as np
import pytest
from tiny_models import MODELS, V, model_params

from llm_jax.nn import weights
from llm_jax.training import metrics

D, L = 12, 2


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


@pytest.mark.parametrize(
    "name, table",
    [
        ("gpt2", V * D),  # tied: the table multiplies as the head
        ("gpt_untied_padded", 32 * D),  # of two tables only the head multiplies
        ("llama", V * D),
        ("mistral", V * D),
    ],
)
def test_flops_by_hand(name, table):
    config = MODELS[name]
    params = model_params(config)
    width = config.num_heads * (getattr(config, "head_dim", None) or D // config.num_heads)
    if name.startswith("gpt"):
        layer, final = 4 * (D * D + D) + (D * 4 * D + 4 * D) + (4 * D * D + D) + 4 * D, 2 * D
    else:
        layer, final = D * 12 + 2 * D * 4 + 12 * D + 3 * D * 10 + 2 * D, D
    want = 6 * (table + L * layer + final) + 3 * L * (2 * 2 * 7 * width)
    assert metrics.flops_per_token(params, L, 7, width) == want
    assert weights.count(params) > 0 and want == int(want)


def test_flops_count_a_structured_weight_by_its_shape():
    class Half(weights.Weight):
        rows: np.ndarray

        @property
        def shape(self):
            return (10, 20)

    assert metrics.flops_per_token({"a": Half(np.zeros(3))}, 0, 1, 1) == 6 * 200


def test_the_peak_of_a_cpu_is_unknown():
    assert metrics.peak_flops() is None
