"""Softmax attention of heads, in the backend's fastest form."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tinyvit_jax.models import forms


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None,
           drop: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
    """The values of all tokens, weighted for each token by the softmax of q k / sqrt(d) + bias.

    Args:
        q, k, v: [B, h, N, d] each, of one dtype; scores and softmax are float32.
        bias: float32 [h, N, N], or None for none.
        drop: what is done to the weights [B, h, N, N] before they are used; None = nothing.

    Returns:
        [B, N, h * d] of v's dtype.
    """
    B, h, N, d = v.shape
    if forms.for_cpu() and drop is None:
        mixed = attend_by_hand(q, k, v, bias)
    else:
        mixed = attend_reference(q, k, v, bias, drop)
    return mixed.transpose(0, 2, 1, 3).reshape(B, N, h * d)


def attend_reference(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None,
                     drop: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
    """`attend` before heads are joined, [B, h, N, d], with XLA's gradients."""
    weights = jax.nn.softmax(_score(q, k, bias))
    if drop is not None:
        weights = drop(weights)
    return jnp.einsum("bhnm,bhmd->bhnd", weights.astype(v.dtype), v)


def _score(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> jax.Array:
    """float32 [B, h, N, N]."""
    scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1]**-0.5
    return scores if bias is None else scores + bias


@jax.custom_vjp
def attend_by_hand(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`attend_reference` with gradients by hand: forward and back in half the time, for N = 196.

    The weights are divided by their sum after they have mixed the values, and the sum in the
    softmax's gradient is read off the result (FlashAttention, Dao et al. 2022, appendix B.2): both
    over d numbers of a token where XLA's own go over N. It has no forward-mode derivative.
    """
    return _forward(q, k, v, bias)[0]


def _forward(q, k, v, bias):
    scores = _score(q, k, bias)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    share = 1 / weights.sum(-1, keepdims=True)
    mixed = _multiply("bhnm,bhmd->bhnd", weights, v, v.dtype) * share
    return mixed.astype(v.dtype), (q, k, v, bias, weights, share, mixed)


def _backward(saved, grad):
    q, k, v, bias, weights, share, mixed = saved
    grad = (grad * share).astype(v.dtype)
    v_grad = _multiply("bhnm,bhnd->bhmd", weights, grad, v.dtype)
    of_sum = (grad * mixed).sum(-1, keepdims=True)
    # Without the barrier XLA computes this again in each product that reads it.
    score_grad = jax.lax.optimization_barrier(
        weights * (_multiply("bhnd,bhmd->bhnm", grad, v, v.dtype) - of_sum))
    scale = q.shape[-1]**-0.5
    q_grad = _multiply("bhnm,bhmd->bhnd", score_grad, k, q.dtype) * scale
    k_grad = _multiply("bhnm,bhnd->bhmd", score_grad, q, q.dtype) * scale
    bias_grad = None if bias is None else _sum_batch(score_grad)
    return q_grad.astype(q.dtype), k_grad.astype(k.dtype), v_grad.astype(v.dtype), bias_grad


def _multiply(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A product whose factors have `dtype`, and which is float32."""
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _sum_batch(x: jax.Array) -> jax.Array:
    """[B, ...] -> [...], as a product by ones: XLA's sum takes many times as long."""
    ones = jnp.ones((1, x.shape[0]), x.dtype)
    return (ones @ x.reshape(x.shape[0], -1)).reshape(x.shape[1:])


attend_by_hand.defvjp(_forward, _backward)
