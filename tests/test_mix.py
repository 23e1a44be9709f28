import jax
import jax.numpy as jnp
import numpy as np

from tinyvit_jax import mix


def images(rows=4, size=6):
    return np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), dtype=np.uint8)


def test_mixup_blends_both_ways():
    x = images()
    lam, box = jnp.array([0.25, 1.0]), jnp.zeros((2, 4), jnp.int32)
    out = np.asarray(mix.mix_pairs(jnp.asarray(x), lam, box))
    f = x.astype(np.float64)
    np.testing.assert_allclose(out[0], 0.25 * f[0] + 0.75 * f[1], atol=1e-4)
    np.testing.assert_allclose(out[1], 0.25 * f[1] + 0.75 * f[0], atol=1e-4)
    np.testing.assert_array_equal(out[2:], f[2:])


def test_cutmix_swaps_the_box_and_ignores_lam():
    x = images()
    lam, box = jnp.array([0.3, 0.3]), jnp.array([[1, 2, 4, 6], [0, 0, 6, 6]], jnp.int32)
    out = np.asarray(mix.mix_pairs(jnp.asarray(x), lam, box))
    expected = x.copy()
    expected[0, 1:4, 2:6], expected[1, 1:4, 2:6] = x[1, 1:4, 2:6], x[0, 1:4, 2:6]
    expected[2], expected[3] = x[3], x[2]
    np.testing.assert_array_equal(out, expected)


def test_normalize_by_hand():
    out = mix.normalize(jnp.full((1, 1, 1, 3), 51, jnp.uint8), (0.1, 0.2, 0.3), (0.5, 0.25, 0.1))
    np.testing.assert_allclose(out[0, 0, 0], [0.2, 0.0, -1.0], atol=1e-6)


def test_view_pixels_without_mixing_is_the_image():
    x = images()
    out = jax.jit(mix.view_pixels)({"image": x})
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, x)
