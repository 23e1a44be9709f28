"""Teacher targets of a block of views as bytes: the top K classes, their probabilities, the rest.

The classes of a view are sorted and stored as gaps: a set costs log2(K!) bits less than a list. The
probabilities follow in class order, and `decode` sorts by them. There are two modes for them:

- "compact": uniform steps in the square root of the probability. To second order the divergence
  KL(p || p') is 2 sum (sqrt p - sqrt p')^2, so equal steps there spend the fewest bits for a given
  KL. A step of sqrt(6 * KL / K) gives that KL on average, whatever the teacher; a block of flat
  targets takes a finer one, which keeps the error of the loss gradient within 1 %. Levels count
  from the lowest of their view: where a teacher is unsure of one view and sure of the next, that
  brings their levels together.
- "float16": the probability rounded to float16, as in TinyViT's own files (ECCV 2022, section 3.1).

What the top K leave over decides the target of the other C - K classes. Next to a kept mass of
almost 1 it would round to nothing, so compact mode stores it on a log scale.

Numbers of one kind lie together in a section, a byte each, and every section is a zstd frame of its
own, so that each gets the Huffman code of its own kind. The low bits of a gap are as good as random
and are left as they are; what is above them has four bits of entropy or more, where Huffman codes
lose next to nothing. A number that needs more than its byte is 255 there, and its excess in a list
behind.
"""

import functools
import struct
import zlib
from typing import Any

import numpy as np

from tinyvit_jax.store import codec_v1
from tinyvit_jax.store.levels import ODDS, odds_steps, quantize
from tinyvit_jax.store.sections import (
    CodecError,
    Sections,
    join,
    pack_nibbles,
    squeeze,
    unpack_nibbles,
    with_excess,
)

MODES = ("compact", "float16")
MAX_CLASSES = 1 << 24  # three bytes for a gap

MAGIC = b"TVTL"  # what every block begins with
_VERSION = 2
_PREFIX = struct.Struct("<4sBI")  # magic, version, CRC32 of everything after it
# Mode, low bits of a gap, steps an octave of the odds, views, K, classes, step of sqrt(p).
_FIELDS = struct.Struct("<BBHIIIf")
_HEADER = _PREFIX.size + _FIELDS.size
_MAX_NUMBERS = 1 << 26  # views * K: what one block may make a reader allocate

_STEPS = 1e-9, 1.0  # between these lies every step that `quantize` can choose; 1 is of float16
_SUM_TOLERANCE = 1e-4  # a softmax of 100,000 float32 numbers sums to 1 within far less
_HALF_ROUNDING = 2.0**-11, 2.0**-25  # of float16: relative, and absolute of its smallest numbers
_HALF_INFINITY = 0x7C00  # its bits, above which are NaN and everything negative
_ODDS_ZERO = 32769  # code of odds 1; code 0 is nothing left over
_LEAST_KEPT = 60  # octaves below 1: what a kept mass may be, lest float32 has no room for a class
_SURE = 0.9  # a kept mass above which the rounding of a sum would tell in what is left over
_SMALL = 2  # steps an octave of the summed mass of level 0
_HIGH_GAP = 24  # above which the mean gap gives four more of its bits to the low ones


