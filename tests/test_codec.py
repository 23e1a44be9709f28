import time
from typing import Any

import numpy as np
import pytest

from tinyvit_jax.store import codec


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def teacher(kind, n, k, classes, seed=0):
    """Targets int32 [n, K], float32 [n, K] of a teacher whose logits follow a Zipf law."""
    r = np.random.default_rng(seed)
    scale = {"peaked": 4.0, "flat": 0.8}[kind]
    rank = np.argsort(np.argsort(r.standard_normal((n, classes)), axis=1), axis=1)
    logits = -scale * np.log(rank + 1.0) + 0.5 * r.standard_normal((n, classes))
    return top(softmax(logits), k)


def top(prob, k):
    index = np.argpartition(-prob, min(k, prob.shape[1] - 1), axis=1)[:, :k]
    index = np.take_along_axis(index, np.argsort(-np.take_along_axis(prob, index, 1), axis=1), 1)
    return index.astype(np.int32), np.take_along_axis(prob, index, 1).astype(np.float32)


def by_class(index, prob):
    order = np.argsort(index, axis=1)
    return np.take_along_axis(index, order, 1), np.take_along_axis(prob, order, 1).astype(float)


def left_over(prob, classes):
    """The mass outside the top K as the loss sees it: float64 [n]."""
    if prob.shape[1] == classes:
        return np.zeros(len(prob))
    return np.maximum(1 - prob.sum(1, dtype=np.float64), 0)


def divergence(index, prob, again, classes):
    """KL(original || decoded) of each view in float64, the tail included."""
    where, p = by_class(index, prob)
    where_again, q = by_class(*again)
    np.testing.assert_array_equal(where_again, where)
    a, b = left_over(p, classes), left_over(q, classes)
    ratio = np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1))
    tail = np.where(a > 0, a * np.log(np.where(a > 0, a, 1) / np.where(a > 0, b, 1)), 0)
    return (p * ratio).sum(1) + tail


def gradient_error(index, prob, again, classes):
    """Relative error of the gradient by the logits over a batch, for an untrained student."""
    p, q = by_class(index, prob)[1], by_class(*again)[1]
    rest = max(classes - p.shape[1], 1)
    a, b = left_over(p, classes) / rest, left_over(q, classes) / rest
    outside = (p.shape[1] < classes) * rest
    error = ((p - q) ** 2).sum() + outside * ((a - b) ** 2).sum()
    size = ((p - 1 / classes) ** 2).sum() + outside * ((a - 1 / classes) ** 2).sum()
    return np.sqrt(error / size)


def check_form(index, prob, again):
    """What every decoded block promises, in either mode."""
    i, q = again
    assert (i.dtype, q.dtype) == (np.int32, np.float32)
    assert i.shape == q.shape == index.shape
    assert np.isfinite(q).all()
    assert (q >= 0).all()
    assert (np.diff(q, axis=1) <= 0).all()
    np.testing.assert_array_equal(np.sort(i, axis=1), np.sort(index, axis=1))


SIZES = [(256, 10, 1000), (256, 10, 10), (255, 5, 10), (64, 100, 21841), (1, 1, 7), (3, 1, 100_000),
         (7, 300, 100_000), (1, 257, 257), (2, 256, 256), (5, 3, 65_537)]


@pytest.mark.parametrize("kind", ["peaked", "flat"])
@pytest.mark.parametrize(("n", "k", "classes"), SIZES)
def test_compact_targets_come_back(n, k, classes, kind):
    index, prob = teacher(kind, n, k, classes)
    again = codec.decode(codec.encode(index, prob, num_classes=classes))
    check_form(index, prob, again)
    kl = divergence(index, prob, again, classes)
    assert np.isfinite(kl).all()
    assert kl.max() < 2e-4
    if n >= 64:
        assert kl.mean() <= 5e-5
        assert gradient_error(index, prob, again, classes) < 0.01


@pytest.mark.parametrize("kind", ["peaked", "flat"])
@pytest.mark.parametrize(("n", "k", "classes"), SIZES)
def test_float16_is_exact(n, k, classes, kind):
    index, prob = teacher(kind, n, k, classes)
    again = codec.decode(codec.encode(index, prob, num_classes=classes, mode="float16"))
    check_form(index, prob, again)
    expected = by_class(index, prob.astype(np.float16))[1]
    np.testing.assert_array_equal(by_class(*again)[1], expected)


