"""Sections of a block: numbers of one kind as a zstd frame of their own, or as they are.

Each begins with its size, four bytes, little endian.
"""

import struct
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import zstandard

_SIZE = struct.Struct("<I")


class CodecError(ValueError):
    """Bytes that are not one intact block; the message says what is wrong with them."""


def join(sections: Iterable[bytes]) -> bytes:
    """Sections one after another, each behind its size."""
    return b"".join(part for s in sections for part in (_SIZE.pack(len(s)), s))


def with_excess(byte: np.ndarray, over: np.ndarray, dtype: Any) -> np.ndarray:
    """Bytes as wider numbers, where a 255 has its excess in a list."""
    wide = byte.astype(dtype)
    full = byte == 255
    if np.count_nonzero(full) != len(over):
        raise CodecError(f"the block has {np.count_nonzero(full)} numbers of 255 or more, and "
                         f"says by how much of {len(over)}")
    if len(over):
        wide[full] += over
    return wide


def pack_nibbles(values: np.ndarray) -> bytes:
    """Numbers below 16, two a byte: the first half of them low, the second high."""
    half = (len(values) + 1) // 2
    out = values[:half].copy()
    out[:len(values) - half] |= values[half:] << 4
    return out.tobytes()


def unpack_nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    """Undoes `pack_nibbles`: uint8 [count]."""
    out = np.empty(2 * len(packed), np.uint8)
    np.bitwise_and(packed, 15, out=out[:len(packed)])
    np.right_shift(packed, 4, out=out[len(packed):])
    return out[:count]


def squeeze(values: np.ndarray) -> bytes:
    """Bytes of one kind as a zstd frame; the speed of level 1 is that of its Huffman code."""
    return _zstd()[0].compress(np.ascontiguousarray(values).data)


_OWN = threading.local()


def _zstd() -> tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]:
    """This thread's compressor and decompressor: no two threads may use one at once."""
    if not hasattr(_OWN, "pair"):
        _OWN.pair = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    return _OWN.pair


class Sections:
    """Reads the sections of a block, front to back; every error is a CodecError.

    Args:
        data: the block.
        start: where its first section begins.
        views: n, of the block.
        top_k: K, of the block.
    """

    def __init__(self, data: bytes, start: int, views: int, top_k: int):
        self.data, self.at, self.views, self.top_k = data, start, views, top_k

    def _next(self) -> memoryview:
        start = self.at + _SIZE.size
        size = _SIZE.unpack_from(self.data, self.at)[0] if start <= len(self.data) else 0
        self.at = start + size
        if self.at > len(self.data):
            raise CodecError(f"the block ends at byte {len(self.data)}, inside its values")
        return memoryview(self.data)[start:self.at]

    def take(self, rows: int = 0) -> np.ndarray:
        """The next frame: uint8 [n, K], or [rows, n]."""
        shape = (rows, self.views) if rows else (self.views, self.top_k)
        frame, size = self._next(), shape[0] * shape[1]
        try:
            stated = zstandard.frame_content_size(frame)
            if stated != size:
                raise CodecError(f"a section of the block says it holds {stated} numbers, expected "
                                 f"{size}")
            values = _zstd()[1].decompress(frame)
        except zstandard.ZstdError as error:
            raise CodecError(f"a section of the block does not decompress: {error}") from error
        return np.frombuffer(values, np.uint8).reshape(shape)

    def take_list(self, dtype: str) -> np.ndarray:
        """The next list of plain numbers."""
        raw = self._next()
        if len(raw) % np.dtype(dtype).itemsize:
            raise CodecError(f"a list of the block has {len(raw)} bytes, which is no whole number "
                             f"of entries")
        return np.frombuffer(raw, dtype)

    def take_raw(self, size: int) -> memoryview:
        """The next section, bytes as they are."""
        raw = self._next()
        if len(raw) != size:
            raise CodecError(f"a section of the block has {len(raw)} bytes, expected {size}")
        return raw

    def end(self) -> None:
        """Raises CodecError if anything is left."""
        if self.at != len(self.data):
            raise CodecError(f"the block has {len(self.data) - self.at} bytes too many")
