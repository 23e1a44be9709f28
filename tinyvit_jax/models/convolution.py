"""Convolutions of maps [B, H, W, C], whole and of each channel by itself.

Each has one form that every backend runs, its reference, and one for CPUs with a gradient by hand.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tinyvit_jax.models import forms, grouped


def conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Square convolution padded by half its size, in the backend's fastest form.

    Args:
        x: [B, H, W, C].
        kernel: [k, k, C, D] with k odd, of x's dtype.
        stride: 1 or 2.

    Returns:
        [B, ceil(H / stride), ceil(W / stride), D].
    """
    form = conv_by_patches if forms.for_cpu() else conv_reference
    return form(x, kernel, stride)


def conv_reference(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`conv` as XLA's convolution, with XLA's gradients."""
    return grouped.grouped_conv_reference(x, kernel, stride, 1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv_by_patches(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`conv` whose kernel's gradient is a matrix product: half the time of XLA's on CPU."""
    if x.shape[-1] == 3 and jax.__version_info__ < (0, 12):
        # XLA before that took twice as long for three channels as for four.
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1)))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, 1), (0, 0)))
    return conv_reference(x, kernel, stride)


def _patches_forward(x, kernel, stride):
    return conv_by_patches(x, kernel, stride), (x, kernel)


def _patches_backward(stride, saved, grad):
    x, kernel = saved
    (x_grad,) = jax.linear_transpose(lambda x: conv_reference(x, kernel, stride), x)(grad)
    size, _, C, D = kernel.shape
    H, W = grad.shape[1:3]

    # Image by image: the patches of a whole batch would be several times as large as its map.
    def add_image(total, image):
        padded, grad = image
        seen = [_shift(padded[None], i, j, H, W, stride) for i in range(size) for j in range(size)]
        patches = jnp.concatenate(seen, -1).reshape(H * W, size * size * C)
        return total + jnp.dot(patches.T, grad.reshape(H * W, D),
                               preferred_element_type=jnp.float32), None

    zeros = jnp.zeros((size * size * C, D), jnp.float32)
    total, _ = lax.scan(add_image, zeros, (_pad(x, size // 2), grad))
    return x_grad, total.reshape(kernel.shape).astype(kernel.dtype)


conv_by_patches.defvjp(_patches_forward, _patches_backward)


def _pad(x: jax.Array, n: int) -> jax.Array:
    """Zeros around a map: [B, H, W, C] -> [B, H + 2n, W + 2n, C]."""
    return jnp.pad(x, ((0, 0), (n, n), (n, n), (0, 0)))


def _shift(padded: jax.Array, i: int, j: int, H: int, W: int, stride: int) -> jax.Array:
    """What tap (i, j) of a kernel sees: [B, H, W, C] of a padded map."""
    return padded[:, i:i + stride * (H - 1) + 1:stride, j:j + stride * (W - 1) + 1:stride]


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Square convolution of each channel by itself, padded by half its size, in the fastest form.

    Args:
        x: [B, H, W, C].
        kernel: [k, k, 1, C] with k odd, of x's dtype.
        stride: 1 or 2.

    Returns:
        [B, ceil(H / stride), ceil(W / stride), C].
    """
    if forms.for_cpu():
        return depthwise_conv_shifted(x, kernel, stride)
    return depthwise_conv_reference(x, kernel, stride)


def depthwise_conv_reference(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`depthwise_conv` as XLA's grouped convolution: the fastest form on TPU."""
    return grouped.grouped_conv_reference(x, kernel, stride, x.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv_shifted(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`depthwise_conv` as shifted multiply-adds, one for each tap: the fastest form on CPU.

    XLA's CPU gradient of a grouped convolution does more arithmetic than the rest of the network,
    hence the gradients by hand, shifts as well.
    """
    return _shifted_forward(x, kernel, stride)[0]


def _shifted_forward(x, kernel, stride):
    H, W = (-(-size // stride) for size in x.shape[1:3])
    # Without the barrier XLA computes the map a second time for the middle tap.
    padded = lax.optimization_barrier(_pad(x, kernel.shape[0] // 2))
    return _sum_taps(padded, kernel, H, W, stride), (padded, kernel)


def _sum_taps(padded: jax.Array, kernel: jax.Array, H: int, W: int, stride: int) -> jax.Array:
    """Convolves a map that has its zeros around it: [B, H, W, C]."""
    size = range(kernel.shape[0])
    taps = [_shift(padded, i, j, H, W, stride) * kernel[i, j, 0] for i in size for j in size]
    return sum(taps[1:], taps[0])


def _shifted_backward(stride, saved, grad):
    padded, kernel = saved
    pad = kernel.shape[0] // 2
    H, W = padded.shape[1] - 2 * pad, padded.shape[2] - 2 * pad
    # Zeros between the outputs of a strided convolution make its transpose one of stride 1.
    ends = [size - stride * (n - 1) for size, n in zip((H, W), grad.shape[1:3], strict=True)]
    zero = jnp.zeros((), grad.dtype)
    spread = lax.optimization_barrier(lax.pad(grad, zero, [
        (0, 0, 0), (pad, ends[0] + pad - 1, stride - 1), (pad, ends[1] + pad - 1, stride - 1),
        (0, 0, 0)]))
    x_grad = _sum_taps(spread, kernel[::-1, ::-1], H, W, 1)
    return x_grad, _kernel_grad(padded, spread, stride, len(kernel)).astype(kernel.dtype)


def _kernel_grad(padded: jax.Array, spread: jax.Array, stride: int, k: int) -> jax.Array:
    """Gradient of the depthwise kernel, float32 [k, k, 1, C].

    Row by row, because k rows stay in the cache: about four times as fast as whole maps.

    Args:
        padded: the map with k // 2 zeros around it, [B, H + k - 1, W + k - 1, C].
        spread: the gradient, of the same shape: zeros around it and, where `stride` is 2, between.
        stride: of the convolution.
        k: side of the kernel.
    """
    B, _, width, C = padded.shape
    H, W = (-(-(size - k + 1) // stride) for size in padded.shape[1:3])
    end, pad = stride * (W - 1) + 1, k // 2

    def add_row(sums, row):
        b, y = row // H, row % H * stride
        rows = lax.dynamic_slice(padded, (b, y, 0, 0), (1, k, width, C))[0]
        seen = lax.dynamic_slice(spread, (b, y + pad, 0, 0), (1, 1, width, C))[0]
        seen = seen[:, pad:pad + end:stride].astype(jnp.float32)
        return [total + rows[:, j:j + end:stride] * seen for j, total in enumerate(sums)], None

    sums, _ = lax.scan(add_row, [jnp.zeros((k, W, C))] * k, jnp.arange(B * H))
    return jnp.stack([total.sum(1) for total in sums], 1)[:, :, None]


depthwise_conv_shifted.defvjp(_shifted_forward, _shifted_backward)
