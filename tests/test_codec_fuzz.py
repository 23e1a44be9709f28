"""The decoder on bytes that nobody wrote: a clear error or a well-formed answer, whatever comes."""

import resource
import zlib

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyvit_jax.store import codec

_V1 = [bytes.fromhex(text) for text in (
    "5456544c0190bafc4f0002000000030000002d0100005a261d3c000101032925000000000101174a63250134e19a"
    "7d7e0000",
    "5456544c01cb27fb490102000000030000002d0100005a261d3c0001010329250000000001016600330"
    "08e002a383b300634")]
_BODY = 9  # bytes before the part that the checksum covers


def _targets(n: int, k: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    r = np.random.default_rng(seed)
    index = np.array([r.choice(classes, k, replace=False) for _ in range(n)])
    prob = r.dirichlet(np.full(k + 1, r.choice([0.05, 1.0])), n)[:, :k].astype(np.float32)
    prob[:, 0] += np.float32(1e-6)
    return index, prob / np.maximum(prob.sum(1, keepdims=True), 1)


SEEDS = [codec.encode(*_targets(n, k, c, i), num_classes=c, mode=mode)
         for i, (n, k, c) in enumerate([(1, 1, 1), (3, 4, 600), (8, 10, 10), (5, 7, 70_000),
                                        (2, 300, 1000)]) for mode in codec.MODES] + _V1
FIXED = st.booleans()  # whether the checksum is made to fit, as someone with bad intent would
EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=6)


def mutate(block: bytes, edits: list[tuple[int, int]], cut: int, fixed: bool) -> bytes:
    data = bytearray(block)
    for place, value in edits:
        data[place % len(data)] = value
    if cut % 4 == 0:
        del data[cut % len(data):]
    elif cut % 4 == 1:
        data += data[cut % len(data):]
    if fixed and len(data) > _BODY:
        data[:5] = block[:5]
        data[5:_BODY] = zlib.crc32(data[_BODY:]).to_bytes(4, "little")
    return bytes(data)


def check(data: bytes) -> None:
    """A CodecError, or targets as they must be."""
    try:
        index, prob = codec.decode(data)
    except codec.CodecError:
        return
    assert (index.dtype, prob.dtype) == (np.int32, np.float32)
    assert index.shape == prob.shape
    assert index.min() >= 0
    assert (np.diff(np.sort(index, axis=1), axis=1) > 0).all()
    assert np.isfinite(prob).all()
    assert prob.min() >= 0
    assert (np.diff(prob, axis=1) <= 0).all()
    assert (prob.sum(1, dtype=np.float64) < 1.01).all()


OPTIONS = settings(deadline=None, derandomize=True, database=None,
                   suppress_health_check=list(HealthCheck))


@settings(OPTIONS, max_examples=500)
@given(st.sampled_from(SEEDS), EDITS, st.integers(0, 1 << 16), FIXED)
def test_changed_blocks(block, edits, cut, fixed):
    check(mutate(block, edits, cut, fixed))


@settings(OPTIONS, max_examples=500)
@given(st.binary(max_size=200), FIXED)
def test_any_bytes(tail, fixed):
    data = b"TVTL\x02" + zlib.crc32(tail).to_bytes(4, "little") + tail
    check(data if fixed else tail)


def test_a_hundred_thousand_inputs():
    """Of a few hundred examples, each a burst: hypothesis takes longer over one than decoding."""
    inputs = 0

    @settings(OPTIONS, max_examples=420)
    @given(st.integers(0, 1 << 32), FIXED)
    def burst(seed, fixed):
        nonlocal inputs
        r = np.random.default_rng(seed)
        for number in range(256):
            block = SEEDS[number % len(SEEDS)]
            edits = [(int(p), int(v)) for p, v in r.integers(0, 1 << 16, (r.integers(1, 7), 2))]
            check(mutate(block, [(p, v % 256) for p, v in edits], int(r.integers(1 << 16)), fixed))
            inputs += 1

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    burst()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert inputs >= 100_000
    assert grown < 1 << 19, f"decoding damaged blocks took {grown} KiB"
