"""The objective of a live teacher against dense float64 and torch, one head and two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvit_jax import config as configs
from tinyvit_jax import objectives
from tinyvit_jax.objectives import live_teacher, stored_logits, supervised

CLASSES, ROWS, SMOOTHING = 7, 6, 0.1


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def draw(seed, scale=2.0, rows=ROWS, classes=CLASSES):
    return (scale * np.random.default_rng(seed).normal(size=(rows, classes))).astype(np.float32)


def make_batch(temperature=1.0, mixed=True, teacher=None):
    """A batch whose "image" are the student's logits; those of the class head come first."""
    teacher = draw(1, 3.0) if teacher is None else teacher
    batch = {"label": np.array([0, 1, 2, 2, 6, 3], np.int32),
             "log_prob": log_softmax(teacher / temperature).astype(np.float32)}
    return batch | ({"lam": np.array([0.7, 0.2, 1.0], np.float32)} if mixed else {})


def apply_one(variables, images, key, method=None):
    assert method is None
    return variables, {"new": key}


def apply_two(variables, images, key, method=None):
    """A student with a distillation token; without a method it would answer by the mean."""
    assert method == "answers"
    return (variables["class"], variables["taught"]), {"new": key}


def run(objective, apply, logits, batch):
    """(loss, gradient by the logits, metrics)."""
    def loss(x):
        value, aux = objective(apply, x, {**batch, "image": None}, jax.random.key(0))
        return value, aux["metrics"]

    (value, metrics), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    return float(value), grad, {k: float(v) for k, v in metrics.items()}


def label_target(batch):
    """Smoothed and mixed, dense, as the paper's recipes have it."""
    eye, label = np.eye(CLASSES), batch["label"]
    own = eye[label]
    if "lam" in batch:
        lam = np.repeat(batch["lam"], 2)[:, None].astype(np.float64)
        own = lam * own + (1 - lam) * eye[label.reshape(-1, 2)[:, ::-1].reshape(-1)]
    return (1 - SMOOTHING) * own + SMOOTHING / CLASSES


def dense(class_logits, taught_logits, batch, alpha, kind, temperature):
    """The loss in float64, written down as in the papers."""
    labels = -(label_target(batch) * log_softmax(class_logits)).sum(-1)
    teacher = batch["log_prob"].astype(np.float64)
    if kind == "soft":
        student = log_softmax(taught_logits / temperature)
        teaching = temperature**2 * (np.exp(teacher) * (teacher - student)).sum(-1)
    else:
        teaching = -np.take_along_axis(log_softmax(taught_logits),
                                       teacher.argmax(-1)[:, None], -1)[:, 0]
    return ((1 - alpha) * labels + alpha * teaching).mean()


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize(("alpha", "kind", "temperature"), [
    (0.5, "soft", 1.0), (0.9, "soft", 4.0), (1.0, "soft", 0.5), (0.5, "hard", 1.0),
    (1.0, "hard", 1.0), (0.0, "soft", 2.0)])
def test_loss_is_the_dense_one(alpha, kind, temperature, mixed):
    batch, logits = make_batch(temperature, mixed), draw(0)
    objective = live_teacher.make_objective(alpha, kind, temperature, SMOOTHING)
    loss, grad, metrics = run(objective, apply_one, logits, batch)
    expected = dense(logits, logits, batch, alpha, kind, temperature)
    assert loss == pytest.approx(expected, rel=1e-5)
    step = 1e-4
    for row, column in ((0, 0), (3, 5)):
        moved = logits.astype(np.float64)
        moved[row, column] += step
        slope = (dense(moved, moved, batch, alpha, kind, temperature) - expected) / step
        assert grad[row, column] == pytest.approx(slope, abs=2e-4)
    prob = np.exp(batch["log_prob"].astype(np.float64))
    assert metrics["teacher_entropy"] == pytest.approx(
        -(prob * np.log(prob)).sum(-1).mean(), rel=1e-5)
    kl = dense(logits, logits, batch, 1.0, "soft", temperature) / temperature**2
    assert metrics["kl"] == pytest.approx(kl, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(-1) == batch["label"]).mean())
    assert metrics["agreement"] == pytest.approx(
        (logits.argmax(-1) == batch["log_prob"].argmax(-1)).mean())


