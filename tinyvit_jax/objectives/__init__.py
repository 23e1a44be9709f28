"""Ways of learning, one a file, all of one signature.

An objective is fn(apply, variables, batch, key) -> (loss, aux). `apply(variables, images, key)`
runs the student in training mode and gives (logits [B, C], batch_stats); `batch["image"]` is mixed
and normalised; `loss` is a float32 scalar; `aux` holds "batch_stats" and "metrics", a dict of
float32 scalars to log.
"""

from collections.abc import Callable

import ml_collections

from tinyvit_jax.objectives import stored_logits, supervised


def make_objective(config: ml_collections.ConfigDict, stored_temperature: float = 1.0,
                   tail: str = "uniform") -> Callable:
    """The objective of a run.

    Args:
        config: the `objective` section.
        stored_temperature: of the teacher's softmax when its targets were stored.
        tail: of the store: "uniform" or "none".
    """
    if config.name == "supervised":
        return supervised.make_objective(config.smoothing)
    return stored_logits.make_objective(config.temperature, stored_temperature, tail)
