"""The draws on a device are those of data/draws.py, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvit_jax import hashing
from tinyvit_jax.data import draws
from tinyvit_jax.data.order import Order

WORDS = [0, 1, 0xFFFF, 0x10000, 0xFFFFFFFF, 0x100000000, 0x123456789ABCDEF, (1 << 64) - 1]
SEEDS = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint64).astype(np.uint32)


def value(found):
    return int(found[0]) << 32 | int(found[1])


@pytest.mark.parametrize("a", WORDS)
def test_arithmetic(a):
    for b in WORDS:
        assert value(hashing.add(hashing.word(a), hashing.word(b))) == (a + b) % 2**64
        assert value(hashing.multiply(hashing.word(a), hashing.word(b))) == a * b % 2**64
        assert value(hashing.hash64(a, b)) == draws.hash64(a, b)


@pytest.mark.parametrize("slot", [0, 3, 10_100])
def test_numbers(slot):
    expected = np.array([draws.unit(int(seed), slot) for seed in SEEDS])
    bits = hashing.draw(jnp.asarray(SEEDS), slot)
    found = np.asarray(hashing.uniform(bits), np.float64)
    assert np.all(found <= expected)
    assert np.all(expected - found < 2.0**-24)
    for count in (1, 9, 25, 2048):
        np.testing.assert_array_equal(hashing.scaled(bits, count), (expected * count).astype(int))
    for probability in (0.0, 0.1, 0.5, 1.0, *expected[:4], *np.nextafter(expected[:4], 1)):
        np.testing.assert_array_equal(hashing.below(bits, probability), expected < probability)
    with pytest.raises(ValueError, match="count=2049 cannot work: expected 1 to 2048"):
        hashing.scaled(bits, 2049)


@pytest.mark.parametrize(("size", "paired"), [(2, False), (5, True), (1000, False), (50_000, True)])
def test_places(size, paired):
    order = Order(7, size, paired)
    view = np.unique(np.r_[np.arange(3 * size)[:2000], order.views_per_pass + np.arange(-9, 9)])
    pass_number, position = order.locate(view[view >= 0])
    keys = jax.jit(lambda *place: hashing.view_keys(7, size, *place))(
        jnp.asarray(pass_number, jnp.int32), jnp.asarray(position, jnp.int32))
    for found, expected in zip(keys, order.keys(pass_number, position), strict=True):
        np.testing.assert_array_equal(found, expected)
