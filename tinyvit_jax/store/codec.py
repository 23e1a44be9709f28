"""Teacher targets of a block of views as bytes: the top K classes, their probabilities, the rest.

The classes of a view are sorted and stored as gaps: a set costs log2(K!) bits less than a list. The
probabilities follow in class order, and `decode` sorts by them. There are two modes for them:

- "compact": uniform steps in the square root of the probability. To second order the divergence
  KL(p || p') is 2 sum (sqrt p - sqrt p')^2, so equal steps there spend the fewest bits for a given
  KL. A step of sqrt(6 * KL / K) gives that KL on average, whatever the teacher; a block of flat
  targets takes a finer one, which keeps the error of the loss gradient within 1 %.
- "float16": the probability rounded to float16, as in TinyViT's own files (ECCV 2022, section 3.1).

What the top K leave over decides the target of the other C - K classes. Next to a kept mass of
almost 1 it would round to nothing, so compact mode stores it on a log scale.

Every field is a byte plane over the block (all low bytes, all high bytes ...): bytes of one kind
lie together for the general compressor (zstd, in the shard) that comes after. Little endian.

`digest` and `key_bits` are what a block's keys (image index, view seed) are known by.
"""

import hashlib
import struct
import zlib
from typing import Any

import numpy as np

MODES = ("compact", "float16")
MAX_CLASSES = 1 << 24  # three bytes for a gap

_MAGIC = b"TVTL"
_VERSION = 1
_PREFIX = struct.Struct("<4sBI")  # magic, version, CRC32 of everything after it
_FIELDS = struct.Struct("<BIIIf")  # mode, views, K, classes, step of sqrt(p)
_HEADER = _PREFIX.size + _FIELDS.size

_KL = 4.6e-5  # nats, expected divergence of decoded from original targets in compact mode
_GRADIENT = 0.0095  # error of the loss gradient by the logits over a block, of an untrained student
_SUM_TOLERANCE = 1e-4  # a softmax of 100,000 float32 numbers sums to 1 within far less
_HALF_ROUNDING = 2.0**-11, 2.0**-25  # of float16: relative, and absolute of its smallest numbers
_ODDS = 128  # steps an octave of the odds left-over : kept, half a step is 0.3 %
_ODDS_ZERO = 32769  # code of odds 1; code 0 is nothing left over
_TOP = 1 << 32  # above every code of a probability
_SMALL = 2  # steps an octave of the summed mass of level 0


class CodecError(ValueError):
    """Bytes that are not one intact block; the message says what is wrong with them."""


def encode(index: np.ndarray, prob: np.ndarray, *, num_classes: int, mode: str = "compact"
           ) -> bytes:
    """Encodes the top-K targets of a block of views.

    Args:
        index: classes, integers [n, K] in [0, num_classes), none twice in a view, in any order.
        prob: their softmax probabilities, float32 [n, K]; 0 < sum <= 1 in each view, in float16
            mode up to what rounding each to float16 adds.
        num_classes: C, at most 2**24; the mass 1 - sum belongs to the other C - K classes alike.
        mode: "compact" or "float16".

    Returns:
        The block: about 3 bytes a class in compact mode and 4 in float16, 2 less where K = C. The
        zstd of the shard halves them.

    Raises:
        ValueError: the arrays are no such targets; names the view.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; expected one of {', '.join(MODES)}")
    index, prob = np.asarray(index), np.asarray(prob)
    index, prob = _check(index, prob, num_classes, max_sum(index.shape[-1], mode))
    order = np.argsort(index, axis=1)
    index = np.take_along_axis(index, order, 1)
    prob = np.take_along_axis(prob, order, 1)
    n, k = index.shape
    step = _step(prob, num_classes)
    payload = [_FIELDS.pack(MODES.index(mode), n, k, num_classes, step)]
    if k < num_classes:
        payload.append(_planes(_gaps(index), _index_bytes(num_classes)))
    if mode == "float16":
        payload.append(_planes(prob.astype(np.float16).view(np.uint16), 2))
    else:
        payload += _compact(prob, step, k == num_classes)
    body = b"".join(payload)
    return _PREFIX.pack(_MAGIC, _VERSION, zlib.crc32(body)) + body


def decode(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Decodes one block.

    In compact mode the sum of a view's probabilities never exceeds what the teacher kept, so the
    left-over mass stays above zero wherever it was, within the 6e-8 that float32 can say next to 1.

    Args:
        data: what `encode` returned.

    Returns:
        index int32 [n, K] and prob float32 [n, K], by descending probability, ties by class.

    Raises:
        CodecError: the bytes are cut short, changed, or of a newer version.
    """
    mode, n, k, classes, step, planes = _open(data)
    if k < classes:
        gaps = planes.take(k, _index_bytes(classes))
        index = np.cumsum(gaps, axis=0, dtype=np.uint32) + np.arange(k, dtype=np.uint32)[:, None]
    else:
        index = np.broadcast_to(np.arange(k, dtype=np.uint32)[:, None], (k, n))
    if mode == "float16":
        index, bits = _descending(index, planes.take(k, 2))
        planes.end()
        return index, bits.astype(np.uint16).view(np.float16).astype(np.float32)
    level = planes.take(k, 1)
    odds, small = (planes.take(1, 2)[0], planes.take(1, 1)[0])
    over = planes.rest("<u2")
    if len(over):
        level = level.astype(np.uint32)
        level[level == 255] += over
    index, level = _descending(index, level)
    return index, _probabilities(level, step, odds, small)