def encode(index: np.ndarray, prob: np.ndarray, *, num_classes: int, mode: str = "compact"
           ) -> bytes:
    """Encodes the top-K targets of a block of views.

    Args:
        index: classes, integers [n, K] in [0, num_classes), none twice in a view, in any order.
        prob: their softmax probabilities, float32 [n, K]; 0 < sum <= 1 in each view, in float16
            mode up to what rounding each to float16 adds.
        num_classes: C, at most 2**24; the mass 1 - sum belongs to the other C - K classes alike.
            Where K = C there are none, and compact mode scales a sum below 1 up to it.
        mode: "compact" or "float16".

    Returns:
        The block. A thousand views of 100 in 21,841 classes take 150 to 200 bytes each in compact
        mode, as the teacher is; of 10 in 1,000, 16 to 20.

    Raises:
        ValueError: the arrays are no such targets; names the view.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; expected one of {', '.join(MODES)}")
    index, prob, total = _check(np.asarray(index), np.asarray(prob), num_classes, mode)
    n, k = index.shape
    steps = ODDS[0]
    if mode == "compact":
        code, step, small = quantize(prob, total, num_classes)
        steps = odds_steps(prob, total, num_classes)
    else:
        code, step = prob.astype(np.float16).view(np.uint16), 1.0
    ordered, level = _sort_by_class(index, code)
    gaps = _gaps(ordered)
    low = _low_bits(gaps)
    sections = [] if k == num_classes else _pack_gaps(gaps, low, num_classes)
    if mode == "float16":
        sections += [squeeze(level.astype(np.uint8)), squeeze((level >> 8).astype(np.uint8))]
    else:
        sections += _pack_levels(level, total, small, steps, k == num_classes)
    body = _FIELDS.pack(MODES.index(mode), low, steps, n, k, num_classes, step) + join(sections)
    return _PREFIX.pack(MAGIC, _VERSION, zlib.crc32(body)) + body


def decode(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Decodes one block.

    In compact mode the sum of a view's probabilities never exceeds what the teacher kept, so the
    left-over mass stays above zero wherever it was, within the 6e-8 that float32 can say next to 1
    (and within 3e-6 of itself where it is a tenth or more).

    Args:
        data: what `encode` returned, or what that of an earlier release did.

    Returns:
        index int32 [n, K] and prob float32 [n, K], by descending probability, ties by class.

    Raises:
        CodecError: the bytes are cut short, changed, or of a newer version.
    """
    if _open(data) == codec_v1.VERSION:
        return codec_v1.decode(data)
    mode, low, steps, n, k, classes, step = _read_fields(data)
    sections = Sections(data, _HEADER, n, k)
    if k < classes:
        index = _unpack_gaps(sections, low, classes)
    else:
        index = np.broadcast_to(np.arange(k, dtype=np.uint32), (n, k))
    if mode == "float16":
        bits = sections.take().astype(np.uint16)
        bits |= sections.take().astype(np.uint16) << 8
        sections.end()
        index, bits = _descending(index, bits, 16)
        return index, _halves(bits, max_sum(k, mode))
    level, base, odds, small = _unpack_levels(sections)
    index, level = _descending(index, level, 8 if level.dtype == np.uint8 else 16)
    return index, _probabilities(level, base, step, _kept_by_odds(steps)[odds], small)


def max_sum(top_k: int, mode: str) -> float:
    """The largest sum of a view's K probabilities that is still taken for at most 1.

    Probabilities that were rounded to float16 one by one may sum to more than 1 by the roundings.
    """
    relative, absolute = _HALF_ROUNDING
    return 1 + (relative + top_k * absolute if mode == "float16" else _SUM_TOLERANCE)


