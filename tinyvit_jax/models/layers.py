"""The small layers of TinyViT: convolution with norm, window attention, MLP, drop path.

Images and maps are [B, H, W, C], tokens [B, N, C]. Weights, statistics, norms and softmax are
float32 whatever `dtype` the activations have. Module names are those of the original PyTorch
classes, so that a checkpoint's keys and ours differ by spelling only.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tinyvit_jax.models import attention, convolution, forms, grouped

Initializer = nn.initializers.Initializer

EPSILON = 1e-5  # of every BatchNorm and LayerNorm
BATCH_NORM_DECAY = 0.9  # torch's "momentum 0.1"

# The original draws a normal of std 0.02 cut at +-2, which is 100 standard deviations: no cut.
linear_init = nn.initializers.normal(0.02)
# torch's default for convolutions, kaiming uniform with a = sqrt 5: uniform in +-1/sqrt(fan_in).
conv_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x * Phi(x), by the error function."""
    if forms.for_cpu():
        # Computing the error function twice costs less than a whole map kept for the gradient.
        return jax.checkpoint(gelu_reference)(x)
    return gelu_reference(x)


def gelu_reference(x: jax.Array) -> jax.Array:
    """`gelu` with whatever its gradient keeps."""
    # jax.nn.gelu goes through erfc, which costs several times as much on CPU and TPU.
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * lax.erf(wide * np.float32(0.5**0.5)))).astype(x.dtype)


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Matrix product over the last axis, [..., C] by [C, D], in the backend's fastest form."""
    if forms.for_cpu():
        # XLA's CPU gradient of a product with several batch axes copies both sides first.
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])
    return x @ kernel


class Linear(nn.Module):
    """A dense layer with bias and the original's initial weights."""

    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = linear_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., features]."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return project(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)


