"""Accuracy of a model over an image set: every image once, whatever the batch or device count."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinyvit_jax import mesh as meshes
from tinyvit_jax import mix


def make_class_map(trained: tuple[str, ...], evaluated: tuple[str, ...]) -> np.ndarray | None:
    """Which of the model's classes each evaluated class is, by name; None where they are equal.

    Raises:
        ValueError: naming evaluated classes that the model does not have.
    """
    if tuple(trained) == tuple(evaluated):
        return None
    place = {name: i for i, name in enumerate(trained)}
    missing = [name for name in evaluated if name not in place]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(evaluated)} evaluation classes are not among the model's "
            f"{len(trained)}: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. Give "
            f"an evaluation set with the same class names by --config.data.eval_source.")
    return np.array([place[name] for name in evaluated], np.int32)


def make_eval_step(model, mesh: Mesh, mean: tuple[float, ...], std: tuple[float, ...],
                   class_map: np.ndarray | None = None) -> Callable:
    """A compiled fn(variables, batch) -> sums over the real rows of a batch.

    Args:
        model: the student or a teacher of ours.
        mesh: over which the batch is cut.
        mean: normalisation of pixels scaled to [0, 1].
        std: likewise.
        class_map: int32 [C'], to evaluate on some of the model's classes only; or None.

    Returns:
        fn giving {"count", "top1", "top5"} int32 and {"loss"} float32 scalars.
    """

    def eval_step(variables: dict, batch: dict) -> dict:
        images = mix.normalize(batch["image"], mean, std)
        logits = model.apply(variables, images, train=False)
        if class_map is not None:
            logits = logits[:, class_map]
        logp = jax.nn.log_softmax(logits.astype(jnp.float32))
        own = jnp.take_along_axis(logp, batch["label"][:, None], axis=-1)
        # Ties and NaN count against the model: a constant or broken output scores 0, not 100.
        rank = (~(logp < own)).sum(-1) - 1
        real = batch["weight"] > 0
        return {"count": real.sum(), "top1": (real & (rank < 1)).sum(),
                "top5": (real & (rank < 5)).sum(),
                "loss": jnp.where(real, -own[:, 0], 0.0).sum()}

    return jax.jit(eval_step, out_shardings=meshes.replicated(mesh))


def evaluate(eval_step: Callable, variables: dict, batches: Iterable, mesh: Mesh) -> dict:
    """Runs over all batches: {"top1", "top5"} in percent, {"loss"}, {"count"}."""
    sums = [eval_step(variables, meshes.put_batch(batch, mesh)) for batch in batches]
    total = {k: sum(s[k] for s in jax.device_get(sums)) for k in ("count", "top1", "top5", "loss")}
    count = int(total["count"])
    return {"top1": 100.0 * int(total["top1"]) / count, "top5": 100.0 * int(total["top5"]) / count,
            "loss": float(total["loss"]) / count, "count": count}
