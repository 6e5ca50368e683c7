"""The ring buffer against one kept in Python."""

import jax
import numpy as np

from llm_jax.nn.cache import Cache, init_cache

SIZE = 5


def test_empty():
    cache, at = jax.jit(lambda: ((c := init_cache(2, 3, SIZE, 2, 4, "bfloat16")), c.key_positions(c.length_B)))()
    assert len(cache.layers) == 2 and cache.size == SIZE
    assert cache.layers[1].v_BKSH.shape == (3, 2, SIZE, 4) and cache.layers[0].k_BKSH.dtype == "bfloat16"
    assert (np.asarray(at) < 0).all()


def test_ragged_writes_equal_a_list_of_slots():
    rng = np.random.default_rng(0)
    cache = jax.jit(lambda: init_cache(1, 2, SIZE, 1, 1))()
    slots = [[None] * SIZE for _ in range(2)]  # (position, value) or None
    length = [0, 0]

    @jax.jit
    def put(cache, value, mask):
        order = cache.positions_of(mask)
        new = cache.length_B + mask.sum(1)
        at = jax.numpy.where(mask, order % SIZE, SIZE)
        layer = cache.layers[0].write(value, -value, at)
        return Cache((layer,), new), cache.key_positions(new)

    for _ in range(7):
        mask = rng.random((2, 3)) < 0.6
        value = rng.normal(size=(2, 3, 1, 1)).astype(np.float32)
        cache, at = put(cache, value, mask)
        layer = jax.device_get(cache.layers[0])
        at = np.asarray(at)
        for b in range(2):
            for t in np.flatnonzero(mask[b]):
                slots[b][length[b] % SIZE] = (length[b], value[b, t, 0, 0])
                length[b] += 1
            for s, entry in enumerate(slots[b]):
                if entry is None:
                    assert at[b, s] < 0
                else:
                    assert at[b, s] == entry[0]
                    assert layer.k_BKSH[b, 0, s, 0] == entry[1] == -layer.v_BKSH[b, 0, s, 0]
    assert cache.length_B.tolist() == length and min(length) > SIZE  # it went around


def test_beams_copy_a_table_and_no_keys():
    """Three beams of one row change places; what each sees is what it would hold had everything been copied."""
    w, size, rng = 3, 6, np.random.default_rng(0)
    cache = jax.jit(lambda: init_cache(1, 2, size, 1, 1))()
    prompt = np.array([[1.0, 2.0], [3.0, 0.0]])  # the second row's prompt is one token
    real = np.array([[True, True], [True, False]])

    @jax.jit
    def write(cache, x, mask):
        x_BTKH = x[..., None, None]
        layer = cache.content[0].write(x_BTKH, x_BTKH, cache.slots_of(cache.positions_of(mask), mask))
        return cache.with_content((layer,)).replace(length_B=cache.length_B + mask.sum(1))

    @jax.jit
    def look(cache):
        at = cache.key_positions(cache.length_B).reshape(2, -1)
        return at, cache.visible_BTS(1) & (at >= 0)[:, None]

    follow = jax.jit(Cache.follow)
    cache = jax.jit(Cache.widen, static_argnums=1)(write(cache, prompt, real), w)
    past = [[1.0, 2.0]] * w, [[3.0]] * w
    for step in range(3):
        new = 10.0 * (step + 1) + np.arange(2 * w)
        cache = write(cache, new[:, None], np.ones((2 * w, 1), bool))
        past = tuple([[*seen, new[b * w + i]] for i, seen in enumerate(row)] for b, row in enumerate(past))
        keys = np.asarray(cache.content[0].k_BKSH)[:, 0, :, 0]  # [2, W * S]
        at, own = jax.device_get(look(cache))
        for b in range(2):
            for i in range(w):
                mine = np.flatnonzero(own[b, i])
                assert keys[b, mine[np.argsort(at[b, mine])]].tolist() == past[b][i]
        parent = rng.integers(0, w, (2, w))
        cache = follow(cache, parent)
        past = tuple([row[p] for p in parent[b]] for b, row in enumerate(past))
    assert cache.num_beams == w and cache.size == size