def max_sum(top_k: int, mode: str) -> float:
    """The largest sum of a view's K probabilities that is still taken for at most 1.

    Probabilities that were rounded to float16 one by one may sum to more than 1 by the roundings.
    """
    relative, absolute = _HALF_ROUNDING
    return 1 + (relative + top_k * absolute if mode == "float16" else _SUM_TOLERANCE)


def digest(image_index: np.ndarray, view_seed: np.ndarray) -> int:
    """The 64-bit digest of the keys of a block, in their order.

    Args:
        image_index: integers [n].
        view_seed: integers [n] in [0, 2**32).
    """
    h = hashlib.blake2b(np.asarray(image_index).astype("<i8").tobytes(), digest_size=8)
    h.update(np.asarray(view_seed).astype("<u4").tobytes())
    return int.from_bytes(h.digest(), "little")


def key_bits(image_index: np.ndarray, view_seed: np.ndarray) -> np.ndarray:
    """One bit of a hash of each view's key, 0 or 1: what a part of a block is known by.

    Args:
        image_index: integers [n].
        view_seed: integers [n] in [0, 2**32).

    Returns:
        uint8 [n].
    """
    z = np.asarray(image_index).astype(np.uint64) << np.uint64(32)
    z ^= np.asarray(view_seed).astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z >> np.uint64(63)).astype(np.uint8)


def _check(index: np.ndarray, prob: np.ndarray, classes: int, largest: float
           ) -> tuple[np.ndarray, np.ndarray]:
    """The arrays as int32 and float32, or a ValueError that names the first bad view."""
    if index.ndim != 2 or index.shape != prob.shape or 0 in index.shape:
        raise ValueError(f"index and prob must both be [n, K] with n, K >= 1, found "
                         f"{list(index.shape)} and {list(prob.shape)}")
    if index.dtype.kind not in "iu" or prob.dtype.kind != "f":
        raise ValueError(f"index must hold integers and prob floats, found {index.dtype} and "
                         f"{prob.dtype}")
    if not index.shape[1] <= classes <= MAX_CLASSES:
        raise ValueError(f"num_classes={classes} must lie between K = {index.shape[1]} and "
                         f"{MAX_CLASSES}")

    def need(good: Any, what: str, values: np.ndarray) -> None:
        if not np.all(good):
            view = int(np.argmin(good))
            raise ValueError(f"view {view} of the block: {what}, found {values[view]}")

    need(((index >= 0) & (index < classes)).all(1), f"classes must lie in [0, {classes})", index)
    need((prob >= 0).all(1), "probabilities must be numbers >= 0", prob)
    total = prob.sum(1, dtype=np.float64)
    need((total > 0) & (total <= largest), "probabilities must sum to (0, 1]", total)
    index = index.astype(np.int32, copy=False)
    ordered = np.sort(index, axis=1)
    need((ordered[:, 1:] > ordered[:, :-1]).all(1), "no class may come twice", index)
    return index, prob.astype(np.float32, copy=False)


def _gaps(index: np.ndarray) -> np.ndarray:
    """How many classes each of a view's sorted classes leaves out before it: int32 [n, K]."""
    return np.diff(index, axis=1, prepend=np.int32(-1)) - 1


def _index_bytes(classes: int) -> int:
    """Bytes that hold any gap between two of `classes` classes."""
    return ((classes - 1).bit_length() + 7) // 8


def _planes(values: np.ndarray, count: int) -> bytes:
    """The low `count` bytes of integers [n, K], plane by plane, each class-major."""
    raw = np.ascontiguousarray(values.T).astype("<u4").view(np.uint8)
    return b"".join(raw[:, byte::4].tobytes() for byte in range(count))


def _step(prob: np.ndarray, classes: int) -> float:
    """The step of sqrt(p) for a block, as float32 holds it.

    An error d in sqrt(p) is one of 2 d sqrt(p) in the target and so in the gradient, which is
    p - 1/C for a student that knows nothing; d^2 is step^2 / 12 on average.
    """
    p = prob.astype(np.float64)
    coarse = np.sqrt(6 * _KL / p.shape[1])
    fine = _GRADIENT * np.sqrt(3 * np.square(p - 1 / classes).sum() / p.sum())
    lowest = np.sqrt(p.max()) / 65_000  # the excess over 255 is 16 bits wide
    return float(np.float32(max(np.clip(fine, coarse / 4, coarse), lowest)))