@pytest.mark.torch
@pytest.mark.parametrize("two_heads", [False, True])
@pytest.mark.parametrize(("alpha", "kind", "temperature"), [
    (0.1, "soft", 3.0), (0.5, "hard", 1.0), (0.7, "soft", 1.0)])
def test_loss_and_gradients_are_torchs(alpha, kind, temperature, two_heads):
    """DeiT's equations 2 and 3 as torch writes them, with a teacher's own log-probabilities."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    batch = make_batch(temperature)
    heads = [torch.tensor(draw(seed), requires_grad=True) for seed in (0, 5)]
    own, taught = heads if two_heads else (heads[0], heads[0])
    target = torch.tensor(label_target(batch), dtype=torch.float32)
    teacher = torch.tensor(draw(1, 3.0))
    labels = F.cross_entropy(own, target)
    if kind == "soft":
        teaching = temperature**2 * F.kl_div(
            F.log_softmax(taught / temperature, -1), F.log_softmax(teacher / temperature, -1),
            reduction="batchmean", log_target=True)
    else:
        teaching = F.cross_entropy(taught, teacher.argmax(-1))
    expected = (1 - alpha) * labels + alpha * teaching
    expected.backward()

    objective = live_teacher.make_objective(alpha, kind, temperature, SMOOTHING, two_heads)
    if two_heads:
        logits = {"class": draw(0), "taught": draw(5)}
        loss, grad, _ = run(objective, apply_two, logits, batch)
        found = [grad["class"], grad["taught"]]
    else:
        loss, grad, _ = run(objective, apply_one, draw(0), batch)
        found = [grad]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for head, gradient in zip(heads, found, strict=False):
        np.testing.assert_allclose(gradient, head.grad.numpy(), atol=1e-6)


@pytest.mark.torch
def test_smoothing_and_mixing_are_torchs():
    """torch smooths the labels of each half; mixed afterwards that is the same target."""
    torch = pytest.importorskip("torch")
    batch, x = make_batch(), torch.tensor(draw(0), requires_grad=True)
    label = torch.tensor(batch["label"].astype(np.int64))
    partner = label.reshape(-1, 2).flip(-1).reshape(-1)
    lam = torch.tensor(np.repeat(batch["lam"], 2))
    each = [torch.nn.functional.cross_entropy(x, y, label_smoothing=SMOOTHING, reduction="none")
            for y in (label, partner)]
    expected = (lam * each[0] + (1 - lam) * each[1]).mean()
    expected.backward()
    loss, grad, _ = run(live_teacher.make_objective(0.0, "soft", 1.0, SMOOTHING), apply_one,
                        draw(0), batch)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-6)


def test_two_heads_learn_apart_and_answer_together():
    batch = make_batch()
    logits = {"class": draw(0), "taught": draw(5)}
    objective = live_teacher.make_objective(0.5, "soft", 1.0, SMOOTHING, two_heads=True)
    loss, grad, metrics = run(objective, apply_two, logits, batch)
    assert loss == pytest.approx(dense(draw(0), draw(5), batch, 0.5, "soft", 1.0), rel=1e-5)
    other = {**batch, "log_prob": log_softmax(draw(9)).astype(np.float32)}
    changed = run(objective, apply_two, logits, other)[1]
    np.testing.assert_array_equal(grad["class"], changed["class"])  # which knows no teacher
    assert (grad["taught"] != changed["taught"]).any()
    other = {**batch, "label": (batch["label"] + 1) % CLASSES}
    changed = run(objective, apply_two, logits, other)[1]
    np.testing.assert_array_equal(grad["taught"], changed["taught"])  # which knows no label
    best = (draw(0) + draw(5)).argmax(-1)
    assert metrics["accuracy"] == pytest.approx((best == batch["label"]).mean())
    assert metrics["agreement"] == pytest.approx((best == batch["log_prob"].argmax(-1)).mean())


@pytest.mark.parametrize(("alpha", "idle"), [(1.0, "class"), (0.0, "distillation")])
def test_two_heads_need_both_to_learn(alpha, idle):
    with pytest.raises(ValueError, match=rf"alpha={alpha} cannot work.* its {idle} head"):
        live_teacher.make_objective(alpha, two_heads=True)


def test_without_labels_they_do_not_count():
    batch = make_batch()
    nobody = {**batch, "label": np.full(ROWS, 5, np.int32), "lam": np.full(3, np.nan, np.float32)}
    objective = live_teacher.make_objective(1.0, "soft", 2.0, SMOOTHING)
    for a, b in zip(run(objective, apply_one, draw(0), batch)[:2],
                    run(objective, apply_one, draw(0), nobody)[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    with jax.disable_jit():  # operation by operation: two programs may round in two ways
        alone = run(supervised.make_objective(SMOOTHING), apply_one, draw(0), batch)
        without = run(live_teacher.make_objective(0.0, "soft", 1.0, SMOOTHING), apply_one, draw(0),
                      batch)
    assert without[0] == alone[0]
    np.testing.assert_array_equal(without[1], alone[1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sure_teacher_and_a_sure_student_stay_finite(dtype):
    sure = np.full((ROWS, CLASSES), -np.inf, np.float32)
    sure[:, 2] = 0
    sure[0] = log_softmax(1e4 * draw(3, rows=1))  # all but one underflow
    batch = {**make_batch(mixed=False), "log_prob": sure}
    logits = jnp.asarray(40 * draw(0), dtype)
    for kind in ("soft", "hard"):
        loss, grad, metrics = run(live_teacher.make_objective(0.5, kind), apply_one, logits, batch)
        assert np.isfinite(loss)
        assert np.isfinite(np.asarray(grad, np.float32)).all()
        assert metrics["teacher_entropy"] == 0
        assert grad.dtype == dtype


def test_who_agrees_has_nothing_to_learn():
    logits = draw(1, 3.0)
    for temperature in (1.0, 4.0):
        batch = make_batch(temperature, teacher=logits + 5)
        loss, grad, metrics = run(live_teacher.make_objective(1.0, "soft", temperature), apply_one,
                                  logits, batch)
        assert abs(loss) < 1e-5
        np.testing.assert_allclose(grad, 0, atol=1e-6)
        assert metrics["agreement"] == 1


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_it_is_the_stored_objective_but_for_the_teachers_entropy(temperature):
    """Cross-entropy = KL + entropy; the gradients are the same."""
    batch, logits = make_batch(temperature), draw(0)
    order = np.argsort(-batch["log_prob"], -1).astype(np.int32)
    stored = {**batch, "index": order,
              "prob": np.take_along_axis(np.exp(batch["log_prob"]), order, -1)}
    live = run(live_teacher.make_objective(1.0, "soft", temperature), apply_one, logits, batch)
    kept = run(stored_logits.make_objective(temperature, temperature), apply_one, logits, stored)
    entropy = live[2]["teacher_entropy"]
    assert kept[0] == pytest.approx(live[0] + temperature**2 * entropy, rel=1e-5)
    np.testing.assert_allclose(live[1], kept[1], atol=1e-6)
    assert live[2]["agreement"] == kept[2]["agreement"]


def test_the_config_chooses():
    c = configs.default()
    c.objective.update({"name": "live_teacher", "alpha": 0.3, "temperature": 2.0,
                        "smoothing": SMOOTHING})
    batch, logits = make_batch(2.0), draw(0)
    made = objectives.make_objective(c.objective)
    assert run(made, apply_one, logits, batch)[0] == pytest.approx(
        dense(logits, logits, batch, 0.3, "soft", 2.0), rel=1e-5)
    c.objective.update({"kind": "hard", "temperature": 1.0})
    made = objectives.make_objective(c.objective, two_heads=True)
    assert run(made, apply_two, {"class": draw(0), "taught": draw(5)}, batch)[0] == pytest.approx(
        dense(draw(0), draw(5), batch, 0.3, "hard", 1.0), rel=1e-5)
    configs.check(c)
    for key, value, message in (("kind", "warm", "one of soft, hard"),
                                ("alpha", 1.5, r"a weight in \[0, 1\]"),
                                ("temperature", 2.0, "a top class has no temperature")):
        before = c.objective[key]
        c.objective[key] = value
        with pytest.raises(configs.ConfigError, match=rf"--config\.objective\.{key}={value}.*"
                           rf"{message}"):
            configs.check(c)
        c.objective[key] = before