def one_certain(n, k, classes, rest):
    """One class at 1 - rest, the remainder spread over the others."""
    prob = np.full((n, classes), rest / (classes - 1))
    prob[:, 0] = 1 - rest
    return top(prob, k)


@pytest.mark.parametrize("rest", [1e-2, 1e-4, 1e-7, 1e-9, 0.0])
@pytest.mark.parametrize(("k", "classes"), [(10, 1000), (100, 21841), (10, 10), (1, 10), (1, 2)])
def test_a_certain_teacher_keeps_its_tail(k, classes, rest):
    index, prob = one_certain(4, k, classes, rest)
    again = codec.decode(codec.encode(index, prob, num_classes=classes))
    check_form(index, prob, again)
    kl = divergence(index, prob, again, classes)
    assert np.isfinite(kl).all()
    assert kl.max() < (1e-4 if rest > 1e-7 else 1e-7)
    before, after = left_over(prob, classes), left_over(again[1], classes)
    # Half a step of the log scale, and what float32 can say next to 1.
    assert (np.abs(after - before) <= 0.003 * before + 2.0**-24).all()
    assert (after[before > 0] > 0).all()


@pytest.mark.parametrize(("k", "classes"), [(10, 1000), (3, 10), (100, 100_000)])
@pytest.mark.parametrize("left", [0.9, 0.3, 1e-3, 1e-5])
def test_left_over_is_kept_to_a_third_of_a_percent(k, classes, left):
    r = np.random.default_rng(1)
    prob = r.dirichlet(np.full(k, 0.5), 200) * (1 - left)
    prob = (-np.sort(-prob, axis=1)).astype(np.float32)
    index = np.stack([r.permutation(classes)[:k] for _ in range(200)]).astype(np.int32)
    again = codec.decode(codec.encode(index, prob, num_classes=classes))
    before = left_over(prob, classes)
    np.testing.assert_allclose(left_over(again[1], classes), before, rtol=0.003, atol=2.0**-24)
    assert divergence(index, prob, again, classes).mean() < 5e-5


@pytest.mark.parametrize("mode", codec.MODES)
def test_ties_come_by_class(mode):
    index = np.array([[7, 3, 5, 1]] * 3, np.int32)
    prob = np.array([[0.25] * 4, [0.2] * 4, [0.4, 0.2, 0.2, 0.1]], np.float32)
    again, q = codec.decode(codec.encode(index, prob, num_classes=9, mode=mode))
    np.testing.assert_array_equal(again, [[1, 3, 5, 7], [1, 3, 5, 7], [7, 3, 5, 1]])
    np.testing.assert_allclose(q, prob, rtol=2e-2)
    assert (q.sum(1, dtype=np.float64) <= 1).all()


def test_complete_targets_sum_to_one_and_cost_no_index():
    index, prob = teacher("flat", 256, 10, 10)
    data = codec.encode(index, prob, num_classes=10)
    _, q = codec.decode(data)
    np.testing.assert_allclose(q.sum(1, dtype=np.float64), 1, atol=2.0**-23)
    assert len(data) < 256 * (10 + 3) + 64


def test_zero_probability_stays_zero():
    prob = np.array([[1, 0, 0]], np.float32)
    _, q = codec.decode(codec.encode(np.array([[4, 1, 2]]), prob, num_classes=9))
    np.testing.assert_array_equal(q[0, 1:], 0)
    assert q[0, 0] >= 1 - 2.0**-23


def test_order_of_the_classes_does_not_matter():
    index, prob = teacher("peaked", 16, 10, 1000)
    shuffle = np.random.default_rng(0).permutation(10)
    assert codec.encode(index, prob, num_classes=1000) == codec.encode(
        index[:, shuffle], prob[:, shuffle], num_classes=1000)


@pytest.mark.parametrize("block", ["COMPACT_V1", "FLOAT16_V1", "COMPACT", "FLOAT16"])
def test_a_block_is_read_for_ever(block):
    """Golden: stores on disk are made of these bytes, the first ones of version 1."""
    index, prob = codec.decode(bytes.fromhex(GOLDEN[block]))
    np.testing.assert_array_equal(index, [[2, 0, 300], [1, 299, 5]])
    expected = [[0.9, 0.05, 0.0001], [0.5, 0.25, 0.125]]
    np.testing.assert_allclose(prob, expected, rtol=0.1 if "COMPACT" in block else 5e-4)
    # The decoder must not drift either.
    np.testing.assert_allclose(prob[:, 1], GOLDEN_SECOND[block], rtol=2e-6)


