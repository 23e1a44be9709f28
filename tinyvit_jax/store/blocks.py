"""One record of a shard: the targets of a block of views, and what says which views they are.

A record begins with the 64-bit digest of the block's keys. Then come, where the store keeps keys of
its own, the keys themselves: the image indices and the seeds as byte planes (all low bytes first).
Where a formula gives the keys, one bit of a hash of each does. The block of the codec is the rest,
which brings its own compression: the file adds none.
"""

import dataclasses
import errno
import struct
import threading
from pathlib import Path

import numpy as np

from tinyvit_jax.store import codec
from tinyvit_jax.store import keys as view_keys
from tinyvit_jax.store.manifest import Manifest

Keys = tuple[np.ndarray, np.ndarray]  # image index int64 [n], view seed uint32 [n]
Targets = tuple[np.ndarray, np.ndarray]  # index int32 [n, K], prob float32 [n, K]

_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_DIGEST = struct.Struct("<Q")
_SEED_BYTES = 4
_OLD_INDEX_BYTES = 4  # of an image index in the first stores, however few images they had


@dataclasses.dataclass(frozen=True)
class Block:
    """A decoded block of n views."""

    digest: int  # of the keys, in order
    bits: np.ndarray  # uint8 [n], a bit of a hash of each key, 0 or 1
    keys: Keys | None  # where the store keeps them
    index: np.ndarray  # int32 [n, K]
    prob: np.ndarray  # float32 [n, K]


def key_bytes(manifest: Manifest) -> int:
    """Bytes of a view's stored key; 0 where a formula gives the keys."""
    return _index_bytes(manifest) + _SEED_BYTES if manifest.keys == "stored" else 0


def pack(keys: Keys, index: np.ndarray, prob: np.ndarray, manifest: Manifest) -> bytes:
    """The record of a block.

    Args:
        keys: image index int [n] in [0, images of the manifest), view seed int [n] in [0, 2**32).
        index: classes, int [n, K].
        prob: their probabilities, float32 [n, K].
        manifest: of the store.

    Raises:
        ValueError: targets or keys that are none; names the view of the block.
    """
    known_by = (_pack_keys(keys, manifest) if manifest.keys == "stored" else
                np.packbits(view_keys.key_bits(*keys)).tobytes())
    return _DIGEST.pack(view_keys.digest(*keys)) + known_by + codec.encode(
        index, prob, num_classes=len(manifest.class_names), mode=manifest.codec)


def unpack(record: bytes, views: int, manifest: Manifest) -> Block:
    """Undoes `pack`.

    Args:
        record: its bytes.
        views: n, how many views the block should have.
        manifest: of the store.

    Raises:
        CodecError: the bytes are cut short, changed, or of another block.
    """
    stored = manifest.keys == "stored"
    width = _index_bytes(manifest)
    if stored and record[_DIGEST.size + views * (_OLD_INDEX_BYTES + _SEED_BYTES):][:4] == (
            codec.MAGIC):
        width = _OLD_INDEX_BYTES
    size = views * (width + _SEED_BYTES) if stored else -(-views // 8)
    if len(record) < _DIGEST.size + size:
        raise codec.CodecError(f"{len(record)} bytes are too few for a block of {views} views")
    digest = _DIGEST.unpack_from(record)[0]
    known_by = np.frombuffer(record, np.uint8, size, _DIGEST.size)
    index, prob = codec.decode(record[_DIGEST.size + size:])
    if index.shape != (views, manifest.top_k):
        raise codec.CodecError(f"the block is {list(index.shape)}, expected "
                               f"{[views, manifest.top_k]}")
    if not stored:
        return Block(digest, np.unpackbits(known_by, count=views), None, index, prob)
    planes = known_by.reshape(-1, views)
    keys = _join(planes[:width]).astype(np.int64), _join(planes[width:]).astype(np.uint32)
    if view_keys.digest(*keys) != digest:
        raise codec.CodecError("the digest of its keys is another one: they were changed after "
                               "they were written")
    return Block(digest, view_keys.key_bits(*keys), keys, index, prob)


def _index_bytes(manifest: Manifest) -> int:
    """Bytes that hold any image index."""
    return max(1, -(-(manifest.image_set["images"] - 1).bit_length() // 8))


def _pack_keys(keys: Keys, manifest: Manifest) -> bytes:
    """Byte planes of the keys of a block."""
    limits = manifest.image_set["images"], 1 << 32
    for what, values, limit in zip(("image index", "view seed"), keys, limits, strict=True):
        bad = np.flatnonzero((values < 0) | (np.asarray(values) >= limit))
        if len(bad):
            raise ValueError(f"view {bad[0]} of the block: its {what} must lie in [0, {limit}), "
                             f"found {values[bad[0]]}")
    return _planes(keys[0], _index_bytes(manifest)) + _planes(keys[1], _SEED_BYTES)


def _planes(values: np.ndarray, count: int) -> bytes:
    """The low `count` bytes of integers [n], byte by byte."""
    raw = np.asarray(values).astype("<u8").view(np.uint8).reshape(-1, 8)
    return np.ascontiguousarray(raw[:, :count].T).tobytes()


def _join(planes: np.ndarray) -> np.ndarray:
    """Undoes `_planes`: uint8 [count, n] -> uint64 [n]."""
    raw = np.zeros((planes.shape[1], 8), np.uint8)
    raw[:, : len(planes)] = planes.T
    return raw.view("<u8")[:, 0]


class Reader:
    """An open ArrayRecord file; one thread reads at a time.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is none.
    """

    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordReader

        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "no such shard", str(path))
        self._reader = ArrayRecordReader(str(path), _OPTIONS)
        self._lock = threading.Lock()
        self.count = self._reader.num_records() if self._reader.ok() else 0

    def read(self, number: int) -> bytes:
        """The bytes of one record."""
        with self._lock:
            return self._reader.read([number])[0]
