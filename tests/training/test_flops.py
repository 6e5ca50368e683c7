import numpy as np
import pytest
from tiny_models import MODELS, V, model_params

from llm_jax.nn import weights
from llm_jax.training import flops

D, L = 12, 2


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
    assert flops.flops_per_token(params, L, 7, width) == want
    assert weights.count(params) > 0 and want == int(want)


def test_flops_count_a_structured_weight_by_its_shape():
    class Half(weights.Weight):
        rows: np.ndarray

        @property
        def shape(self):
            return (10, 20)

    assert flops.flops_per_token({"a": Half(np.zeros(3))}, 0, 1, 1) == 6 * 200


def test_the_peak_of_a_cpu_is_unknown():
    assert flops.peak_flops() is None
