"""How fine a block is stored: the step of its levels, so that no error grows beyond its bound.

Levels are steps of sqrt(p). To second order an error d there costs 2 d^2 of divergence.
"""

import numpy as np

ODDS = 128, 512  # steps an octave of the odds left-over : kept, half a step is 0.3 % or 0.07 %

_KL = 4.8e-5  # nats, expected divergence of decoded from original targets in compact mode
_GRADIENT = 0.0095  # error of the loss gradient by the logits over a block, of an untrained student
_FINEST = 256  # times the step may be finer for the sake of the gradient
_ROUGH, _UNDERSTATED = 5, 0.15  # below this level, 2 d^2 may lack this part of the divergence


def quantize(prob: np.ndarray, total: np.ndarray, classes: int
             ) -> tuple[np.ndarray, float, np.ndarray]:
    """Levels of a block, their step, and the mass of each view's classes of level 0.

    An error d in sqrt(p) costs 2 d^2 of divergence, and changes the target, and so the gradient, by
    2 d sqrt(p); d^2 is step^2 / 12 on average. But averages do not hold for views that are all
    alike, so the errors are measured, and the step is made finer until they are small enough.

    Args:
        prob: float32 [n, K], at least 0.
        total: float64 [n], their sums, above 0.
        classes: C.

    Returns:
        uint16 [n, K], the step as float32 holds it, float64 [n].
    """
    root = np.sqrt(prob)
    gradient = _gradient_norm(prob, total, classes)
    coarse = np.sqrt(6 * _KL / prob.shape[1])
    fine = _GRADIENT * np.sqrt(3 * gradient / total.sum())
    lowest = np.sqrt(prob.max()) / 65_000  # a level is 16 bits wide
    step = max(np.clip(fine, coarse / _FINEST, coarse), lowest)
    while True:
        step = float(np.float32(step))
        level = np.rint(root * np.float32(1 / step))
        error = level * np.float32(step)
        error -= root
        code = level.astype(np.uint16)
        divergence, small = 2 * float(np.vdot(error, error)), np.zeros(len(prob))
        if code.min() < _ROUGH:
            low = np.where(code < _ROUGH, error, 0)
            divergence += _UNDERSTATED * 2 * float(np.vdot(low, low))
        if not code.all():
            zero = code == 0
            divergence -= (1 + _UNDERSTATED) * 2 * float(prob[zero].sum())  # no such errors
            small = np.where(zero, prob, 0).sum(1, dtype=np.float64)
            divergence += _divergence_of_mean(prob, zero, small)
        error *= root
        spoilt = 4 * np.vdot(error, error) > (1.02 * _GRADIENT) ** 2 * gradient
        if step * 0.95 <= max(lowest, coarse / _FINEST) or not (
                spoilt or divergence > 1.02 * _KL * len(prob)):
            return code, step, small
        step *= 0.95


def _gradient_norm(prob: np.ndarray, total: np.ndarray, classes: int) -> float:
    """The squared norm of p - 1/C over a block, the gradient of a student that knows nothing.

    It counts the classes outside the K too, at their even share of what is left over.
    """
    k = prob.shape[1]
    kept = float(np.vdot(prob, prob)) - (2 * total.sum() - len(prob) * k / classes) / classes
    rest = max(classes - k, 1)
    left = np.maximum(1 - total, 0) / rest if k < classes else 1 / classes
    return max(kept, 0.0) + float((rest * np.square(left - 1 / classes)).sum())


def odds_steps(prob: np.ndarray, total: np.ndarray, classes: int) -> int:
    """Steps an octave of the odds: more where what the teacher keeps is nearly even.

    Rounding the odds changes the kept mass by a share of it times what is left over, and that
    changes the gradient; next to the gradient of an even target, little is much.
    """
    if prob.shape[1] == classes:
        return ODDS[0]
    left = np.maximum(1 - total, 0)
    squares = np.einsum("nk,nk->n", prob, prob)
    change = np.square(left) * (squares + np.square(total) / (classes - prob.shape[1]))
    share = np.log(2) / ODDS[0] / np.sqrt(12)  # of an odds, rounded: the mean error
    spoilt = share**2 * change.sum() > (0.2 * _GRADIENT)**2 * _gradient_norm(prob, total, classes)
    return ODDS[1] if spoilt else ODDS[0]


def _divergence_of_mean(prob: np.ndarray, zero: np.ndarray, small: np.ndarray) -> float:
    """What it costs to take each view's classes of level 0 as alike, summed over the views."""
    mean = np.repeat(small / np.maximum(zero.sum(1), 1), zero.sum(1))
    p = prob[zero].astype(np.float64)
    return float((p * np.log(np.where(p > 0, p / np.where(p > 0, mean, 1), 1))).sum())
