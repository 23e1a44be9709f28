"""One shard: which positions it covers, how it is written, and the sidecar that tells of its file.

The sidecar appears before the file. So a file without a sidecar is damage, and a sidecar without a
file is a shard that is on its way or was never ended: missing.
"""

import contextlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from tinyvit_jax.store import blocks, files
from tinyvit_jax.store.blocks import Keys
from tinyvit_jax.store.manifest import Manifest, StoreError
from tinyvit_jax.store.place import Place

_WRITER = "group_size:1,uncompressed"  # a block is a chunk of its own, and brings its compression


class Shard(NamedTuple):
    """Positions [start, stop) of one pass: one file."""

    pass_number: int
    number: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"pass {self.pass_number}, shard {self.number}"

    @property
    def name(self) -> str:
        """Path within the store, without suffix."""
        return f"pass-{self.pass_number:05d}/shard-{self.number:05d}"


class _Dropped(Exception):
    """A shard that is somebody else's by now."""


def count_blocks(shard: Shard, manifest: Manifest) -> int:
    """Blocks that a shard has."""
    return -(-(shard.stop - shard.start) // manifest.block_views)


def make_sidecar(shard: Shard, data: bytes, manifest: Manifest) -> bytes:
    """The content of the sidecar of a shard whose file is `data`."""
    return json.dumps({"views": shard.stop - shard.start, "blocks": count_blocks(shard, manifest),
                       "bytes": len(data), "crc32": zlib.crc32(data)}).encode()


def write_shard(place: Place, manifest: Manifest, shard: Shard,
                contents: Iterable[tuple[Keys, np.ndarray, np.ndarray]],
                still_mine: Callable[[], bool] | None) -> bool:
    """Writes a shard, whole or not at all; see `Store.write_shard`."""
    from array_record.python.array_record_module import ArrayRecordWriter

    try:
        with place.publish(f"{shard.name}.array_record") as temporary:
            with contextlib.closing(ArrayRecordWriter(str(temporary), _WRITER)) as writer:
                for record in _records(shard, contents, manifest):
                    writer.write(record)
            if still_mine is not None and not still_mine():
                raise _Dropped
            sidecar = make_sidecar(shard, temporary.read_bytes(), manifest)
            place.write(f"{shard.name}.json", sidecar)
        _settle(place, manifest, shard, sidecar)
    except _Dropped:
        return False
    except (OSError, RuntimeError) as error:  # ArrayRecord's own are RuntimeErrors
        if files.is_full(error):
            raise StoreError(
                f"No space left on the disk of {place.url} while writing {shard}; what was written "
                f"of it is removed. Free some, then run again: {manifest.command} (shards that are "
                f"complete are kept).") from error
        raise
    return True


def _settle(place: Place, manifest: Manifest, shard: Shard, sidecar: bytes) -> None:
    """Makes the sidecar that of the file, where two writers of other bytes met at a shard.

    Each writes its sidecar, then its file. The one whose file came last finds here its own sidecar,
    or else reads which file is there; and whoever corrects a sidecar looks again, as the file may
    have become another one meanwhile.
    """
    name = f"{shard.name}.json"
    found = place.read(name)
    while found != sidecar:
        there = place.fetch(f"{shard.name}.array_record").read_bytes()
        sidecar, found = make_sidecar(shard, there, manifest), place.read(name)
        if found != sidecar:
            place.write(name, sidecar)


def _records(shard: Shard, contents: Iterable, manifest: Manifest) -> Iterator[bytes]:
    """The records of a shard's blocks, counted and measured."""
    first = shard.start
    for keys, index, prob in contents:
        views = min(manifest.block_views, shard.stop - first)
        lengths = {len(keys[0]), len(keys[1]), len(index), len(prob)}
        if views <= 0 or lengths != {views} or np.shape(index) != (views, manifest.top_k):
            raise StoreError(
                f"{shard}: the block at position {first} should have {max(views, 0)} views of "
                f"top_k={manifest.top_k}, found {len(keys[0])} images, {len(keys[1])} seeds and "
                f"classes {list(np.shape(index))}. Nothing was written.")
        yield blocks.pack(keys, index, prob, manifest)
        first += views
    if first != shard.stop:
        raise StoreError(f"{shard}: the blocks end at position {first} of "
                         f"[{shard.start}, {shard.stop}). Nothing was written.")


def estimate(views: int, top_k: int, num_classes: int, *, shard_views: int = 32768,
             mode: str = "compact", key_bytes: int = 0) -> int:
    """Bytes that one pass of a store will need at most, before it is captured.

    A set of K out of C classes is at most about K log2(eC / K) bits; the values are 6 to 7 bits
    each in compact mode and 12 to 15 in float16, as measured on peaked and on flat teachers.

    Args:
        views: in the pass.
        top_k: K.
        num_classes: C.
        shard_views: views in a shard; each file may end in 128 KiB of padding and index.
        mode: of the codec.
        key_bytes: of a view, where the store keeps them (`blocks.key_bytes`).
    """
    class_bits = math.log2(math.e * num_classes / top_k) if top_k < num_classes else 0.0
    value_bits = {"compact": 7.5, "float16": 16.0}[mode]
    shards = -(-views // shard_views)
    view = top_k * (class_bits + value_bits) / 8 + 4 + key_bytes
    return math.ceil(views * view) + shards * (128 * 1024)