def _check(index: np.ndarray, prob: np.ndarray, classes: int, mode: str
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays, and what each view keeps in float64, or a ValueError that names a bad view.

    A class that comes twice is found later, by `_gaps`.
    """
    if index.ndim != 2 or index.shape != prob.shape or 0 in index.shape:
        raise ValueError(f"index and prob must both be [n, K] with n, K >= 1, found "
                         f"{list(index.shape)} and {list(prob.shape)}")
    if index.dtype.kind not in "iu" or prob.dtype.kind != "f":
        raise ValueError(f"index must hold integers and prob floats, found {index.dtype} and "
                         f"{prob.dtype}")
    if not index.shape[1] <= classes <= MAX_CLASSES:
        raise ValueError(f"num_classes={classes} must lie between K = {index.shape[1]} and "
                         f"{MAX_CLASSES}")
    if index.size > _MAX_NUMBERS:
        raise ValueError(f"{len(index)} views of {index.shape[1]} classes are too many for one "
                         f"block, which holds {_MAX_NUMBERS:,} numbers. Make blocks of at most "
                         f"{_MAX_NUMBERS // index.shape[1]} views (store.block_views).")
    prob = prob.astype(np.float32, copy=False)
    total = prob.sum(1, dtype=np.float64)
    if index.min() < 0 or index.max() >= classes:
        _refuse(index, (index >= 0) & (index < classes), f"classes must lie in [0, {classes})")
    if not prob.min() >= 0:  # NaN is not
        _refuse(prob, prob >= 0, "probabilities must be numbers >= 0")
    good = (total > 0) & (total <= max_sum(index.shape[1], mode))
    if not good.all():
        _refuse(total, good[:, None], "probabilities must sum to (0, 1]")
    return index, prob, total


def _refuse(values: np.ndarray, good: np.ndarray, what: str) -> None:
    """Raises ValueError for the first view that is not good throughout."""
    view = int(np.argmin(good.all(1)))
    raise ValueError(f"view {view} of the block: {what}, found {values[view]}")


def _sort_by_class(index: np.ndarray, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes and their codes, both [n, K], by ascending class: int32 and uint16.

    One sort of numbers that hold both, as sorting is four times as fast as argsort.
    """
    wide: Any = np.uint32 if index.max() < 1 << 16 else np.uint64
    key = (index.astype(wide) << wide(16)) | code
    key.sort(axis=1)
    return (key >> wide(16)).astype(np.int32), key.astype(np.uint16)


def _gaps(ordered: np.ndarray) -> np.ndarray:
    """How many classes each of a view's sorted classes leaves out before it: uint32 [n, K]."""
    gaps = np.empty_like(ordered)
    gaps[:, 0] = ordered[:, 0]
    np.subtract(ordered[:, 1:], ordered[:, :-1], out=gaps[:, 1:])
    gaps[:, 1:] -= 1
    if gaps.min() < 0:
        _refuse(ordered, gaps >= 0, "no class may come twice")
    return gaps.view(np.uint32)


def _excess_type(classes: int, low: int) -> str:
    """The type of what the high bits of a gap exceed 255 by."""
    return "<u2" if classes >> low <= 1 << 16 else "<u4"


def _low_bits(gaps: np.ndarray) -> int:
    """How many low bits of the gaps are left as they are: a multiple of 4.

    What is above them then has a mean of 1.5 to 24, with four bits of entropy or so.
    """
    mean, low = float(gaps.mean()), 0
    while mean >= _HIGH_GAP:
        mean, low = mean / 16, low + 4
    return low


def _pack_gaps(gaps: np.ndarray, low: int, classes: int) -> list[bytes]:
    """The sections of the gaps: high bits, excess of high bits over 255, low bits."""
    high = gaps >> np.uint32(low)
    byte = np.minimum(high, 255).astype(np.uint8)
    over = (high - byte)[byte == 255].astype(_excess_type(classes, low))
    raw = [(gaps >> np.uint32(shift)).astype(np.uint8).tobytes() for shift in range(0, low - 7, 8)]
    if low % 8:
        raw.append(pack_nibbles((gaps >> np.uint32(low - 4)).astype(np.uint8).ravel() & 15))
    return [squeeze(byte), over.tobytes(), b"".join(raw)]


def _unpack_gaps(sections: Sections, low: int, classes: int) -> np.ndarray:
    """Undoes `_pack_gaps`: the sorted classes, uint32 [n, K]."""
    byte, over = sections.take(), sections.take_list(_excess_type(classes, low))
    gaps = with_excess(byte, over, np.uint32)
    size, half = byte.size, (byte.size + 1) // 2 if low % 8 else 0
    raw = np.frombuffer(sections.take_raw(low // 8 * size + half), np.uint8)
    gaps <<= np.uint32(low)
    for number in range(low // 8):
        plane = raw[number * size:(number + 1) * size].reshape(byte.shape)
        gaps |= plane.astype(np.uint32) << np.uint32(8 * number)
    if half:
        nibbles = unpack_nibbles(raw[-half:], size).reshape(byte.shape)
        gaps |= nibbles.astype(np.uint32) << np.uint32(low - 4) if low > 4 else nibbles
    gaps += 1
    # Where a sum of 32 bits could go round, gaps that do not belong here would pass unseen.
    most = int(gaps.max()) if len(over) else 256 << low
    wide: Any = np.uint64 if most * byte.shape[1] >> 32 else np.uint32
    index = gaps.astype(wide, copy=False)
    np.add.accumulate(index, axis=1, out=index)
    index -= wide(1)
    if index[:, -1].max() >= classes:
        raise CodecError(f"the block names classes beyond the {classes} that it is of")
    return index.astype(np.uint32, copy=False)


def _pack_levels(level: np.ndarray, total: np.ndarray, small: np.ndarray, steps: int,
                 complete: bool) -> list[bytes]:
    """The sections of compact mode from levels in class order, uint16 [n, K].

    Level 0 covers [0, step^2 / 4], where a softmax spans many octaves: its summed mass is stored
    once a view.
    """
    base = level.min(1)
    above = level - base[:, None]
    byte = np.minimum(above, 255).astype(np.uint8)
    over = (above - byte)[byte == 255].astype("<u2")
    left = np.zeros_like(total) if complete else np.maximum(1 - total, 0)
    with np.errstate(divide="ignore"):  # log 0 is -inf, which becomes code 0
        odds = np.rint(steps * np.minimum(np.log2(left / total), _LEAST_KEPT)) + _ODDS_ZERO
        mass = np.rint(_SMALL * np.log2(small)) + 255
    odds = np.where(left > 0, np.clip(odds, 1, 65535), 0).astype("<u2")
    mass = np.where(small > 0, np.clip(mass, 1, 255), 0).astype(np.uint8)
    planes = [np.ascontiguousarray(x.astype("<u2").view(np.uint8).reshape(-1, 2).T)
              for x in (base, odds)]
    return [squeeze(byte), over.tobytes(), squeeze(np.concatenate([*planes, mass[None]]))]


def _unpack_levels(sections: Sections
                   ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Undoes `_pack_levels`: levels above the base uint8 or uint16 [n, K]; base, odds, mass [n]."""
    byte, over = sections.take(), sections.take_list("<u2")
    facts = sections.take(rows=5)
    sections.end()
    base, odds = (np.ascontiguousarray(facts[i:i + 2].T).view("<u2")[:, 0] for i in (0, 2))
    return with_excess(byte, over, np.uint16) if len(over) else byte, base, odds, facts[4]


def _probabilities(level: np.ndarray, base: np.ndarray, step: float, kept: np.ndarray,
                   small: np.ndarray) -> np.ndarray:
    """From levels [n, K] above the base, descending, to float32 probabilities that sum to kept."""
    value = level + base[:, None].astype(np.float32)
    zero = value == 0 if small.any() else None
    value *= np.float32(step)
    np.square(value, out=value)
    if zero is not None:
        # Less than 2**-90 is nothing beside a level, and more than float32 can divide by alone.
        mass = np.where(small > 0, np.exp2((np.maximum(small, 75.0) - 255) / _SMALL), 0)
        each = mass / np.maximum(zero.sum(1), 1)
        if (zero.any(1) & (each > step**2 / 2)).any():
            raise CodecError("classes of level 0 have more mass than those of level 1")
        value += zero * each.astype(np.float32)[:, None]
    total = value.sum(1, dtype=np.float64)
    if not total.min() > 0:
        raise CodecError("a view of the block has no probability at all")
    # All are rounded down, so that no sum exceeds what was kept.
    value *= (kept / total * (1 - 2.0**-22)).astype(np.float32)[:, None]
    # Where little was left over, the first takes the remainder, rounded down: the order survives,
    # and the float32 sum says the left-over mass as well as float32 can.
    sure = np.flatnonzero(kept > _SURE)
    if len(sure):
        rows = slice(None) if len(sure) == len(value) else sure
        others = value[rows].sum(1, dtype=np.float64) - value[rows, 0]
        first = kept[rows] - others
        rounded = first.astype(np.float32)
        value[rows, 0] = np.where(rounded > first, np.nextafter(rounded, np.float32(0)), rounded)
    return value


@functools.cache
def _kept_by_odds(steps: int) -> np.ndarray:
    """The kept mass that each code of the odds stands for: float64 [65536]."""
    octaves = np.minimum((np.arange(1 << 16) - _ODDS_ZERO) / steps, _LEAST_KEPT)
    kept = 1 / (1 + np.exp2(octaves))
    kept[0] = 1
    return kept


def _halves(bits: np.ndarray, largest: float) -> np.ndarray:
    """Float16 numbers, given by their bits [n, K], as float32; they must be probabilities."""
    prob = bits.view(np.float16).astype(np.float32)
    if bits[:, 0].max() >= _HALF_INFINITY or prob.sum(1, dtype=np.float64).max() > largest:
        raise CodecError("the block holds numbers that are no probabilities")
    return prob


def _descending(index: np.ndarray, code: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorts classes and codes [n, K] by descending code, ties by class: int32 and the code's type.

    One sort of numbers that hold both, as narrow as they can be: sorting is four times as fast as
    argsort, and twice as fast at half the width.
    """
    wide: Any = np.uint32 if bits == 8 or index.max() < 1 << 16 else np.uint64
    shift = wide(24 if bits == 8 or wide is np.uint64 else 16)
    top = (1 << bits) - 1
    # In place throughout: what a new array costs is the first touch of its memory.
    key = code.astype(wide)
    np.subtract(wide(top), key, out=key)
    key <<= shift
    key |= index.astype(wide, copy=False)
    key.sort(axis=1)
    rank = key >> shift
    code = np.subtract(wide(top), rank, out=rank).astype(code.dtype)
    key &= (wide(1) << shift) - wide(1)
    return key.view(np.int32) if wide is np.uint32 else key.astype(np.int32), code


def _open(data: bytes) -> int:
    """Checks magic and checksum; returns the version."""
    if len(data) < _HEADER:
        raise CodecError(f"{len(data)} bytes are too few for a block, whose header has {_HEADER}")
    magic, version, crc = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise CodecError(f"a block begins with {MAGIC!r}, found {magic!r}: these are other data")
    if version not in (codec_v1.VERSION, _VERSION):
        raise CodecError(f"block version {version} is not {_VERSION}, the newest this code reads: "
                         "the block is damaged, or a newer tinyvit_jax wrote it")
    found = zlib.crc32(memoryview(data)[_PREFIX.size:])
    if found != crc:
        raise CodecError(f"the checksum of the block is {found:08x}, its header says {crc:08x}: "
                         "the bytes were changed or cut short after they were written")
    return version


def _read_fields(data: bytes) -> tuple[str, int, int, int, int, int, float]:
    """Mode, low bits of a gap, steps of the odds, views, K, classes and step of sqrt(p)."""
    mode, low, steps, n, k, classes, step = _FIELDS.unpack_from(data, _PREFIX.size)
    good = (mode < len(MODES) and steps in ODDS and low in range(0, 28, 4) and n >= 1
            and 1 <= k <= classes <= MAX_CLASSES and n * k <= _MAX_NUMBERS
            and _STEPS[0] <= step <= _STEPS[1])
    if not good:
        raise CodecError(f"its header cannot be: mode {mode}, {low} low bits, {steps} steps of "
                         f"the odds, {n} views of {k} of {classes} classes, step {step}")
    return MODES[mode], low, steps, n, k, classes, step
