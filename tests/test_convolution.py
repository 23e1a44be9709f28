"""Each form of a convolution against its reference, values and gradients, to 1e-5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvit_jax.models import convolution, grouped

ATOL = 1e-5


def normal(*shape, seed=0, scale=1.0):
    return np.asarray(np.random.default_rng(seed).normal(size=shape) * scale, np.float32)


def run_conv(conv, x, kernel, stride, cotangent):
    """Its output, and the gradients of the input and of the kernel."""
    out, pull = jax.vjp(lambda x, k: conv(x, k, stride), x, kernel)
    return out, *pull(cotangent)


def check_conv(conv, reference, sides, kernel, stride):
    """Holds a form of a convolution to the plain one, compiled, in float32 and bfloat16."""
    x = normal(2, *sides, 6 if kernel.shape[2] == 1 else kernel.shape[2])
    cotangent = normal(2, *(-(-side // stride) for side in sides), kernel.shape[-1], seed=2)
    plain = jax.jit(functools.partial(run_conv, reference, stride=stride))
    ours = jax.jit(functools.partial(run_conv, conv, stride=stride))
    expected = plain(x, kernel, cotangent=cotangent)
    for a, b in zip(ours(x, kernel, cotangent=cotangent), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=ATOL)
    half = [jnp.asarray(a, jnp.bfloat16) for a in (x, kernel, cotangent)]
    for a, b in zip(ours(*half[:2], cotangent=half[2]), expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(a), b, atol=0.03 * np.abs(b).max())


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (7, 1)])
@pytest.mark.parametrize("sides", [(9, 8), (7, 5), (1, 2)])
def test_shifted_depthwise_conv_equals_grouped(sides, size, stride):
    """On maps that are smaller than the kernel too."""
    check_conv(convolution.depthwise_conv_shifted, convolution.depthwise_conv_reference, sides,
               normal(size, size, 1, 6, seed=1, scale=0.9 / size), stride)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2), (5, 1)])
@pytest.mark.parametrize("sides", [(8, 8), (7, 5), (1, 2)])
def test_conv_by_patches_equals_conv(sides, size, stride):
    check_conv(convolution.conv_by_patches, convolution.conv_reference, sides,
               normal(size, size, 3, 4, seed=1, scale=0.2), stride)


@pytest.mark.parametrize("version", [(0, 10, 2), (0, 12, 0)])
def test_conv_of_three_channels_is_the_same_with_every_version_of_jax(monkeypatch, version):
    monkeypatch.setattr(jax, "__version_info__", version)
    seen = []
    monkeypatch.setattr(convolution, "conv_reference", lambda x, kernel, stride: (
        seen.append(x.shape[-1]) or grouped.grouped_conv_reference(x, kernel, stride, 1)))
    for channels, filled in ((3, 4 if version < (0, 12) else 3), (2, 2)):
        x, kernel = normal(2, 7, 6, channels), normal(3, 3, channels, 4, seed=1)
        expected = grouped.grouped_conv_reference(x, kernel, 2, 1)
        np.testing.assert_allclose(convolution.conv_by_patches(x, kernel, 2), expected, atol=ATOL)
        assert seen.pop() == filled


@pytest.mark.parametrize(("backend", "depthwise", "dense"), [
    ("cpu", "depthwise_conv_shifted", "conv_by_patches"),
    ("gpu", "depthwise_conv_reference", "conv_reference"),
    ("tpu", "depthwise_conv_reference", "conv_reference")])
def test_form_of_a_convolution_follows_backend(monkeypatch, backend, depthwise, dense):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for form in (depthwise, dense):
        monkeypatch.setattr(convolution, form, lambda x, kernel, stride, form=form: form)
    assert convolution.depthwise_conv(None, None, 1) == depthwise
    assert convolution.conv(None, None, 1) == dense
