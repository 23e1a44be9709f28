import jax.numpy as jnp
import numpy as np
import pytest

from tinyvit_jax import evaluate
from tinyvit_jax import mesh as meshes


class Constant:
    """A model whose logits are a function of the first pixel, or broken."""

    def __init__(self, table):
        self.table = jnp.asarray(table, jnp.float32)

    def apply(self, variables, images, train):
        return self.table[images[:, 0, 0, 0].astype(jnp.int32)]


def run(table, batches, class_map=None):
    mesh = meshes.make_mesh()
    step = evaluate.make_eval_step(Constant(table), mesh, (0, 0, 0), (1 / 255,) * 3, class_map)
    return evaluate.evaluate(step, {}, batches, mesh)


def make_batch(rows, labels, weight):
    image = np.zeros((len(rows), 2, 2, 3), np.uint8)
    image[:, 0, 0, 0] = rows
    return {"image": image, "label": np.array(labels, np.int32),
            "weight": np.array(weight, np.float32)}


def test_counts_real_rows_only():
    table = np.eye(7) * 5 + np.arange(7) * 0.1
    batches = [make_batch([0, 1, 2, 3], [0, 1, 0, 3], [1, 1, 1, 1]),
               make_batch([4, 5, 5, 5], [4, 0, 5, 5], [1, 1, 0, 0])]
    out = run(table, batches)
    assert out["count"] == 6
    assert out["top1"] == pytest.approx(100 * 4 / 6)
    logp = table - np.log(np.exp(table).sum(-1, keepdims=True))
    expected = -np.mean([logp[0, 0], logp[1, 1], logp[2, 0], logp[3, 3], logp[4, 4], logp[5, 0]])
    assert out["loss"] == pytest.approx(expected, rel=1e-5)
    # class 0 is the sixth of row 2 and of row 5: ranks 6 of 7
    assert out["top5"] == pytest.approx(100 * 4 / 6)


def test_constant_and_broken_models_score_nothing():
    batch = [make_batch([0, 0], [3, 0], [1, 1])]
    assert run(np.zeros((1, 7)), batch)["top1"] == 0
    assert run(np.full((1, 7), np.nan), batch)["top5"] == 0


def test_class_map_by_name():
    trained = ("a", "b", "c", "d")
    assert evaluate.make_class_map(trained, trained) is None
    class_map = evaluate.make_class_map(trained, ("d", "b"))
    assert class_map.tolist() == [3, 1]
    table = np.array([[9.0, 1.0, 9.0, 2.0]])
    assert run(table, [make_batch([0], [0], [1])], class_map)["top1"] == 100
    with pytest.raises(ValueError, match=r"1 of the 2 evaluation classes.*: zebra"):
        evaluate.make_class_map(trained, ("a", "zebra"))