GOLDEN = {
    "COMPACT_V1": "5456544c0190bafc4f0002000000030000002d0100005a261d3c0001010329250000000001"
                  "01174a63250134e19a7d7e0000",
    "FLOAT16_V1": "5456544c01cb27fb490102000000030000002d0100005a261d3c0001010329250000000001"
                  "01660033008e002a383b300634",
    "COMPACT": "5456544c026f40674f0004800002000000030000002d0100009e87203c0f00000028b52ffd200631"
               "000000001200001200000000030000001031590f00000028b52ffd200631000016600024000f0000"
               "00001300000028b52ffd200a51000001240000e19a7d7e0000",
    "FLOAT16": "5456544c02b0da27500104800002000000030000002d0100000000803f0f00000028b52ffd200631"
               "000000001200001200000000030000001031590f00000028b52ffd200631000066338e0000000f00"
               "000028b52ffd20063100002a3b06383034",
}
GOLDEN_SECOND = {"COMPACT_V1": [0.0486483, 0.2477173], "COMPACT": [0.05056706, 0.2505614],
                 "FLOAT16_V1": [0.04998779, 0.25], "FLOAT16": [0.04998779, 0.25]}


@pytest.mark.parametrize("mode", codec.MODES)
def test_any_flipped_bit_is_found(mode):
    index, prob = teacher("peaked", 3, 4, 600)
    data = codec.encode(index, prob, num_classes=600, mode=mode)
    for bit in range(8 * len(data)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(codec.CodecError):
            codec.decode(bytes(broken))


# Between peaked and flat the levels of a view take the most bits.
TEACHERS = [("normal", 0.5), ("normal", 1.0), ("normal", 2.0), ("normal", 4.0), ("normal", 8.0),
            ("zipf", 0.8), ("zipf", 1.6), ("zipf", 4.0), ("dirichlet", 1e-3)]


@pytest.mark.parametrize(("k", "classes", "limit"), [(100, 21841, 204), (10, 1000, 23)])
@pytest.mark.parametrize(("kind", "scale"), TEACHERS)
def test_bytes_and_errors_of_every_kind_of_teacher(kind, scale, k, classes, limit):
    r = np.random.default_rng(3)
    noise = r.standard_normal((256, classes))
    if kind == "dirichlet":
        index, prob = top(r.dirichlet(np.full(classes, scale), 256), k)
    elif kind == "normal":
        index, prob = top(softmax(scale * noise), k)
    else:
        rank = np.argsort(np.argsort(noise, axis=1), axis=1)
        index, prob = top(softmax(-scale * np.log(rank + 1.0)), k)
    data = codec.encode(index, prob, num_classes=classes)
    again = codec.decode(data)
    check_form(index, prob, again)
    assert len(data) / 256 < limit
    assert divergence(index, prob, again, classes).mean() <= 5e-5
    assert gradient_error(index, prob, again, classes) < 0.01


def alike(n, k, classes):
    """Views that are all alike, one class almost certain: every rounding error comes n times."""
    prob = np.full((n, classes), 5e-4 / (classes - 1))
    prob[:, 0] = 0.9995
    return top(prob, k)


@pytest.mark.parametrize(("n", "k", "classes"), [(16, 100, 1000), (16, 1000, 1000), (64, 5, 100)])
def test_views_that_are_all_alike(n, k, classes):
    index, prob = alike(n, k, classes)
    again = codec.decode(codec.encode(index, prob, num_classes=classes))
    assert divergence(index, prob, again, classes).mean() <= 5e-5


@pytest.mark.parametrize(("k", "classes"), [(10, 1000), (100, 21841), (5, 100)])
@pytest.mark.parametrize("temperature", [5.0, 20.0])
def test_the_gradient_of_nearly_even_targets(k, classes, temperature):
    logits = 2 * np.random.default_rng(5).standard_normal((64, classes))
    index, prob = top(softmax(logits / temperature), k)
    again = codec.decode(codec.encode(index, prob, num_classes=classes))
    assert gradient_error(index, prob, again, classes) < 0.01


def test_bytes_of_peaked_and_flat_teachers():
    """What the documentation promises, of whole blocks: the rest of a store is 0.2 bytes a view."""
    for kind in ("peaked", "flat"):
        assert len(codec.encode(*teacher(kind, 256, 100, 21841), num_classes=21841)) < 181 * 256
        assert len(codec.encode(*teacher(kind, 256, 10, 1000), num_classes=1000)) < 20 * 256


def test_threads_share_nothing():
    from concurrent.futures import ThreadPoolExecutor

    blocks = [codec.encode(*teacher("peaked", 32, 10, 1000, seed), num_classes=1000)
              for seed in range(8)]
    alone = [codec.decode(block)[0] for block in blocks]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(codec.decode, blocks * 20), alone * 20, strict=True):
            np.testing.assert_array_equal(found[0], expected)


