"""What a model says of every image of a set, once each, whatever the batch or device count.

The compiled step judges row by row and the host adds up, so figures that need the rows (confusion,
calibration, single classes) and plain accuracy come from the same numbers.
"""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinyvit_jax import mesh as meshes
from tinyvit_jax import mix, onednn

logger = logging.getLogger("tinyvit_jax")

MAX_MISSING = 0.01  # of the evaluated classes: ImageNet-22k lacks one of ImageNet-1k's
BROKEN = np.iinfo(np.int32).max  # the rank where the output is NaN, however few the classes
_IN_FLIGHT = 4  # batches: more would only fill the device's memory


class Judged(NamedTuple):
    """The model's answer for each of N images, in the order of their source."""

    label: np.ndarray  # int32 [N]; -1 = the image has no label and is left out of every score
    predicted: np.ndarray  # int32 [N]; -1 = none: several classes tie at the top, or a NaN
    confidence: np.ndarray  # float32 [N], the largest probability; NaN for a broken output
    rank: np.ndarray  # int32 [N], wrong classes no less probable than the best right one; or BROKEN
    loss: np.ndarray  # float32 [N], -log of the probability of all right classes together


def make_class_map(trained: tuple[str, ...], evaluated: tuple[str, ...],
                   max_missing: float = MAX_MISSING) -> np.ndarray | None:
    """Which of the model's classes each evaluated class is, by name; None where they are equal.

    Args:
        trained: names of the model's classes, in order.
        evaluated: names of the evaluation set's classes, in order.
        max_missing: share of `evaluated` that the model may lack. Such a class gets the logit 0,
            as in the original's RemapLayer.

    Returns:
        int32 [len(evaluated)], -1 for a class that the model lacks; or None.

    Raises:
        ValueError: naming the evaluated classes that are missing, where they are too many.
    """
    if tuple(trained) == tuple(evaluated):
        return None
    if len(set(trained)) < len(trained) or len(set(evaluated)) < len(evaluated):
        raise ValueError("Classes are matched by name, and of the model's or of the evaluation "
                         "set's some have the same name. Give names that differ, for instance "
                         "WordNet ids, by --config.model.class_names=FILE.")
    place = {name: i for i, name in enumerate(trained)}
    missing = [name for name in evaluated if name not in place]
    if len(missing) > max_missing * len(evaluated):
        raise ValueError(
            f"{len(missing)} of the {len(evaluated)} evaluation classes are not among the model's "
            f"{len(trained)}: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''} (the "
            f"model has {', '.join(trained[:3])} ...). Give an evaluation set with the same class "
            f"names by --config.data.eval_source, or the names of the model's classes, where it is "
            f"a PyTorch file, by --config.model.class_names=FILE.")
    if missing:
        logger.warning("The model lacks %d of the %d evaluation classes, which get the logit 0: %s",
                       len(missing), len(evaluated), ", ".join(missing))
    return np.array([place.get(name, -1) for name in evaluated], np.int32)


def make_eval_step(model, mesh: Mesh, mean: tuple[float, ...], std: tuple[float, ...],
                   class_map: np.ndarray | None = None,
                   competing: np.ndarray | None = None) -> Callable:
    """A compiled fn(variables, batch) -> the answers for the rows of a batch, on every device.

    Args:
        model: the student or a teacher of ours.
        mesh: over which the batch is cut.
        mean: normalisation of pixels scaled to [0, 1].
        std: likewise.
        class_map: int32 [C'], to evaluate on some of the model's classes only; or None.
        competing: bool [C'], the classes that an answer is chosen from; or None for all.

    Returns:
        fn giving the fields of `Judged` and "weight" (1 for a real row, 0 for padding), each [B].
    """

    def eval_step(variables: dict, batch: dict) -> dict:
        images = mix.normalize(batch["image"], mean, std)
        logits = model.apply(variables, images, train=False).astype(jnp.float32)
        if class_map is not None:
            if (class_map < 0).any():  # -1 is the last column: the logit 0 of a missing class
                logits = jnp.pad(logits, ((0, 0), (0, 1)))
            logits = logits[:, class_map]
        if competing is not None:
            logits = jnp.where(competing, logits, -jnp.inf)
        return {**_judge(logits, batch), "weight": batch["weight"]}

    return onednn.jit(eval_step, out_shardings=meshes.replicated(mesh))


def _judge(logits: jax.Array, batch: dict) -> dict:
    """Compares logits [B, C] with the label, or with any of the labels, of each row."""
    labels = batch["labels"] if "labels" in batch else batch["label"][:, None]
    given = labels >= 0
    own = jnp.where(given, jnp.take_along_axis(logits, jnp.maximum(labels, 0), axis=-1), -jnp.inf)
    best, top, whole = own.max(-1), logits.max(-1), jax.nn.logsumexp(logits, axis=-1)
    confidence = jnp.exp(top - whole)
    # Ties and NaN count against the model: a constant or broken output scores 0, not 100.
    rank = (~(logits < best[:, None])).sum(-1) - (given & ~(own < best[:, None])).sum(-1)
    rank = jnp.where(jnp.isnan(confidence), BROKEN, rank)
    # The first and the last class at the top: two plain sums, on a CPU far faster than an arg max.
    place, at_top = jnp.arange(logits.shape[-1]), logits == top[:, None]
    first, last = jnp.where(at_top, place, BROKEN).min(-1), jnp.where(at_top, place, -1).max(-1)
    answered = (rank == 0) | ((first == last) & (rank < BROKEN))
    return {"label": jnp.where(given.any(-1), batch["label"], -1),
            "predicted": jnp.where(answered, first, -1).astype(jnp.int32),
            "confidence": confidence, "rank": rank.astype(jnp.int32),
            "loss": whole - jax.nn.logsumexp(own, axis=-1)}


def evaluate(eval_step: Callable, variables: dict, batches: Iterable, mesh: Mesh,
             progress: Callable[[], None] = lambda: None) -> Judged:
    """Runs over all batches and gives the answers for the real rows.

    Args:
        eval_step: from `make_eval_step`.
        variables: {"params", "batch_stats"}, on every device.
        batches: this process's rows of every batch.
        mesh: over which batches are cut.
        progress: called once a batch.
    """
    found: list[dict] = []
    for batch in batches:
        found.append(eval_step(variables, meshes.put_batch(batch, mesh)))
        progress()
        if len(found) > _IN_FLIGHT:
            jax.block_until_ready(found[-1 - _IN_FLIGHT]["rank"])
    parts = jax.device_get(found)
    whole = {k: np.concatenate([p[k] for p in parts]) for k in (*Judged._fields, "weight")}
    return Judged(*(whole[k][whole["weight"] > 0] for k in Judged._fields))


def score(judged: Judged) -> dict:
    """Adds up in float64: {"top1", "top5"} in percent, {"loss"}, {"count"} of images with a label.

    Raises:
        ValueError: no image has a label.
    """
    kept = judged.label >= 0
    count = int(kept.sum())
    if not count:
        raise ValueError(f"None of the {len(kept)} evaluation images has a label: there is nothing "
                         f"to score. Choose another set by --config.data.eval_source.")
    rank = judged.rank[kept]
    return {"top1": 100.0 * int((rank < 1).sum()) / count,
            "top5": 100.0 * int((rank < 5).sum()) / count,
            "loss": float(judged.loss[kept].sum(dtype=np.float64)) / count, "count": count}
