"""Convolutions of groups of channels, each group by itself, in the form that suits the backend."""

import jax
import jax.numpy as jnp
from jax import lax

from tinyvit_jax.models import forms


def grouped_conv(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """Square convolution of each group of channels, padded by half its size.

    Args:
        x: [B, H, W, C].
        kernel: [k, k, C / groups, D] with k odd, of x's dtype; the first D / groups outputs are
            those of the first C / groups channels, and so on.
        stride: 1 or 2.
        groups: divides C and D.

    Returns:
        [B, ceil(H / stride), ceil(W / stride), D].
    """
    form = grouped_conv_by_products if forms.for_cpu() else grouped_conv_reference
    return form(x, kernel, stride, groups)


def grouped_conv_reference(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """`grouped_conv` as XLA's convolution, with XLA's gradients."""
    pad = (kernel.shape[0] // 2,) * 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups)


def grouped_conv_by_products(x: jax.Array, kernel: jax.Array, stride: int, groups: int
                             ) -> jax.Array:
    """`grouped_conv` as one matrix product for each group, over the patches that it sees."""
    B, H, W, _ = x.shape
    k, _, c, D = kernel.shape
    pad = k // 2
    h, w = -(-H // stride), -(-W // stride)
    # Groups first: a product of many, each [B h w, k k c] by [k k c, d].
    parts = x.reshape(B, H, W, groups, c).transpose(3, 0, 1, 2, 4)
    padded = jnp.pad(parts, ((0, 0), (0, 0), (pad, pad), (pad, pad), (0, 0)))
    taps = [padded[:, :, i:i + stride * (h - 1) + 1:stride, j:j + stride * (w - 1) + 1:stride]
            for i in range(k) for j in range(k)]
    patches = jnp.concatenate(taps, -1).reshape(groups, B * h * w, k * k * c)
    kernels = kernel.reshape(k * k * c, groups, D // groups).transpose(1, 0, 2)
    out = jnp.einsum("gnk,gkd->gnd", patches, kernels)
    return out.transpose(1, 0, 2).reshape(B, h, w, D)
