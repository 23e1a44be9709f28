"""The teacher-logit store: a folder of immutable shards of targets beside one manifest.

A store holds passes; position q of pass p stands for one image and one view seed. Both are a
formula of the data seed (data/order.py), and every block carries a digest of them, which is held
against the keys that the reader expects; or they are what another program once drew, and every
block holds them too (`Manifest.keys`). On disk:

    manifest.json                       what the store is; the first thing written
    pass-00000/shard-00000.array_record blocks of `block_views` views, one ArrayRecord record each
    pass-00000/shard-00000.json         its views, blocks, bytes and CRC32

A shard is written under a temporary name, synced and renamed, sidecar first: it is there whole or
not at all, and is the unit of resume. A file of ArrayRecord is a multiple of 64 KiB, up to 128 KiB
more than its records; at 10 classes a view, shards of 65,536 views keep that below 2 bytes a view.
"""

import contextlib
import dataclasses
import json
import math
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit_jax.store import blocks, codec, files
from tinyvit_jax.store.blocks import Block, Keys, Reader, Targets
from tinyvit_jax.store.manifest import (
    CAPTURE,
    Manifest,
    StoreError,
    compare,
    flatten,
    read_manifest,
    write_manifest,
)

# A block is a chunk of its own. Below level 16 all byte planes of a block share one Huffman code,
# which costs 6 to 8 % of the bytes.
_WRITER = "group_size:1,zstd:19"
_CACHED_BLOCKS = 64
_OPEN_READERS = 16


@dataclasses.dataclass(frozen=True)
class Shard:
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


def create_store(path: str | Path, manifest: Manifest) -> "Store":
    """Makes a store, or opens the same one again; removes what dead writers left.

    Args:
        path: folder, made where there is none.
        manifest: of the store; more passes than an existing store has extend it.

    Raises:
        StoreError: the folder holds another store; names every field that differs.
    """
    path = Path(path)
    manifest.check()
    if (path / "manifest.json").exists():
        _extend(path, manifest)
    elif any(path.glob("pass-*/shard-*.array_record")):
        raise StoreError(f"{path} holds shards without a manifest.json: nobody can say what they "
                         f"are. Remove the folder or name another, then run {manifest.command}")
    else:
        path.mkdir(parents=True, exist_ok=True)
        write_manifest(path, manifest)
    files.remove_leftovers(path)
    return Store(path, manifest)


def _extend(path: Path, manifest: Manifest) -> None:
    """Raises StoreError unless the store is this one, up to passes that are added to it."""
    wanted, found = manifest.to_dict(), read_manifest(path).to_dict()
    grows = wanted["passes"] > found["passes"]
    compare(path, flatten(wanted), flatten(found | ({"passes": wanted["passes"]} if grows else {})),
            f"To keep both, name another folder by --config.store.path and run "
            f"{manifest.command}; to use this one, set the config back to its values.")
    if grows:
        write_manifest(path, manifest)


def open_store(path: str | Path) -> "Store":
    """Opens an existing store.

    Raises:
        StoreError: no store is there, or its manifest is broken or of a newer format.
    """
    path = Path(path)
    return Store(path, read_manifest(path))


