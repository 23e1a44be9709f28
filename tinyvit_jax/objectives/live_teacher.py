"""Learning from a teacher that runs beside the student, and from the labels.

Its answers come with the batch: "log_prob" float32 [B, C], the log of the teacher's probability of
each class at temperature T, for the very pixels that the student sees (tinyvit_jax/live.py).

    soft: (1 - alpha) CE(label, student) + alpha T^2 KL(teacher_T || student_T)
    hard: (1 - alpha) CE(label, student) + alpha CE(the teacher's top class, student)

Soft: Hinton et al. 2015 (arXiv 1503.02531), section 2, and DeiT (Touvron et al. 2021, arXiv
2012.12877), equation 2; hard: DeiT, equation 3, and G2SD (arXiv 2302.14771), section 2.3 of its
released code. A student with a distillation token learns the labels with its class head and the
teacher with its distillation head; of any other student one head learns both. All are means over
the views: DeiT's released code divides the soft term by the number of classes besides, so its
alpha stands for a far smaller one here.

KL and not the cross-entropy of stored_logits, as the papers write it: it is 0 for a student that
agrees. The two differ by the teacher's entropy, which no weight changes: CE = KL + entropy. Both
are among the metrics, so that losses of a live and of a stored teacher can be compared.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tinyvit_jax.objectives.supervised import label_loss


def divergence(logits: jax.Array, log_prob: jax.Array, temperature: float = 1.0) -> jax.Array:
    """KL(teacher || student) in nats, both at temperature T, without the factor T^2.

    Args:
        logits: of the student, [B, C], any float dtype.
        log_prob: float32 [B, C], of the teacher, at temperature T already; -inf is a class that
            is impossible to it.
        temperature: T, above 0.

    Returns:
        float32 [B], 0 or more.
    """
    student = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    return (_weigh(log_prob, log_prob) - _weigh(log_prob, student)).sum(-1)


def entropy(log_prob: jax.Array) -> jax.Array:
    """Of each row's distribution, in nats: float32 [B, C] -> float32 [B], from 0 to log C."""
    return -_weigh(log_prob, log_prob).sum(-1)


def _weigh(log_prob: jax.Array, values: jax.Array) -> jax.Array:
    """Values by the probability of their class; one of probability 0 counts for nothing."""
    prob = jnp.exp(log_prob)
    return jnp.where(prob > 0, prob * jnp.where(prob > 0, values, 0.0), 0.0)


def make_objective(alpha: float, kind: str = "soft", temperature: float = 1.0,
                   smoothing: float = 0.0, two_heads: bool = False) -> Callable:
    """The objective of a live teacher.

    Args:
        alpha: weight of the teacher, in [0, 1]; that of the labels is 1 - alpha.
        kind: "soft" or "hard".
        temperature: T, of both softmaxes in the soft term.
        smoothing: label mass spread over all classes, in [0, 1); the teacher's is not smoothed.
        two_heads: the student has a distillation token: `apply(..., "answers")` gives the logits
            of its class head and of its distillation head.

    Returns:
        fn(apply, variables, batch, key) -> (loss, aux); see objectives/__init__.py. Metrics:
        "accuracy" and "agreement" (with the teacher's top class) of the student's answer, which is
        the mean of two heads' logits; "kl" of the head that learns from the teacher, and
        "teacher_entropy", in nats, at T.

    Raises:
        ValueError: one of two heads would learn nothing.
    """
    if two_heads and not 0 < alpha < 1:
        idle = "distillation" if alpha == 0 else "class"
        raise ValueError(f"--config.objective.alpha={alpha} cannot work for a student with a "
                         f"distillation token: its {idle} head would learn nothing. Give a number "
                         f"between 0 and 1, such as 0.5.")

    def objective(apply: Callable, variables: dict, batch: dict, key: jax.Array):
        if two_heads:
            (own, taught), batch_stats = apply(variables, batch["image"], key, "answers")
            answer = (own.astype(jnp.float32) + taught.astype(jnp.float32)) / 2
        else:
            answer, batch_stats = apply(variables, batch["image"], key)
            own = taught = answer
        log_prob = batch["log_prob"]
        best, kl = log_prob.argmax(-1), divergence(taught, log_prob, temperature)
        teaching = temperature**2 * kl if kind == "soft" else label_loss(
            taught, {"label": best}, 0.0)
        loss = alpha * teaching
        if alpha < 1:
            loss = loss + (1 - alpha) * label_loss(own, batch, smoothing)
        top = answer.argmax(-1)
        metrics = {"accuracy": (top == batch["label"]).mean(dtype=jnp.float32),
                   "agreement": (top == best).mean(dtype=jnp.float32),
                   "kl": kl.mean(), "teacher_entropy": entropy(log_prob).mean()}
        return loss.mean(), {"batch_stats": batch_stats, "metrics": metrics}

    return objective
