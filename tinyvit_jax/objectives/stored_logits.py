"""Learning from a stored teacher: cross-entropy with its top K classes and a uniform tail.

TinyViT section 3.1: the K stored probabilities stand, and what they leave over is spread evenly
over the other C - K classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def sparse_cross_entropy(logits: jax.Array, index: jax.Array, prob: jax.Array) -> jax.Array:
    """Cross-entropy with a sparse target, without ever building the dense one.

    With rest = (1 - sum_k v_k) / (C - K) the dense sum splits into
    -(sum_k (v_k - rest) logp[i_k] + rest sum_c logp_c).

    Args:
        logits: [B, C], any float dtype.
        index: int32 [B, K], distinct classes in each row.
        prob: float32 [B, K], their probabilities.

    Returns:
        float32 [B].
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    classes, kept = logits.shape[-1], index.shape[-1]
    left_over = jnp.maximum(1.0 - prob.sum(-1), 0.0)
    rest = left_over / max(classes - kept, 1) if classes > kept else jnp.zeros_like(left_over)
    stored = ((prob - rest[:, None]) * jnp.take_along_axis(logp, index, axis=-1)).sum(-1)
    return -(stored + rest * logp.sum(-1))


def make_objective() -> Callable:
    """The distillation objective; fn(apply, variables, batch, key) -> (loss, aux)."""

    def objective(apply: Callable, variables: dict, batch: dict, key: jax.Array):
        logits, batch_stats = apply(variables, batch["image"], key)
        loss = sparse_cross_entropy(logits, batch["index"], batch["prob"])
        best = logits.argmax(-1)
        metrics = {
            "accuracy": (best == batch["label"]).mean(dtype=jnp.float32),
            "agreement": (best == batch["index"][:, 0]).mean(dtype=jnp.float32),
        }
        return loss.mean(), {"batch_stats": batch_stats, "metrics": metrics}

    return objective