class HeadProjection(nn.Module):
    """Queries, keys and values of each head."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """[B, N, C] -> three of [B, h, N, d], with d = C / h."""
        C = x.shape[-1]
        kernel = self.param("kernel", linear_init, (C, 3 * C), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (3 * C,), jnp.float32)
        return project_heads(x, kernel.astype(self.dtype), bias.astype(self.dtype), self.num_heads)


def project_heads(x: jax.Array, kernel: jax.Array, bias: jax.Array, num_heads: int
                  ) -> list[jax.Array]:
    """Queries, keys and values of each head, in the backend's fastest form.

    Args:
        x: [B, N, C].
        kernel: [C, 3C], of x's dtype: head by head, and q, k and v of a head together.
        bias: [3C], likewise.
        num_heads: h.

    Returns:
        Three of [B, h, N, C / h].
    """
    B, N, C = x.shape
    few = forms.for_cpu() and B * N < _FEW_TOKENS * C
    form = project_heads_reference if few else project_heads_apart
    return form(x, kernel, bias, num_heads)


_FEW_TOKENS = 8  # for each channel: cutting the kernel apart costs more than cutting the result


def project_heads_reference(x: jax.Array, kernel: jax.Array, bias: jax.Array, num_heads: int
                            ) -> list[jax.Array]:
    """`project_heads` as one product: the fastest form for few tokens on CPU."""
    B, N, C = x.shape
    parts = (project(x, kernel) + bias).reshape(B, N, num_heads, 3, C // num_heads)
    return list(parts.transpose(3, 0, 2, 1, 4))


def project_heads_apart(x: jax.Array, kernel: jax.Array, bias: jax.Array, num_heads: int
                        ) -> list[jax.Array]:
    """`project_heads` as three products: the fastest form on TPU, and for many tokens on CPU.

    Cutting one product's result apart costs a pass over it (1.4x at 28x28 maps on TPU v5e).
    """
    B, N, C = x.shape
    h, d = num_heads, C // num_heads
    kernels, biases = kernel.reshape(C, h, 3, d), bias.reshape(h, 3, d)
    parts = [project(x, kernels[:, :, i].reshape(C, C)) + biases[:, i].reshape(C)
             for i in range(3)]
    return [part.reshape(B, N, h, d).transpose(0, 2, 1, 3) for part in parts]


class Conv(nn.Module):
    """A square convolution without bias, padded by half its size; depthwise where asked for."""

    features: int
    size: int = 1
    stride: int = 1
    depthwise: bool = False
    dtype: jnp.dtype = jnp.float32
    groups: int = 1  # of channels, each with its own kernel; not where depthwise
    kernel_init: Initializer = conv_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]."""
        fan_in = 1 if self.depthwise else x.shape[-1] // self.groups
        shape = (self.size, self.size, fan_in, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.depthwise:
            return convolution.depthwise_conv(x, kernel, self.stride)
        if self.groups > 1:
            return grouped.grouped_conv(x, kernel, self.stride, self.groups)
        if self.size == 1 and self.stride == 1:
            return project(x, kernel[0, 0])
        return convolution.conv(x, kernel, self.stride)


class BatchNorm(nn.Module):
    """BatchNorm as torch's: the running variance is updated by the unbiased one of the batch.

    Statistics are over all but the last axis. Under jit on a mesh that is the global batch.

    Attributes:
        scale_init: initial scale; zeros start a residual branch as nothing.
        frozen: use the stored statistics in training too, and leave them as they are.
        dtype: of the result; the arithmetic is float32.
    """

    scale_init: Initializer = nn.initializers.ones
    frozen: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[..., C] -> [..., C]."""
        shape = x.shape[-1:]
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        stored_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        stored_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if train and not self.frozen:
            mean, var = _moments(x)
            if not self.is_initializing():
                n = x.size // x.shape[-1]
                rate = 1 - BATCH_NORM_DECAY
                unbiased = var * (n / max(n - 1, 1))
                stored_mean.value += rate * (mean - stored_mean.value)
                stored_var.value += rate * (unbiased - stored_var.value)
        else:
            mean, var = stored_mean.value, stored_var.value
        gain = scale * lax.rsqrt(var + EPSILON)
        return (x * gain + (bias - mean * gain)).astype(self.dtype)


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of each channel in float32, in one pass over x."""
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    return mean, jnp.maximum(jnp.mean(x * x, axes) - mean * mean, 0)


class ConvNorm(nn.Module):
    """A convolution (`c`) and its BatchNorm (`bn`)."""

    features: int
    size: int = 1
    stride: int = 1
    depthwise: bool = False
    scale_init: Initializer = nn.initializers.ones
    freeze_norm: bool = False
    dtype: jnp.dtype = jnp.float32
    groups: int = 1
    kernel_init: Initializer = conv_init

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]."""
        x = Conv(self.features, self.size, self.stride, self.depthwise, self.dtype, self.groups,
                 self.kernel_init, name="c")(x)
        return BatchNorm(self.scale_init, self.freeze_norm, self.dtype, name="bn")(x, train)


class DropPath(nn.Module):
    """Drops a residual branch for whole samples while training, and scales up the kept ones.

    Draws from the "drop_path" key (Huang et al. 2016, stochastic depth).
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, ...] -> [B, ...]."""
        if not train or self.rate == 0:
            return x
        keep = 1 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("drop_path"), keep, shape)
        return jnp.where(kept, x / keep, 0).astype(x.dtype)


def bias_index(window: int) -> np.ndarray:
    """Which entry of the bias table each pair of tokens reads.

    Returns:
        int32 [w*w, w*w], of |dy| * w + |dx|.
    """
    y, x = np.divmod(np.arange(window * window, dtype=np.int32), window)
    return np.abs(y[:, None] - y) * window + np.abs(x[:, None] - x)


def to_windows(x: jax.Array, window: int) -> jax.Array:
    """Cuts a map whose sides are multiples of the window: [B,H,W,C] -> [B*H*W/w^2, w*w, C]."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // window, window, W // window, window, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window * window, C)


def from_windows(x: jax.Array, window: int, H: int, W: int) -> jax.Array:
    """Undoes `to_windows`: [B*H*W/w^2, w*w, C] -> [B, H, W, C]."""
    C = x.shape[-1]
    x = x.reshape(-1, H // window, W // window, window, window, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, H, W, C)


class Attention(nn.Module):
    """Multi-head attention within a window, with a learned bias for each (|dy|, |dx|)."""

    num_heads: int
    window: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Windows of tokens [B, w*w, C] -> [B, w*w, C]."""
        _, N, C = x.shape
        table = self.param("attention_biases", nn.initializers.zeros, (self.num_heads, N),
                           jnp.float32)
        x = nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm")(x)
        q, k, v = HeadProjection(self.num_heads, self.dtype, name="qkv")(x)
        mixed = attention.attend(q, k, v, table[:, bias_index(self.window)])
        return Linear(C, self.dtype, name="proj")(mixed)


class Mlp(nn.Module):
    """LayerNorm, a wider layer, GELU, and back."""

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., C]."""
        C = x.shape[-1]
        x = nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm")(x)
        x = gelu(Linear(self.hidden, self.dtype, name="fc1")(x))
        return Linear(C, self.dtype, name="fc2")(x)
