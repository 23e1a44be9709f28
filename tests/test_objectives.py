import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvit_jax import config as configs
from tinyvit_jax import objectives
from tinyvit_jax.objectives import stored_logits, supervised


def dense_target(index, prob, classes):
    rows, k = index.shape
    rest = (1 - prob.sum(-1, keepdims=True)) / max(classes - k, 1)
    target = np.repeat(rest, classes, 1) if classes > k else np.zeros((rows, classes))
    np.put_along_axis(target, index, prob, 1)
    return target


def draw_target(classes, k, rows=5, seed=0):
    g = np.random.default_rng(seed)
    p = np.exp(3 * g.normal(size=(rows, classes)))
    p /= p.sum(-1, keepdims=True)
    index = np.argsort(-p, -1)[:, :k]
    return index.astype(np.int32), np.take_along_axis(p, index, 1).astype(np.float32)


@pytest.mark.parametrize(("classes", "k"), [(10, 3), (10, 10), (1000, 10), (21841, 100), (7, 1)])
def test_sparse_loss_and_gradient_equal_the_dense_ones(classes, k):
    index, prob = draw_target(classes, k)
    logits = np.random.default_rng(1).normal(size=(5, classes)).astype(np.float32)
    target = dense_target(index, prob.astype(np.float64), classes)

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    expected = -(target * np.log(softmax(logits.astype(np.float64)))).sum(-1)
    loss = stored_logits.sparse_cross_entropy(jnp.asarray(logits), index, prob)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    grad = jax.grad(lambda x: stored_logits.sparse_cross_entropy(x, index, prob).sum())(logits)
    expected_grad = softmax(logits.astype(np.float64)) * target.sum(-1, keepdims=True) - target
    np.testing.assert_allclose(grad, expected_grad, atol=2e-6)


def test_gradient_needs_no_dense_target():
    B, C, K = 64, 21841, 100
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((B, C), jnp.float32), ((B, K), jnp.int32), ((B, K), jnp.float32))]
    step = jax.jit(jax.value_and_grad(
        lambda *args: stored_logits.sparse_cross_entropy(*args).mean()))
    memory = step.lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * 4 * B * C  # beside logits and gradient


@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_what_all_logits_have_in_common_costs_no_digits(offset):
    classes, k = 21841, 100
    index, prob = draw_target(classes, k)
    logits = np.random.default_rng(1).normal(size=(5, classes)) * 3
    logits = np.round(logits * 64) / 64  # so that the offset changes no logit by rounding

    def run(x):
        return jax.value_and_grad(
            lambda x: stored_logits.sparse_cross_entropy(x, index, prob).sum())(x)

    plain, moved = run(np.float32(logits)), run(np.float32(logits + offset))
    np.testing.assert_array_equal(moved[0], plain[0])
    np.testing.assert_array_equal(moved[1], plain[1])


def apply_identity(variables, images, key):
    return images, {"new": key}


def test_stored_objective_gives_metrics_and_statistics():
    logits = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    batch = {"image": logits, "label": jnp.array([0, 0]), "index": jnp.array([[0], [1]]),
             "prob": jnp.array([[0.9], [0.5]])}
    loss, aux = stored_logits.make_objective()(apply_identity, {}, batch, "key")
    assert loss.shape == ()
    assert aux["batch_stats"] == {"new": "key"}
    assert aux["metrics"]["accuracy"] == 0.5
    assert aux["metrics"]["agreement"] == 0.5


def test_supervised_smooths_and_mixes_labels():
    logits = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    label = np.array([0, 1, 2, 2])
    lam = np.array([0.7, 0.2], np.float32)
    batch = {"image": jnp.asarray(logits), "label": label, "lam": lam}
    loss, aux = supervised.make_objective(0.1)(apply_identity, {}, batch, None)
    logp = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    eye, partner = np.eye(5), label[[1, 0, 3, 2]]
    weight = np.repeat(lam, 2)[:, None]
    target = 0.9 * (weight * eye[label] + (1 - weight) * eye[partner]) + 0.1 / 5
    assert loss == pytest.approx(-(target * logp).sum(-1).mean(), rel=1e-6)
    assert aux["metrics"]["accuracy"] == (logits.argmax(-1) == label).mean()


def power_target(index, prob, classes, power, tail):
    """Dense float64 [n, C]: the stored target to a power, scaled to sum to 1."""
    prob = prob.astype(np.float64)
    dense = dense_target(index, prob, classes)
    if tail == "none":
        dense = np.zeros_like(dense)
        np.put_along_axis(dense, index, prob, 1)
    dense = np.where(dense > 0, np.maximum(dense, 1e-300) ** power, 0)
    return dense / dense.sum(-1, keepdims=True)


