import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvit_jax import packing

TREE = {"b": {"bias": jnp.arange(3.0), "kernel": jnp.arange(8.0).reshape(2, 4) - 3},
        "a": jnp.float32(7.0), "c": {"kernel": jnp.ones((1, 2, 2))}}
DECAYED = {"b": {"bias": False, "kernel": True}, "a": False, "c": {"kernel": True}}


def test_vectors_hold_the_arrays_in_the_order_of_the_tree():
    own = packing.make_packing(TREE, DECAYED)
    vectors = own.pack(TREE)
    assert {k: v.tolist() for k, v in vectors.items()} == {
        "plain": [7, 0, 1, 2], "decayed": [-3, -2, -1, 0, 1, 2, 3, 4, 1, 1, 1, 1]}
    again = own.unpack(vectors)
    assert jax.tree.structure(again) == jax.tree.structure(TREE)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), again, TREE)
    squares = 7**2 + 0 + 1 + 4 + (9 + 4 + 1 + 0 + 1 + 4 + 9 + 16) + 4
    assert float(packing.norm(vectors)) == pytest.approx(squares**0.5, rel=1e-6)


def test_a_number_for_each_array_is_one_for_each_of_its_elements():
    own = packing.make_packing(TREE, DECAYED)
    vectors = own.spread({"b": {"bias": 2.0, "kernel": jnp.float32(3)}, "a": 0.0,
                          "c": {"kernel": 5.0}})
    assert {k: v.tolist() for k, v in vectors.items()} == {
        "plain": [0, 2, 2, 2], "decayed": [3] * 8 + [5] * 4}


def test_a_vector_of_nothing_is_left_out():
    own = packing.make_packing({"x": jnp.ones(2)}, {"x": False})
    assert set(own.pack({"x": jnp.ones(2)})) == {"plain"}


def test_another_tree_is_refused():
    own = packing.make_packing(TREE, DECAYED)
    with pytest.raises(ValueError, match=r"[Mm]ismatch|differ"):
        own.pack({**TREE, "d": jnp.ones(1)})