def test_any_cut_and_any_addition_is_found():
    index, prob = teacher("flat", 3, 4, 600)
    data = codec.encode(index, prob, num_classes=600)
    for size in range(len(data)):
        with pytest.raises(codec.CodecError):
            codec.decode(data[:size])
    with pytest.raises(codec.CodecError, match="checksum"):
        codec.decode(data + b"\0")


def test_errors_say_what_is_wrong_with_the_bytes():
    data = codec.encode(*teacher("flat", 3, 4, 600), num_classes=600)
    with pytest.raises(codec.CodecError, match="too few"):
        codec.decode(data[:10])
    with pytest.raises(codec.CodecError, match="other data"):
        codec.decode(b"X" + data[1:])
    with pytest.raises(codec.CodecError, match="version 9 is not 2"):
        codec.decode(data[:4] + b"\x09" + data[5:])
    with pytest.raises(codec.CodecError, match="cut short"):
        codec.decode(data[:-1])


@pytest.mark.parametrize(("change", "message"), [
    ({"index": np.zeros((2, 4), np.int32)}, "both be"),
    ({"index": np.zeros(3, np.int32), "prob": np.zeros(3, np.float32)}, "both be"),
    ({"index": np.zeros((0, 3), np.int32), "prob": np.zeros((0, 3), np.float32)}, "both be"),
    ({"index": np.zeros((2, 3), np.float32)}, "integers"),
    ({"prob": np.zeros((2, 3), np.int32)}, "floats"),
    ({"num_classes": 2}, "num_classes=2"),
    ({"num_classes": 1 << 25}, "num_classes"),
    ({"index": np.array([[0, 1, 2], [0, 1, 10]])}, r"view 1 .*\[0, 10\)"),
    ({"index": np.array([[0, -1, 2], [0, 1, 2]])}, r"view 0 .*\[0, 10\)"),
    ({"index": np.array([[0, 1, 2], [5, 1, 5]])}, "view 1 .*twice"),
    ({"prob": np.array([[0.5, np.nan, 0.1], [0.5, 0.2, 0.1]])}, "view 0 .*numbers >= 0"),
    ({"prob": np.array([[0.5, 0.2, 0.1], [0.5, -0.2, 0.1]])}, "view 1 .*numbers >= 0"),
    ({"prob": np.array([[0.5, 0.2, 0.1], [0.5, np.inf, 0.1]])}, "view 1 .*sum"),
    ({"prob": np.array([[0.5, 0.2, 0.1], [0.5, 0.5, 0.1]])}, "view 1 .*sum"),
    ({"prob": np.array([[0.0, 0.0, 0.0], [0.5, 0.2, 0.1]])}, "view 0 .*sum"),
    ({"mode": "float8"}, "float8"),
    ({"prob": np.array([[1e-60, 0, 0], [0.5, 0.2, 0.1]])}, "view 0 .*sum"),
])
def test_wrong_targets_are_refused(change, message):
    good: dict[str, Any] = {"index": np.array([[0, 1, 2], [3, 4, 9]]), "num_classes": 10,
                            "prob": np.array([[0.5, 0.2, 0.1], [0.7, 0.2, 0.1]], np.float32)}
    codec.encode(**good)
    with pytest.raises(ValueError, match=message):
        codec.encode(**{**good, **change})


def test_speed_has_no_loop_over_views():
    """A generous floor, 20 times below what one core does, which a Python loop cannot reach."""
    index, prob = teacher("peaked", 256, 10, 1000)
    data = codec.encode(index, prob, num_classes=1000)
    began = time.process_time()
    for _ in range(20):
        codec.decode(data)
    assert 20 * 256 / (time.process_time() - began) > 100_000
