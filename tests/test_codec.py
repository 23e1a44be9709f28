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
    index = np.argsort(-prob, axis=1, kind="stable")[:, :k]
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
    index = np.argsort(r.random((200, classes)), axis=1)[:, :k].astype(np.int32)
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


def test_a_block_is_the_same_for_ever():
    """Golden: stores on disk are read by these bytes."""
    index = np.array([[2, 0, 300], [1, 299, 5]], np.int32)
    prob = np.array([[0.9, 0.05, 0.0001], [0.5, 0.25, 0.125]], np.float32)
    assert codec.encode(index, prob, num_classes=301).hex() == GOLDEN_COMPACT
    assert codec.encode(index, prob, num_classes=301, mode="float16").hex() == GOLDEN_FLOAT16
    np.testing.assert_allclose(codec.decode(bytes.fromhex(GOLDEN_COMPACT))[1], [
        [0.901328, 0.0486483, 9.19628e-05], [0.501664, 0.247717, 0.125416]], rtol=1e-5)


GOLDEN_COMPACT = ("5456544c0190bafc4f0002000000030000002d0100005a261d3c00010103292500000000"
                  "0101174a63250134e19a7d7e0000")
GOLDEN_FLOAT16 = ("5456544c01cb27fb490102000000030000002d0100005a261d3c00010103292500000000"
                  "0101660033008e002a383b300634")


@pytest.mark.parametrize("mode", codec.MODES)
def test_any_flipped_bit_is_found(mode):
    index, prob = teacher("peaked", 3, 4, 600)
    data = codec.encode(index, prob, num_classes=600, mode=mode)
    for bit in range(8 * len(data)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(codec.CodecError):
            codec.decode(bytes(broken))


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
    with pytest.raises(codec.CodecError, match="version 9"):
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
])
def test_wrong_targets_are_refused(change, message):
    good: dict[str, Any] = {"index": np.array([[0, 1, 2], [3, 4, 9]]), "num_classes": 10,
                            "prob": np.array([[0.5, 0.2, 0.1], [0.7, 0.2, 0.1]], np.float32)}
    codec.encode(**good)
    with pytest.raises(ValueError, match=message):
        codec.encode(**{**good, **change})


def test_digest_and_bits_tell_keys_apart():
    image, seed = np.arange(256), np.arange(256, dtype=np.uint32) * 77
    assert codec.digest(image, seed) == codec.digest(image.astype(np.int32), seed.astype(np.int64))
    swapped = image.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    others = [(swapped, seed), (image, seed + 1), (image + 1, seed), (image[:-1], seed[:-1])]
    digests = {codec.digest(*keys) for keys in [(image, seed), *others]}
    assert len(digests) == 5
    bits = codec.key_bits(image, seed)
    assert set(bits.tolist()) == {0, 1}
    assert 80 < (bits != codec.key_bits(image, seed + 1)).sum() < 176
    assert 80 < (bits != codec.key_bits(image + 1, seed)).sum() < 176


def test_speed_has_no_loop_over_views():
    """A generous floor, 20 times below what one core does, which a Python loop cannot reach."""
    index, prob = teacher("peaked", 256, 10, 1000)
    data = codec.encode(index, prob, num_classes=1000)
    began = time.process_time()
    for _ in range(20):
        codec.decode(data)
    assert 20 * 256 / (time.process_time() - began) > 100_000
