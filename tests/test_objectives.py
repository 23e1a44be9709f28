import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
