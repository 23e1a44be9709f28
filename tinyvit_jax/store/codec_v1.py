"""Reads blocks of version 1, which the first stores have: whole byte planes, class by class.

Nothing writes them any more. `codec.decode` checks their checksum before they come here.
"""

import struct

import numpy as np

from tinyvit_jax.store.sections import CodecError

VERSION = 1

_PREFIX = struct.Struct("<4sBI")
_FIELDS = struct.Struct("<BIIIf")  # mode, views, K, classes, step of sqrt(p)
_HEADER = _PREFIX.size + _FIELDS.size
_MAX_CLASSES = 1 << 24
_MAX_NUMBERS = 1 << 26
_ODDS = 128
_ODDS_ZERO = 32769
_SMALL = 2
_TOP = 1 << 32


def decode(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Decodes one block.

    Args:
        data: a whole block, its checksum found to be right.

    Returns:
        index int32 [n, K] and prob float32 [n, K], by descending probability, ties by class.

    Raises:
        CodecError: the bytes are no such block.
    """
    mode, n, k, classes, step = _FIELDS.unpack_from(data, _PREFIX.size)
    if not (mode < 2 and n >= 1 and 1 <= k <= classes <= _MAX_CLASSES and n * k <= _MAX_NUMBERS
            and 0 < step < 1e9):
        raise CodecError(f"its header cannot be: mode {mode}, {n} views of {k} of {classes} "
                         f"classes")
    planes = _Planes(data, n)
    if k < classes:
        gaps = planes.take(k, ((classes - 1).bit_length() + 7) // 8)
        index = np.cumsum(gaps, axis=0, dtype=np.uint64) + np.arange(k, dtype=np.uint64)[:, None]
        if index[-1].max() >= classes:
            raise CodecError(f"it names classes beyond the {classes} that it is of")
    else:
        index = np.broadcast_to(np.arange(k, dtype=np.uint32)[:, None], (k, n))
    if mode:
        index, bits = _descending(index, planes.take(k, 2))
        planes.end()
        return index, _checked(bits.astype(np.uint16).view(np.float16).astype(np.float32))
    level, odds, small = planes.take(k, 1), planes.take(1, 2)[0], planes.take(1, 1)[0]
    if (len(data) - planes.at) % 2:
        raise CodecError("its list of large levels ends inside a number")
    over = np.frombuffer(data, "<u2", offset=planes.at)
    if len(over) != (np.count_nonzero(level == 255) if len(over) else 0):
        raise CodecError("the block has another number of large levels than it lists")
    if len(over):
        level = level.astype(np.uint32)
        level[level == 255] += over
    index, level = _descending(index, level)
    return index, _checked(_probabilities(level, step, odds, small))


def _checked(prob: np.ndarray) -> np.ndarray:
    """Raises CodecError where numbers [n, K] are no probabilities."""
    if not (prob.min() >= 0 and prob.sum(1, dtype=np.float64).max() < 1.01):  # NaN is neither
        raise CodecError("the block holds numbers that are no probabilities")
    return prob


def _probabilities(level: np.ndarray, step: float, odds: np.ndarray, small: np.ndarray
                   ) -> np.ndarray:
    """Levels [n, K], descending, to float32 probabilities."""
    value = np.square(level * step)
    zero = level == 0
    if small.any():
        mass = np.where(small > 0, np.exp2((small.astype(np.float64) - 255) / _SMALL), 0)
        value += zero * (mass / np.maximum(zero.sum(1), 1))[:, None]
    ratio = np.where(odds > 0, np.exp2((odds.astype(np.float64) - _ODDS_ZERO) / _ODDS), 0)
    kept = 1 / (1 + ratio)
    total = value.sum(1)
    value *= (kept / np.where(total > 0, total, np.inf))[:, None]
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
    return (key & (_MAX_CLASSES - 1)).astype(np.int32), _TOP - (key >> 24)


class _Planes:
    """Reads byte planes of n views, front to back."""

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

    def end(self) -> None:
        """Raises CodecError if anything is left."""
        if self.at != len(self.data):
            raise CodecError(f"the block has {len(self.data) - self.at} bytes too many")