def log_softmax(x):
    x = x.astype(np.float64)
    return x - x.max(-1, keepdims=True) - np.log(
        np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def distil(logits, index, prob, temperature, stored, tail):
    """The objective of stored targets and its gradient by the logits."""
    objective = stored_logits.make_objective(temperature, stored, tail)
    batch = {"label": jnp.zeros(len(logits), int), "index": jnp.asarray(index),
             "prob": jnp.asarray(prob)}
    return jax.jit(jax.value_and_grad(lambda x: objective(
        apply_identity, {}, {**batch, "image": x}, jax.random.key(0))[0]))(jnp.asarray(logits))


@pytest.mark.parametrize(("temperature", "stored", "tail"), [
    (1.0, 1.0, "none"), (2.0, 1.0, "uniform"), (0.5, 1.0, "none"), (3.0, 4.0, "uniform"),
    (2.0, 2.0, "uniform")])
@pytest.mark.parametrize(("classes", "k"), [(10, 3), (10, 10), (21841, 100)])
def test_temperatures_and_tails_equal_the_dense_ones(classes, k, temperature, stored, tail):
    index, prob = draw_target(classes, k)
    logits = 3 * np.random.default_rng(1).normal(size=(5, classes)).astype(np.float32)
    target = power_target(index, prob, classes, stored / temperature, tail)
    logp = log_softmax(logits.astype(np.float64) / temperature)
    loss, grad = distil(logits, index, prob, temperature, stored, tail)
    assert loss == pytest.approx(temperature**2 * -(target * logp).sum(-1).mean(), rel=1e-5)
    expected = temperature * (np.exp(logp) * target.sum(-1, keepdims=True) - target) / 5
    np.testing.assert_allclose(grad, expected, atol=2e-6 * temperature)


def plain_objective(apply, variables, batch, key):
    """The objective as it was before it knew temperatures and tails."""
    logits, batch_stats = apply(variables, batch["image"], key)
    index, prob = batch["index"], batch["prob"]
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    left_over = jnp.maximum(1.0 - prob.sum(-1), 0.0)
    rest = left_over / (logits.shape[-1] - index.shape[-1])
    stored = ((prob - rest[:, None]) * jnp.take_along_axis(logp, index, axis=-1)).sum(-1)
    return -(stored + rest * logp.sum(-1)).mean(), {"batch_stats": batch_stats}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_temperature_1_changes_nothing(dtype):
    index, prob = draw_target(1000, 10, rows=32)
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(32, 1000)), dtype)
    batch = {"label": jnp.zeros(32, int), "index": jnp.asarray(index), "prob": jnp.asarray(prob)}

    def run(objective):
        return jax.jit(jax.value_and_grad(lambda x: objective(
            apply_identity, {}, {**batch, "image": x}, jax.random.key(0))[0]))(logits)

    for now, before in zip(run(stored_logits.make_objective()), run(plain_objective), strict=True):
        np.testing.assert_allclose(now.astype(jnp.float32), before.astype(jnp.float32), rtol=1e-6,
                                   atol=1e-3 * float(jnp.abs(before).max()) if (
                                       dtype == jnp.bfloat16) else 1e-8)


@pytest.mark.parametrize(("temperature", "tail"), [
    (0.25, "uniform"), (1.0, "none"), (4.0, "uniform"), (4.0, "none")])
def test_nothing_left_and_nothing_kept_stay_finite(temperature, tail):
    prob = np.array([[1, 0, 0], [0.5, 0.5, 0], [1e-30, 0, 0], [0.9, 1e-40, 0]], np.float32)
    index = np.tile(np.array([4, 0, 2], np.int32), (4, 1))
    logits = np.tile(np.array([50.0, -50, 0, 0, 3, 0], np.float32), (4, 1))
    loss, grad = distil(logits, index, prob, temperature, 1.0, tail)
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()
    kept, rest = stored_logits.retarget(jnp.asarray(prob), 6, 1 / temperature, tail)
    np.testing.assert_allclose(kept.sum(-1) + 3 * rest, 1, atol=1e-6)
    assert (np.asarray(kept)[prob == 0] == 0).all()
    assert (np.asarray(rest)[:2] == 0).all()  # nothing was left over
    assert ((np.asarray(rest)[2:] == 0) == (tail == "none")).all()


@pytest.mark.torch
def test_the_loss_is_torchs_kl_up_to_the_entropy_of_the_target():
    torch = pytest.importorskip("torch")
    index, prob = draw_target(50, 5)
    logits = np.random.default_rng(1).normal(size=(5, 50)).astype(np.float32)
    for temperature, stored, tail in ((4.0, 1.0, "uniform"), (2.0, 3.0, "none")):
        target = power_target(index, prob, 50, stored / temperature, tail)
        x = torch.tensor(logits, requires_grad=True)
        kl = torch.nn.functional.kl_div(
            torch.log_softmax(x / temperature, -1), torch.tensor(target, dtype=torch.float32),
            reduction="batchmean") * temperature**2
        kl.backward()
        loss, grad = distil(logits, index, prob, temperature, stored, tail)
        entropy = -(target * np.log(np.where(target > 0, target, 1))).sum(-1).mean()
        assert loss - temperature**2 * entropy == pytest.approx(kl.item(), rel=1e-4)
        np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-6)


def test_the_config_chooses_temperature_and_tail():
    c = configs.default()
    c.objective.name = "stored_logits"
    index, prob = draw_target(10, 3)
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(5, 10)), jnp.float32)
    batch = {"image": logits, "label": jnp.zeros(5, int), "index": index, "prob": prob}
    for temperature, stored, tail in ((1.0, 1.0, "uniform"), (3.0, 2.0, "none")):
        c.objective.temperature = temperature
        made = objectives.make_objective(c.objective, stored, tail)
        loss, _ = made(apply_identity, {}, batch, "key")
        assert loss == pytest.approx(distil(logits, index, prob, temperature, stored, tail)[0])