class Store:
    """Reads and writes the shards of one store; from any thread, and picklable.

    Args:
        path: folder.
        manifest: as it stands in the folder; `create_store` and `open_store` see to that.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self._lock = threading.Lock()
        self._readers: OrderedDict[Shard, Reader] = OrderedDict()
        self._blocks: OrderedDict[tuple[Shard, int], Block] = OrderedDict()

    def __reduce__(self):
        return Store, (self.path, self.manifest)

    def shards(self) -> list[Shard]:
        """Every shard that the complete store has, in the order of training."""
        m = self.manifest
        cuts = range(0, m.views_per_pass, m.shard_views)
        return [Shard(p, i, start, min(start + m.shard_views, m.views_per_pass))
                for p in range(m.passes) for i, start in enumerate(cuts)]

    def missing(self) -> list[Shard]:
        """The shards that are not there yet, by listing the folders."""
        names = {f"{folder.name}/{entry}" for folder in self.path.glob("pass-*")
                 for entry in os.listdir(folder)}
        return [s for s in self.shards()
                if not {f"{s.name}.array_record", f"{s.name}.json"} <= names]

    def check(self, expected: dict[str, Any]) -> None:
        """Holds the manifest against what a run expects.

        Args:
            expected: dotted fields to values: {"top_k": 10, "image_set.fingerprint": "ab12"}; a
                dict is compared key by key.

        Raises:
            StoreError: names every field that differs, both values and the remedy.
        """
        wanted = flatten(json.loads(json.dumps(expected)))
        found = {name: value for name, value in flatten(self.manifest.to_dict()).items()
                 if any(name == e or name.startswith(e + ".") for e in expected)}
        compare(self.path, wanted, found,
                 "Set the config to the store's values, or name another folder by "
                 f"--config.store.path and make it with: {self.manifest.command}")

    def write_shard(self, shard: Shard, contents: Iterable[tuple[Keys, np.ndarray, np.ndarray]]
                    ) -> None:
        """Writes a shard, whole or not at all.

        Args:
            shard: one of `shards()`; replaced where it exists.
            contents: ((image index int64 [n], view seed uint32 [n]), index int32 [n, K], prob
                float32 [n, K]) for each block in order; n = block_views, fewer in the last alone.

        Raises:
            StoreError: the blocks do not make up the shard, or the disk is full.
            ValueError: targets or keys that are none (`blocks.pack`).
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        target = self.path / f"{shard.name}.array_record"
        target.parent.mkdir(exist_ok=True)
        temporary = files.temporary_path(target)
        try:
            with contextlib.closing(ArrayRecordWriter(str(temporary), _WRITER)) as writer:
                for record in self._records(shard, contents):
                    writer.write(record)
            files.sync(temporary)
            data = temporary.read_bytes()
            facts = {"views": shard.stop - shard.start, "blocks": self._block_count(shard),
                     "bytes": len(data), "crc32": zlib.crc32(data)}
            files.write_text(target.with_suffix(".json"), json.dumps(facts))
            os.replace(temporary, target)
            files.sync(target.parent)
        except (OSError, RuntimeError) as error:  # ArrayRecord's own are RuntimeErrors
            if files.is_full(error):
                raise StoreError(
                    f"No space left on the disk of {self.path} while writing {shard}; what was "
                    f"written of it is removed. Free some, then run again: "
                    f"{self.manifest.command} (shards that are complete are kept).") from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        with self._lock:  # a shard that was replaced must not be read from the old file
            self._readers.pop(shard, None)
            for key in [key for key in self._blocks if key[0] == shard]:
                del self._blocks[key]

    def read(self, pass_number: int, start: int, stop: int, keys: Keys | None = None) -> Targets:
        """Reads the targets of positions [start, stop) of a pass.

        Args:
            pass_number: in [0, passes).
            start, stop: 0 <= start < stop <= views_per_pass.
            keys: the image index int64 [n] and view seed uint32 [n] of each position. A block
                inside the range is held against its 64-bit digest, one that the range cuts
                against a bit for each view: views of another order pass n of them once in 2**n.

        Returns:
            index int32 [n, K], prob float32 [n, K]; descending probabilities.

        Raises:
            StoreError: a shard is missing or damaged, or holds other views; names it.
        """
        if keys is not None and not len(keys[0]) == len(keys[1]) == stop - start:
            raise ValueError(f"keys must hold {stop - start} images and seeds, found "
                             f"{len(keys[0])} and {len(keys[1])}")
        parts = []
        for first, block, a, b in self._pieces(pass_number, start, stop):
            if keys is not None:
                rows = slice(first + a - start, first + b - start)
                if not _holds(block, a, b, (keys[0][rows], keys[1][rows])):
                    raise self._other_views(*self._place(pass_number, first))
            parts.append((block.index[a:b], block.prob[a:b]))
        return np.concatenate([i for i, _ in parts]), np.concatenate([p for _, p in parts])

    def keys(self, pass_number: int, start: int, stop: int) -> Keys:
        """The keys that the store itself holds of positions [start, stop) of a pass.

        Args:
            pass_number: in [0, passes).
            start, stop: 0 <= start < stop <= views_per_pass.

        Returns:
            Image index int64 [n] and view seed uint32 [n].

        Raises:
            StoreError: a shard is missing or damaged, or the keys of this store are a formula.
        """
        if self.manifest.keys != "stored":
            raise StoreError(f"The store {self.path} holds no keys of its own: its manifest says "
                             f"keys={self.manifest.keys}. data/order.py has the formula.")
        parts = [(block.keys[0][a:b], block.keys[1][a:b])
                 for _, block, a, b in self._pieces(pass_number, start, stop) if block.keys]
        return np.concatenate([i for i, _ in parts]), np.concatenate([s for _, s in parts])

    def bytes_per_view(self) -> float:
        """Bytes on disk for each view of the shards that are there, sidecars included."""
        views = size = 0
        absent = set(self.missing())
        for shard in self.shards():
            if shard not in absent:
                views += shard.stop - shard.start
                size += sum((self.path / (shard.name + suffix)).stat().st_size
                            for suffix in (".array_record", ".json"))
        if not views:
            raise StoreError(f"The store {self.path} has no shard yet. Make it with: "
                             f"{self.manifest.command}")
        return size / views

    def verify(self) -> list[str]:
        """Reads every byte of every shard that is there.

        Returns:
            What is wrong, a line each, shard and block named; empty for a sound store. A missing
            shard is no damage: see `missing`.
        """
        absent = set(self.missing())
        return [problem for shard in self.shards() if shard not in absent
                for problem in self._problems(shard)]

    def _block_count(self, shard: Shard) -> int:
        return -(-(shard.stop - shard.start) // self.manifest.block_views)

    def _records(self, shard: Shard, contents: Iterable) -> Iterator[bytes]:
        """The records of a shard's blocks, counted and measured."""
        m = self.manifest
        first = shard.start
        for keys, index, prob in contents:
            views = min(m.block_views, shard.stop - first)
            lengths = {len(keys[0]), len(keys[1]), len(index), len(prob)}
            if views <= 0 or lengths != {views} or np.shape(index) != (views, m.top_k):
                raise StoreError(
                    f"{shard}: the block at position {first} should have {max(views, 0)} views of "
                    f"top_k={m.top_k}, found {len(keys[0])} images, {len(keys[1])} seeds and "
                    f"classes {list(np.shape(index))}. Nothing was written.")
            yield blocks.pack(keys, index, prob, m)
            first += views
        if first != shard.stop:
            raise StoreError(f"{shard}: the blocks end at position {first} of "
                             f"[{shard.start}, {shard.stop}). Nothing was written.")

    def _pieces(self, pass_number: int, start: int, stop: int
                ) -> Iterator[tuple[int, Block, int, int]]:
        """The blocks that a range touches: first position, block, and rows [a, b) in the range."""
        m = self.manifest
        if not (0 <= pass_number < m.passes and 0 <= start < stop <= m.views_per_pass):
            more = "" if m.origin else f" For more, raise --config.store.passes and run {m.command}"
            raise StoreError(
                f"Positions [{start}, {stop}) of pass {pass_number} are not in the store "
                f"{self.path}: it has {m.passes} passes of {m.views_per_pass} views.{more}")
        for first in range(start - start % m.block_views, stop, m.block_views):
            block = self._block(pass_number, first)
            yield first, block, max(start - first, 0), min(stop - first, len(block.prob))

    def _place(self, pass_number: int, first: int) -> tuple[Shard, int]:
        """The shard and the number in it of the block at position `first`."""
        m = self.manifest
        number, offset = divmod(first, m.shard_views)
        start = first - offset
        shard = Shard(pass_number, number, start, min(start + m.shard_views, m.views_per_pass))
        return shard, offset // m.block_views

    def _block(self, pass_number: int, first: int) -> Block:
        """The block at position `first`, from the cache or from disk."""
        key = self._place(pass_number, first)
        with self._lock:
            block = self._blocks.get(key)
            if block is not None:
                self._blocks.move_to_end(key)
                return block
        block = self._load(self._reader(key[0]), *key)
        with self._lock:
            _put(self._blocks, key, block, _CACHED_BLOCKS)
        return block

    def _reader(self, shard: Shard) -> Reader:
        """The open file of a shard; opened where it is not, the longest unused one closed."""
        with self._lock:
            reader = self._readers.get(shard)
            if reader is None:
                try:
                    reader = Reader(self.path / f"{shard.name}.array_record")
                except FileNotFoundError:
                    raise StoreError(
                        f"{shard} (positions {shard.start} to {shard.stop}) of the store "
                        f"{self.path} is missing. Make it with: {self.manifest.command}"
                    ) from None
                if reader.count != self._block_count(shard):
                    raise self._damaged(shard, f"holds {reader.count} blocks, expected "
                                               f"{self._block_count(shard)}")
            _put(self._readers, shard, reader, _OPEN_READERS)
        return reader

    def _load(self, reader: Reader, shard: Shard, number: int) -> Block:
        """Reads and decodes one block."""
        m = self.manifest
        views = min(m.block_views, shard.stop - shard.start - number * m.block_views)
        try:
            return blocks.unpack(reader.read(number), views, m)
        except (RuntimeError, ValueError) as error:  # ArrayRecord's own are RuntimeErrors
            raise self._damaged(shard, f"block {number}: {error}") from error

    def _other_views(self, shard: Shard, number: int) -> StoreError:
        """What to say of a block whose views are not those that the run is about to show."""
        m = self.manifest
        what = (f"{shard}, block {number} of the store {self.path} holds the targets of other "
                "views than the run is about to show: ")
        if m.keys == "stored":
            return StoreError(f"{what}its images and seeds are kept in the store itself, and the "
                              "run takes them from somewhere else. Take them from "
                              "data.order.follow_store(order, store).")
        return StoreError(
            f"{what}the images, their order, data.seed or the pairing differ from those of the "
            f"capture. Give the run the images and the data.seed ({m.data_seed}) of the capture, "
            f"or capture a new store with: {CAPTURE}")

    def _damaged(self, shard: Shard, what: str) -> StoreError:
        return StoreError(f"{shard} of the store {self.path} is damaged: {what}. Remove "
                          f"{self.path / shard.name}.array_record and run "
                          f"{self.manifest.command}, which writes that shard again.")

    def _problems(self, shard: Shard) -> Iterator[str]:
        """What is wrong with one shard."""
        file = self.path / f"{shard.name}.array_record"
        expected = {"views": shard.stop - shard.start, "blocks": self._block_count(shard)}
        try:
            data = file.read_bytes()
            expected |= {"bytes": len(data), "crc32": zlib.crc32(data)}
            facts = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            yield f"{shard}: cannot be read ({error})"
            return
        if facts != expected:
            yield f"{shard}: its sidecar says {facts}, its file has {expected}"
        try:
            reader = Reader(file)
        except (OSError, RuntimeError) as error:
            yield f"{shard}: is no ArrayRecord file ({error})"
            return
        if reader.count != expected["blocks"]:
            yield f"{shard}: {reader.count} blocks, expected {expected['blocks']}"
            return
        for number in range(reader.count):
            try:
                self._load(reader, shard, number)
            except StoreError as error:
                yield f"{shard}, block {number}: {error.__cause__ or error}"


def estimate(views: int, top_k: int, num_classes: int, *, shard_views: int = 16384,
             mode: str = "compact", key_bytes: int = 0) -> int:
    """Bytes that a store will need at most, before it is captured.

    A set of K out of C classes is at most about K log2(eC / K) bits; the values are 6 to 7 bits
    each in compact mode and 12 to 15 in float16, as measured on peaked and on flat teachers.

    Args:
        views: in all passes.
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


def _holds(block: Block, a: int, b: int, keys: Keys) -> bool:
    """Whether rows [a, b) of a block are the views that `keys` name."""
    if b - a == len(block.prob):
        return codec.digest(*keys) == block.digest
    return bool((codec.key_bits(*keys) == block.bits[a:b]).all())


def _put(cache: OrderedDict, key: Any, value: Any, limit: int) -> None:
    """Adds the newest entry of a cache and drops the oldest beyond its limit."""
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > limit:
        cache.popitem(last=False)
