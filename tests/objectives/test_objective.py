import dataclasses

import numpy as np
import pytest

from llm_jax.objectives.objective import total_loss


@dataclasses.dataclass
class Terms:
    coefficients: dict


@pytest.mark.parametrize(
    "coefficients, scores, weights, want",
    [
        ({"a": 1.0}, {"a": 6.0}, {"a": 3.0}, 2.0),
        ({"a": 1.0, "b": 0.5}, {"a": 6.0, "b": 8.0}, {"a": 3.0, "b": 2.0}, 4.0),  # each by its own weight
        ({"a": 1.0}, {"a": 6.0, "told": 99.0}, {"a": 3.0, "told": 1.0}, 2.0),  # reported, not trained
        ({"a": 1.0, "b": 1.0}, {"a": 6.0, "b": 0.0}, {"a": 3.0, "b": 0.0}, 2.0),  # without weight
        ({}, {}, {}, 0.0),
    ],
)
def test_every_term_is_divided_by_its_own_total(coefficients, scores, weights, want):
    number = lambda d: {k: np.float32(v) for k, v in d.items()}
    assert total_loss(Terms(coefficients), number(scores), number(weights)) == pytest.approx(want)
