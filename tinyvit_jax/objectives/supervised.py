"""Learning from labels: cross-entropy with label smoothing, mixed in pairs where the views are."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def make_objective(smoothing: float) -> Callable:
    """The supervised objective.

    Args:
        smoothing: label mass spread over all classes, in [0, 1).

    Returns:
        fn(apply, variables, batch, key) -> (loss, aux); see objectives/__init__.py.
    """

    def objective(apply: Callable, variables: dict, batch: dict, key: jax.Array):
        logits, batch_stats = apply(variables, batch["image"], key)
        loss = label_loss(logits, batch, smoothing)
        metrics = {"accuracy": (logits.argmax(-1) == batch["label"]).mean(dtype=jnp.float32)}
        return loss.mean(), {"batch_stats": batch_stats, "metrics": metrics}

    return objective


def label_loss(logits: jax.Array, batch: Mapping[str, Any], smoothing: float) -> jax.Array:
    """Cross-entropy with the labels of a batch, smoothed, and mixed where its views are.

    Args:
        logits: [B, C], any float dtype.
        batch: "label" int32 [B]; "lam" float32 [B/2] where pairs are mixed.
        smoothing: label mass spread over all classes, in [0, 1).

    Returns:
        float32 [B].
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    own = batch["label"]
    loss = _nll(logp, own)
    if "lam" in batch:
        partner = own.reshape(-1, 2)[:, ::-1].reshape(-1)
        lam = jnp.repeat(batch["lam"], 2)
        loss = lam * loss + (1 - lam) * _nll(logp, partner)
    return (1 - smoothing) * loss - smoothing * logp.mean(-1)


def _nll(logp: jax.Array, label: jax.Array) -> jax.Array:
    """Negative log-probability of the labels: [B, C], [B] -> [B]."""
    return -jnp.take_along_axis(logp, label[:, None], axis=-1)[:, 0]
