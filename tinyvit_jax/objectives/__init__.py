"""Ways of learning, one a file, all of one signature.

An objective is fn(apply, variables, batch, key) -> (loss, aux). `apply(variables, images, key)`
runs the student in training mode and gives (logits [B, C], batch_stats), or with a fourth argument
what its method of that name gives in place of logits; `batch["image"]` is mixed and normalised;
`loss` is a float32 scalar; `aux` holds "batch_stats" and "metrics", a dict of float32 scalars to
log.
"""

from collections.abc import Callable

import ml_collections

from tinyvit_jax.objectives import live_teacher, stored_logits, supervised


def make_objective(config: ml_collections.ConfigDict, stored_temperature: float = 1.0,
                   tail: str = "uniform", two_heads: bool = False) -> Callable:
    """The objective of a run.

    Args:
        config: the `objective` section.
        stored_temperature: of the teacher's softmax when its targets were stored.
        tail: of the store: "uniform" or "none".
        two_heads: whether the student has a distillation token, which learns from a live teacher.
    """
    if config.name == "supervised":
        return supervised.make_objective(config.smoothing)
    if config.name == "live_teacher":
        return live_teacher.make_objective(config.alpha, config.kind, config.temperature,
                                           config.smoothing, two_heads)
    return stored_logits.make_objective(config.temperature, stored_temperature, tail)
