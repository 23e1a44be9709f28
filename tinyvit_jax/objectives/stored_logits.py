"""Learning from a stored teacher: cross-entropy with its top K classes and a uniform tail.

TinyViT section 3.1: the K stored probabilities stand, and what they leave over is spread evenly
over the other C - K classes. Hinton et al. 2015 (arXiv 1503.02531), section 2: both softmaxes may
have a temperature T, and the loss is multiplied by T^2, which keeps the scale of its gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def sparse_cross_entropy(logits: jax.Array, index: jax.Array, prob: jax.Array) -> jax.Array:
    """Cross-entropy with a sparse target, without ever building the dense one.

    Args:
        logits: [B, C], any float dtype.
        index: int32 [B, K], distinct classes in each row.
        prob: float32 [B, K], their probabilities; the others share what is left over.

    Returns:
        float32 [B].
    """
    classes, kept = logits.shape[-1], index.shape[-1]
    left_over = jnp.maximum(1.0 - prob.sum(-1), 0.0)
    rest = left_over / max(classes - kept, 1) if classes > kept else jnp.zeros_like(left_over)
    return _cross_entropy(logits, index, prob, rest)


@jax.custom_vjp
def _cross_entropy(logits: jax.Array, index: jax.Array, prob: jax.Array, rest: jax.Array
                   ) -> jax.Array:
    """Cross-entropy with the target of `prob` [B, K] at `index` and `rest` [B] everywhere else.

    The dense sum splits into -(sum_k (v_k - rest) logp[i_k] + rest sum_c logp_c). The gradient by
    hand, because the derived one builds the dense target: here the K entries go into the gradient
    itself, and besides it there is no array of [B, C]. The target is given, not learned.
    """
    return _forward(logits, index, prob, rest)[0]


def _forward(logits, index, prob, rest):
    # From the largest logit, so that what all have in common costs the sums no digits.
    largest = logits.max(-1, keepdims=True)
    x = logits.astype(jnp.float32) - largest
    log_total = jnp.log(jnp.exp(x).sum(-1))
    above = prob - rest[:, None]
    mass = above.sum(-1) + rest * x.shape[-1]
    stored = (above * jnp.take_along_axis(x, index, axis=-1)).sum(-1)
    loss = mass * log_total - stored - rest * x.sum(-1)
    return loss, (logits, largest, log_total, index, above, rest, mass)


def _backward(saved, grad):
    logits, largest, log_total, index, above, rest, mass = saved
    student = jnp.exp(logits.astype(jnp.float32) - largest - log_total[:, None])
    dense = grad[:, None] * (mass[:, None] * student - rest[:, None])
    # By rows, so that a batch cut over devices stays where it is.
    scattered = jax.vmap(lambda row, i, v: row.at[i].add(-v))(dense, index, grad[:, None] * above)
    return scattered.astype(logits.dtype), None, None, None


_cross_entropy.defvjp(_forward, _backward)


def retarget(prob: jax.Array, classes: int, power: float, tail: str
             ) -> tuple[jax.Array, jax.Array]:
    """Stored probabilities at another temperature, or without a tail.

    A softmax at temperature T is proportional to the power T0 / T of the one at T0. What the K
    classes leave over stands for C - K equal ones, each of which is raised to that power. A power
    below 1 magnifies the tail, and with it what nobody knows of it: that it is even, and how large
    it is below 1e-7. So where a high temperature is wanted, capture at it (store.temperature).

    Args:
        prob: float32 [B, K], >= 0, at least one above 0 in each row.
        classes: C.
        power: T0 / T, above 0.
        tail: "uniform", or "none": the other classes get nothing and the K all.

    Returns:
        float32 [B, K], and float32 [B] for each of the other classes: together they sum to 1.
    """
    others = classes - prob.shape[-1]
    left_over = jnp.maximum(1.0 - prob.sum(-1, keepdims=True), 0.0)
    if tail == "none" or not others:
        left_over = jnp.zeros_like(left_over)
    kept = power * _log(prob)
    each = power * (_log(left_over) - jnp.log(float(max(others, 1))))
    total = jax.nn.logsumexp(
        jnp.concatenate([kept, each + jnp.log(float(max(others, 1)))], -1), axis=-1, keepdims=True)
    return jnp.exp(kept - total), jnp.exp(each - total)[:, 0]


def _log(x: jax.Array) -> jax.Array:
    """Logarithm of probabilities, -inf for 0."""
    return jnp.where(x > 0, jnp.log(jnp.maximum(x, jnp.finfo(jnp.float32).tiny)), -jnp.inf)


def make_objective(temperature: float = 1.0, stored_temperature: float = 1.0,
                   tail: str = "uniform") -> Callable:
    """The distillation objective.

    Args:
        temperature: T, of the student's softmax and of the target.
        stored_temperature: T0, of the teacher's softmax when its targets were stored.
        tail: what the classes outside the top K get: "uniform" | "none".

    Returns:
        fn(apply, variables, batch, key) -> (loss, aux); see objectives/__init__.py.
    """
    power = stored_temperature / temperature

    def cross_entropy(logits: jax.Array, index: jax.Array, prob: jax.Array) -> jax.Array:
        if temperature != 1:
            logits = logits.astype(jnp.float32) / temperature
        if power == 1 and tail == "uniform":  # the target as it was stored
            loss = sparse_cross_entropy(logits, index, prob)
        else:
            loss = _cross_entropy(logits, index,
                                  *retarget(prob, logits.shape[-1], power, tail))
        return loss * temperature**2 if temperature != 1 else loss

    def objective(apply: Callable, variables: dict, batch: dict, key: jax.Array):
        logits, batch_stats = apply(variables, batch["image"], key)
        loss = cross_entropy(logits, batch["index"], batch["prob"])
        best = logits.argmax(-1)
        metrics = {
            "accuracy": (best == batch["label"]).mean(dtype=jnp.float32),
            "agreement": (best == batch["index"][:, 0]).mean(dtype=jnp.float32),
        }
        return loss.mean(), {"batch_stats": batch_stats, "metrics": metrics}

    return objective
