"""Counter-based random numbers: frozen values, uniformity, permutations."""

import numpy as np
import pytest

from tinyvit_jax.data import draws

GOLDEN = {
    "hash": 7702586659592502839,
    "unit": 0.12583069896609833,
    "shuffled": [5, 4, 1, 2, 8, 9, 6, 0, 7, 3],
    "seeds": [1416574470, 2969833071, 158876751],
}


def test_values_are_frozen():
    assert draws.hash64() == 0
    assert draws.hash64(1, 2, 3) == GOLDEN["hash"]
    assert draws.unit(7, 11) == GOLDEN["unit"]
    assert draws.shuffled(np.arange(10), 10, 5).tolist() == GOLDEN["shuffled"]
    seeds = draws.view_seeds(3, np.array([0, 0, 1]), np.array([0, 1, 0]))
    assert seeds.tolist() == GOLDEN["seeds"]


def test_hash_takes_words_modulo_64_bits_and_in_order():
    assert draws.hash64(-1) == draws.hash64(2**64 - 1)
    assert draws.hash64(1, 2) != draws.hash64(2, 1)
    assert 0 <= draws.hash64(2**70 + 5) < 2**64


def test_unit_is_the_upper_bits_of_the_hash():
    for seed in (0, 1, 2**32 - 1, 2**64 - 1, 2**64 + 3, -7):
        for slot in (0, 1, 305, 10_100):
            expected = (draws.hash64(seed, slot) >> 11) / 2**53
            assert draws.unit(seed, slot) == expected
            assert draws.unit(seed, slot) == expected  # again, from what was kept


def test_unit_is_uniform_over_seeds_and_over_slots():
    for values in ([draws.unit(seed, 3) for seed in range(20_000)],
                   [draws.unit(3, slot) for slot in range(20_000)]):
        values = np.array(values)
        assert values.min() >= 0
        assert values.max() < 1
        counts = np.bincount((values * 20).astype(int), minlength=20)
        # Chi-square with 19 degrees of freedom: 43.8 is passed once in a thousand.
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8


def test_neighbouring_seeds_and_slots_are_uncorrelated():
    table = np.array([[draws.unit(seed, slot) for slot in range(4)] for seed in range(5000)])
    lagged = np.concatenate([table[:-1], table[1:]], axis=1)
    correlation = np.corrcoef(lagged.T) - np.eye(8)
    assert np.abs(correlation).max() < 0.07  # 5 standard deviations of 1 / sqrt(5000)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 255, 256, 257, 1000])
def test_shuffled_is_a_permutation(size):
    for seed in range(3):
        assert sorted(draws.shuffled(np.arange(size), size, seed)) == list(range(size))


def test_shuffled_takes_positions_one_by_one():
    whole = draws.shuffled(np.arange(1000), 1000, 9)
    assert draws.shuffled(np.array([700, 3]), 1000, 9).tolist() == whole[[700, 3]].tolist()


def test_shuffled_spreads_each_position_over_the_range():
    places = np.array([draws.shuffled(np.array([0, 499]), 500, seed) for seed in range(2000)])
    assert np.abs(places.mean(0) - 249.5).max() < 5 * 500 / np.sqrt(12 * 2000)
    assert abs(np.corrcoef(places.T)[0, 1]) < 5 / np.sqrt(2000)


@pytest.mark.parametrize("position", [-1, 10])
def test_shuffled_refuses_positions_outside(position):
    with pytest.raises(ValueError, match=r"\[0, 10\)"):
        draws.shuffled(np.array([position]), 10, 0)


def test_view_seeds_hang_on_each_argument_alone():
    index = np.arange(1000)
    one = draws.view_seeds(0, np.zeros(1000, int), index)
    assert one.dtype == np.uint32
    assert len(set(one.tolist())) > 998
    assert draws.view_seeds(0, np.array([0]), np.array([77])) == one[77]
    for other in (draws.view_seeds(1, np.zeros(1000, int), index),
                  draws.view_seeds(0, np.ones(1000, int), index)):
        assert (other != one).mean() > 0.99