def _compact(prob: np.ndarray, step: float, complete: bool) -> list[bytes]:
    """The sections of compact mode from class-ordered probabilities.

    Level 0 covers [0, step^2 / 4], where a softmax spans many octaves: its summed mass is stored
    once a view. A level of 255 or more is 255 with the excess in a list at the end, in plane order.
    """
    level = np.rint(np.sqrt(prob, dtype=np.float64) / step).astype(np.uint32)
    small = np.where(level == 0, prob, 0).sum(1, dtype=np.float64)
    kept = prob.sum(1, dtype=np.float64)
    left = np.zeros_like(kept) if complete else np.maximum(1 - kept, 0)
    with np.errstate(divide="ignore"):  # log 0 is -inf, which becomes code 0
        odds = np.rint(_ODDS * np.log2(left / kept)) + _ODDS_ZERO
        mass = np.rint(_SMALL * np.log2(small)) + 255
    odds = np.where(left > 0, np.clip(odds, 1, 65535), 0).astype(np.uint32)
    mass = np.where(small > 0, np.clip(mass, 1, 255), 0).astype(np.uint32)
    byte = np.minimum(level, 255)
    over = (level - byte).T[byte.T == 255]
    return [_planes(byte, 1), _planes(odds[:, None], 2), _planes(mass[:, None], 1),
            over.astype("<u2").tobytes()]


def _probabilities(level: np.ndarray, step: float, odds: np.ndarray, small: np.ndarray
                   ) -> np.ndarray:
    """Undoes `_compact`: levels [n, K], descending, to float32 probabilities."""
    value = np.square(level * step)
    zero = level == 0
    if small.any():
        mass = np.where(small > 0, np.exp2((small.astype(np.float64) - 255) / _SMALL), 0)
        value += zero * (mass / np.maximum(zero.sum(1), 1))[:, None]
    ratio = np.where(odds > 0, np.exp2((odds.astype(np.float64) - _ODDS_ZERO) / _ODDS), 0)
    kept = 1 / (1 + ratio)
    value *= (kept / value.sum(1))[:, None]
    # All but the first are rounded down, then the first takes the remainder, rounded down: the
    # order survives, and the float32 sum says the left-over mass as well as float32 can.
    prob = (value * (1 - 2.0**-24)).astype(np.float32)
    first = kept - prob[:, 1:].sum(1, dtype=np.float64)
    rounded = first.astype(np.float32)
    prob[:, 0] = np.where(rounded > first, np.nextafter(rounded, np.float32(0)), rounded)
    return prob


def _descending(index: np.ndarray, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts [K, n] classes and codes to [n, K], descending by code, ties by class."""
    key = (_TOP - code.astype(np.int64)) << 24 | index.astype(np.int64)
    key = np.sort(key.T, axis=1)
    return (key & (MAX_CLASSES - 1)).astype(np.int32), _TOP - (key >> 24)


class _Planes:
    """Reads byte planes of n views from a payload, front to back."""

    def __init__(self, data: bytes, views: int):
        self.data, self.views, self.at = data, views, _HEADER

    def take(self, rows: int, count: int) -> np.ndarray:
        """The next `count` planes of [rows, views] bytes as uint8, uint16 or uint32."""
        size = rows * self.views
        if self.at + count * size > len(self.data):
            raise CodecError(f"the block ends at byte {len(self.data)}, inside its values")
        raw = np.frombuffer(self.data, np.uint8, count * size, self.at)
        self.at += count * size
        raw = raw.reshape(count, rows, self.views)
        value = raw[0] if count == 1 else raw[0].astype(np.uint16 if count == 2 else np.uint32)
        for byte in range(1, count):
            value |= raw[byte].astype(value.dtype) << value.dtype.type(8 * byte)
        return value

    def rest(self, dtype: str) -> np.ndarray:
        """Everything that is left."""
        return np.frombuffer(self.data, dtype, offset=self.at)

    def end(self) -> None:
        """Raises CodecError if anything is left."""
        if self.at != len(self.data):
            raise CodecError(f"the block has {len(self.data) - self.at} bytes too many")


def _open(data: bytes) -> tuple[str, int, int, int, float, _Planes]:
    """Checks version and checksum: mode, views, K, classes, step and the planes."""
    if len(data) < _HEADER:
        raise CodecError(f"{len(data)} bytes are too few for a block, whose header has {_HEADER}")
    magic, version, crc = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise CodecError(f"a block begins with {_MAGIC!r}, found {magic!r}: these are other data")
    if version != _VERSION:
        raise CodecError(f"block version {version} is not {_VERSION}, the one this code reads: the "
                         "block is damaged, or a newer tinyvit_jax wrote it")
    found = zlib.crc32(memoryview(data)[_PREFIX.size:])
    if found != crc:
        raise CodecError(f"the checksum of the block is {found:08x}, its header says {crc:08x}: "
                         "the bytes were changed or cut short after they were written")
    mode, n, k, classes, step = _FIELDS.unpack_from(data, _PREFIX.size)
    return MODES[mode], n, k, classes, step, _Planes(data, n)
