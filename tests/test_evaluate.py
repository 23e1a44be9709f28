import logging

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


def judge(table, batches, class_map=None, competing=None):
    mesh = meshes.make_mesh()
    step = evaluate.make_eval_step(Constant(table), mesh, (0, 0, 0), (1 / 255,) * 3, class_map,
                                   competing)
    return evaluate.evaluate(step, {}, batches, mesh)


def run(*arguments):
    return evaluate.score(judge(*arguments))


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


def test_every_row_has_its_own_answer():
    generator = np.random.default_rng(0)
    table = generator.normal(size=(40, 6)).round(1)  # rounded, so that some tie
    labels = generator.integers(0, 6, 40)
    out = judge(table, [make_batch(range(40), labels, np.ones(40))])
    prob = np.exp(table) / np.exp(table).sum(-1, keepdims=True)
    own = table[np.arange(40), labels]
    np.testing.assert_array_equal(out.label, labels)
    np.testing.assert_array_equal(out.rank, (table >= own[:, None]).sum(-1) - 1)
    ties = (table == table.max(-1, keepdims=True)).sum(-1) > 1
    assert 0 < ties.sum() < 20
    np.testing.assert_array_equal(out.predicted, np.where(ties, -1, table.argmax(-1)))
    np.testing.assert_allclose(out.confidence, prob.max(-1), rtol=1e-5)
    np.testing.assert_allclose(out.loss, -np.log(prob[np.arange(40), labels]), rtol=1e-5)


def test_constant_and_broken_models_score_nothing():
    batch = [make_batch([0, 0], [3, 0], [1, 1])]
    assert run(np.zeros((1, 7)), batch)["top1"] == 0
    assert run(np.full((1, 7), np.nan), batch)["top5"] == 0
    for table in ([[np.nan, 1, 2, 3]], [[np.inf, 1, 2, 3]]):  # of fewer classes than five, too
        broken = judge(table, batch)
        assert evaluate.score(broken)["top5"] == 0
        assert broken.predicted.tolist() == [-1, -1]


def test_any_of_several_labels_is_right_and_none_is_left_out():
    """Beyer et al., arXiv 2006.07159: the share of answers that are among an image's labels."""
    table = np.array([[0, 1, 2, 3, 4, 5, 6.0], [9, 1, 9, 0, 0, 0, 0]])
    batch = make_batch([0, 0, 0, 0, 1, 1], [6, 1, 0, 2, 0, 0], np.ones(6))
    batch["labels"] = np.array([[5, 6, -1], [1, 2, -1], [-1, -1, -1], [0, -1, -1], [0, 2, -1],
                                [0, 1, 3]], np.int32)
    out = judge(table, [batch])
    # row 4: both classes that tie are right; row 5: a wrong one ties with a right one
    assert out.rank[[0, 1, 3, 4, 5]].tolist() == [0, 4, 6, 0, 1]
    assert out.label.tolist() == [6, 1, -1, 2, 0, 0]
    assert out.predicted[[0, 1, 5]].tolist() == [6, 6, -1]
    assert out.predicted[4] in (0, 2)
    prob = np.exp(table) / np.exp(table).sum(-1, keepdims=True)
    assert out.loss[1] == pytest.approx(-np.log(prob[0, 1] + prob[0, 2]), rel=1e-5)
    scores = evaluate.score(out)
    assert scores["count"] == 5
    assert scores["top1"] == pytest.approx(40)
    assert scores["top5"] == pytest.approx(80)


