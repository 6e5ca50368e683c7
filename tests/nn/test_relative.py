"""T5's buckets, by their definition and as a bias."""

import jax
import numpy as np
from tiny_models import random_params

from llm_jax.nn.attend import Mask
from llm_jax.nn.relative import RelativeBias, bucket_table, distances


def test_buckets_by_hand():
    """Half are exact; the others halve log(128 / 8) into eight equal steps, and all from 128 on are one."""
    table = bucket_table(16, 128)
    assert table[:9].tolist() == list(range(9)) and table[128] == 15
    borders = 8 * (128 / 8) ** (np.arange(9) / 8)  # 8, 11.3, 16, 22.6, 32, ...
    for bucket in range(8, 16):
        inside = np.flatnonzero(table == bucket)
        assert inside.min() >= borders[bucket - 8] - 1e-3 and (bucket == 15 or inside.max() < borders[bucket - 7])
    assert (np.diff(table) >= 0).all()


def test_bias_reads_one_row_a_bucket():
    module = RelativeBias(3, num_buckets=8, max_distance=6, bidirectional=True)
    distance = np.arange(-9, 10)[None, None]
    params = random_params(module, distance)
    one_sided = RelativeBias(3, num_buckets=8, max_distance=6, bidirectional=False)
    both = jax.jit(lambda params: [m.apply({"params": params}, distance) for m in (module, one_sided)])
    bias, past = jax.device_get(both(params))
    assert bias.shape == (1, 3, 1, 19)
    table = bucket_table(4, 6)
    for column, d in enumerate(range(-9, 10)):
        row = table[min(abs(d), 6)] + (4 if d < 0 else 0)  # keys behind the query have the second half
        np.testing.assert_array_equal(bias[0, :, 0, column], params["embedding"][row])
    assert (past[..., :9] == params["embedding"][0][None, :, None, None]).all()  # the future is hidden anyway


def test_distances_with_and_without_a_cache():
    mask = Mask(np.array([[4], [2]]), np.array([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]]))
    assert np.asarray(distances(mask, True))[:, 0, :3].tolist() == [[4, 3, 2], [2, 1, 0]]
    assert jax.eval_shape(lambda m: distances(m, False), mask).shape == (1, 1, 5)  # one row serves all
