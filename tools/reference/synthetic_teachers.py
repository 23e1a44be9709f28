"""Teachers that are made up, their top-K targets, and what it costs to store those inexactly.

Three kinds. "peaked" and "flat" have probabilities of a power law of the rank, 4.0 and 0.8, over
classes in an order of each view's own. "prototypes" is the likely one: classes are directions in
512 dimensions, gathered in groups as kinds of a thing are; a view is its class's direction and
noise, more of it in hard views; its logits are the products with every class. So whatever is
confused with a class comes from few others, and easy and hard views stand side by side. Classes are
numbered at random: neighbours in a list are no likelier to be confused, which a real list has.
"""

import dataclasses

import numpy as np

KINDS = ("prototypes", "peaked", "flat")
STUDIED = 512  # views, of the first of a teacher, that have a student

_POWER = {"peaked": 4.0, "flat": 0.8}
_WIDTH = 512
_OWN = 0.8  # length of a class's own part beside its group's, which has length 1
_NOISE = 1.5, 4.5  # lengths of the noise of the easiest and of the hardest view
_SCALE = 15.0  # of the products of unit length
_ROWS = 512  # views at a time


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The targets of a number of views."""

    name: str
    classes: int  # C
    index: np.ndarray  # int32 [n, K]
    prob: np.ndarray  # float32 [n, K], descending
    # Squared length of the loss gradient by the logits, p - q, for each of the first STUDIED views:
    untrained: np.ndarray  # q is 1/C
    trained: np.ndarray  # q is a student's that is close: the teacher's logits and normal noise
    student_kl: float  # nats from the target to that student, mean


def make_teacher(name: str, views: int, classes: int, top_k: int) -> Teacher:
    """Draws a teacher's views; the same ones each time.

    Args:
        name: one of KINDS.
        views: n.
        classes: C.
        top_k: K, below C.
    """
    generator = np.random.default_rng(0)
    prototypes = _prototypes(classes, generator) if name == "prototypes" else None
    parts = []
    for start in range(0, views, _ROWS):
        rows = min(_ROWS, views - start)
        logits = (_likely(prototypes, rows, generator) if prototypes is not None else
                  _power_law(_POWER[name], rows, classes, generator))
        index, prob = _top(_softmax(logits), top_k)
        if not start:
            studied = _study(logits, index, prob, generator)
        parts.append((index, prob))
    index, prob = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Teacher(name, classes, index, prob, *studied)


def _prototypes(classes: int, generator: np.random.Generator) -> np.ndarray:
    """Unit vectors in groups of about sqrt(C): float32 [C, 512]."""
    groups = round(np.sqrt(classes))
    centre = generator.standard_normal((groups, _WIDTH), np.float32)
    own = generator.standard_normal((classes, _WIDTH), np.float32)
    vectors = centre[generator.integers(0, groups, classes)] + np.float32(_OWN) * own
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _likely(prototypes: np.ndarray, views: int, generator: np.random.Generator) -> np.ndarray:
    label = generator.integers(0, len(prototypes), views)
    noise = generator.standard_normal((views, _WIDTH), np.float32) / np.float32(np.sqrt(_WIDTH))
    length = generator.uniform(*_NOISE, (views, 1)).astype(np.float32)
    return np.float32(_SCALE) * (prototypes[label] + length * noise) @ prototypes.T


def _power_law(power: float, views: int, classes: int, generator: np.random.Generator
               ) -> np.ndarray:
    logits = -power * np.log(np.arange(1, classes + 1, dtype=np.float32))
    noise = generator.standard_normal((views, classes), np.float32) / 2
    return generator.permuted(np.tile(logits, (views, 1)), axis=1) + noise


def _softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def _top(prob: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The K most probable classes, descending."""
    index = np.argpartition(prob, -top_k, axis=1)[:, -top_k:]
    kept = np.take_along_axis(prob, index, 1)
    order = np.argsort(-kept, axis=1, kind="stable")
    return (np.take_along_axis(index, order, 1).astype(np.int32),
            np.take_along_axis(kept, order, 1))


def _study(logits: np.ndarray, index: np.ndarray, prob: np.ndarray,
           generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """The last three fields of a Teacher."""
    classes, top_k = logits.shape[1], prob.shape[1]
    left = 1 - prob.sum(1, dtype=np.float64, keepdims=True)
    target = np.repeat(left / (classes - top_k), classes, axis=1)
    np.put_along_axis(target, index, prob, 1)
    student = _softmax(logits.astype(np.float64) + generator.standard_normal(logits.shape))
    divergence = (target * np.log(np.maximum(target, 1e-300) / student)).sum(1)
    return (np.square(target - 1 / classes).sum(1), np.square(target - student).sum(1),
            float(divergence.mean()))


def measure_error(teacher: Teacher, index: np.ndarray, prob: np.ndarray) -> dict[str, float | None]:
    """What storing a teacher's targets has changed about them.

    Args:
        teacher: what was stored.
        index: classes as they were read, integers [n, K], the same in each view in any order.
        prob: their probabilities as they were read, floats [n, K].

    Returns:
        kl: nats from the dense original target to the dense stored one, mean over the views where
            it is finite, None without any. kl_infinite: share of the others, where the stored
            target gives nothing (or less) to a class that the teacher gives something, within the
            K or outside; the loss stays finite there. untrained, trained: length of the gradient's
            error against the gradient's, root of the mean square, for the two students.

    Raises:
        ValueError: the classes are others.
    """
    where, p = _by_class(teacher.index, teacher.prob)
    where_again, q = _by_class(index, prob)
    if not np.array_equal(where, where_again):
        raise ValueError("the classes that were read are not those that were written")
    a, b = 1 - p.sum(1), 1 - q.sum(1)
    possible = ((b > 0) | (a <= 0)) & ((q > 0) | (p <= 0)).all(1)
    p_safe, q_safe = np.maximum(p, 1e-300), np.maximum(q, 1e-300)
    tail = a * np.log(np.maximum(a, 1e-300) / np.maximum(b, 1e-300)) * (a > 0)
    kl = (p * np.log(p_safe / q_safe)).sum(1) + tail
    error = np.square(p - q).sum(1) + np.square(a - b) / (teacher.classes - p.shape[1])
    error = error[: len(teacher.trained)].sum()
    return {"kl": float(kl[possible].mean()) if possible.any() else None,
            "kl_infinite": float(1 - possible.mean()),
            "untrained": float(np.sqrt(error / teacher.untrained.sum())),
            "trained": float(np.sqrt(error / teacher.trained.sum()))}


def _by_class(index: np.ndarray, prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes int64 [n, K] in ascending order and their probabilities in float64."""
    order = np.argsort(index, axis=1)
    return (np.take_along_axis(index, order, 1).astype(np.int64),
            np.take_along_axis(prob, order, 1).astype(np.float64))