def test_one_label_in_a_wide_table_is_one_label():
    table = np.random.default_rng(1).normal(size=(12, 6)).round(1)
    batch = make_batch(range(12), np.arange(12) % 6, np.ones(12))
    wide = {**batch, "labels": np.stack([batch["label"], np.full(12, -1, np.int32)], -1)}
    for one, other in zip(judge(table, [batch]), judge(table, [wide]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_set_without_any_label_is_refused():
    batch = make_batch([0], [0], [1]) | {"labels": np.full((1, 2), -1, np.int32)}
    with pytest.raises(ValueError, match=r"None of the 1 evaluation images has a label.*eval_sour"):
        run(np.eye(3), [batch])


def test_answers_come_from_the_competing_classes_alone():
    """Hendrycks et al. cut the logits of the classes that are not shown before the arg max."""
    table = np.random.default_rng(2).normal(size=(20, 8))
    shown = np.array([1, 2, 5])
    labels = shown[np.arange(20) % 3]
    batch = make_batch(range(20), labels, np.ones(20))
    out = judge(table, [batch], None, np.isin(np.arange(8), shown))
    cut = table[:, shown]
    logp = cut - np.log(np.exp(cut).sum(-1, keepdims=True))
    np.testing.assert_array_equal(out.predicted, shown[cut.argmax(-1)])
    np.testing.assert_allclose(out.loss, -logp[np.arange(20), np.arange(20) % 3], rtol=1e-5)
    np.testing.assert_allclose(out.confidence, np.exp(logp.max(-1)), rtol=1e-5)
    assert evaluate.score(out)["top5"] == 100


def test_classes_of_one_name_cannot_be_matched():
    for trained, evaluated in ((("crane", "dog", "crane"), ("dog",)), (("a", "b"), ("b", "b"))):
        with pytest.raises(ValueError, match="some have the same name"):
            evaluate.make_class_map(trained, evaluated)


def test_class_map_by_name():
    trained = ("a", "b", "c", "d")
    assert evaluate.make_class_map(trained, trained) is None
    class_map = evaluate.make_class_map(trained, ("d", "b"))
    assert class_map.tolist() == [3, 1]
    table = np.array([[9.0, 1.0, 9.0, 2.0]])
    assert run(table, [make_batch([0], [0], [1])], class_map)["top1"] == 100
    with pytest.raises(ValueError, match=r"1 of the 2 evaluation classes.*: zebra.*class_names="):
        evaluate.make_class_map(trained, ("a", "zebra"))


def test_one_missing_class_of_a_thousand_is_named_and_two_percent_are_too_many(
        caplog, monkeypatch):
    trained = tuple(f"n{i:05d}" for i in range(3000))
    evaluated = [*trained[::2][:999], "teddy"]
    monkeypatch.setattr(logging.getLogger("tinyvit_jax"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        class_map = evaluate.make_class_map(trained, tuple(evaluated))
    assert "lacks 1 of the 1000 evaluation classes, which get the logit 0: teddy" in caplog.text
    assert class_map.tolist() == [*range(0, 1998, 2), -1]
    ten = tuple([*trained[:990], *(f"no{i}" for i in range(10))])
    assert (evaluate.make_class_map(trained, ten) < 0).sum() == 10
    with pytest.raises(ValueError, match=r"11 of the 1000 evaluation classes.*no0, no1"):
        evaluate.make_class_map(trained, (*ten[1:], "no10"))
    with pytest.raises(ValueError, match=r"1 of the 1000 evaluation classes.*: teddy"):
        evaluate.make_class_map(trained, tuple(evaluated), max_missing=0.0)


@pytest.mark.torch
def test_a_missing_class_gets_the_logit_that_the_original_gives():
    """The original appends a column of zeros and gathers by index, -1 for the class it lacks."""
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(3).normal(size=(30, 9)).astype(np.float32) - 0.5
    class_map = np.array([4, -1, 0, 8], np.int32)
    logits = torch.cat([torch.from_numpy(table), torch.zeros(30, 1)], dim=1)[:, class_map.tolist()]
    labels = np.arange(30) % 4
    out = judge(table, [make_batch(range(30), labels, np.ones(30))], class_map)
    np.testing.assert_array_equal(out.predicted, logits.argmax(-1).numpy())
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="none")
    np.testing.assert_allclose(out.loss, expected.numpy(), rtol=1e-5)
    assert (out.predicted == 1).sum() > 3  # the missing class can win
