"""The teacher-logit store: a folder or bucket of immutable shards of targets beside one manifest.

A store holds passes; position q of pass p stands for one image and one view seed. Both are a
formula of the data seed (data/order.py), and every block carries a digest of them, which is held
against the keys that the reader expects; or they are what another program once drew, and every
block holds them too (`Manifest.keys`). On disk:

    manifest.json                       what the store is; the first thing written
    pass-00000/shard-00000.array_record blocks of `block_views` views, one ArrayRecord record each
    pass-00000/shard-00000.json         its views, blocks, bytes and CRC32

A shard appears whole or not at all, sidecar first, and is the unit of resume: one of which either
file is not there is missing. A file of ArrayRecord is a multiple of 64 KiB, up to 128 KiB more than
its records; at 10 classes a view, shards of 65,536 views keep that below 2 bytes a view.
"""

import contextlib
import dataclasses
import json
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyvit_jax.store import blocks, files, shards
from tinyvit_jax.store import keys as view_keys
from tinyvit_jax.store.blocks import Block, Keys, Reader, Targets
from tinyvit_jax.store.manifest import (
    CAPTURE,
    REPAIR,
    Manifest,
    StoreError,
    compare,
    create_manifest,
    flatten,
    read_manifest,
    write_manifest,
)
from tinyvit_jax.store.place import Folder, Place, open_place
from tinyvit_jax.store.shards import Shard, count_blocks, make_sidecar

_SHARD_FILE = re.compile(r"pass-\d{5}/shard-\d{5}\.array_record")
_CACHED_BLOCKS = 32
_OPEN_READERS = 16


logger = logging.getLogger("tinyvit_jax")
_MINUTE = 60.0  # between two lines of a long check


class Problem(NamedTuple):
    """Damage that `Store.verify` found; as a string, the line to print."""

    shard: Shard
    block: int | None  # None where the block cannot be told
    what: str

    def __str__(self) -> str:
        block = "" if self.block is None else f", block {self.block}"
        return f"{self.shard}{block}: {self.what}"


def create_store(path: str | Path | Place, manifest: Manifest) -> "Store":
    """Makes a store, or opens the same one again; removes what dead writers left.

    Of several processes that make different stores at once in one place, one succeeds.

    Args:
        path: a folder, made where there is none, a gs:// or s3:// URL, or a place.
        manifest: of the store; more passes than an existing store has extend it.

    Raises:
        StoreError: another store is there; names every field that differs.
    """
    place = _to_place(path)
    manifest.check()
    names = place.names()
    if "manifest.json" not in names and any(map(_SHARD_FILE.fullmatch, names)):
        raise StoreError(f"{place.url} holds shards without a manifest.json: nobody can say what "
                         f"they are. Name another folder, or remove its folders pass-*, then run "
                         f"{manifest.command}")
    if "manifest.json" in names or not create_manifest(place, manifest):
        manifest = _extend(place, manifest)
    store = Store(place, manifest)
    store.remove_leftovers()
    return store


def _extend(place: Place, manifest: Manifest) -> Manifest:
    """The manifest that is there, with the passes that `manifest` adds to it.

    Raises:
        StoreError: it is of another store.
    """
    there = read_manifest(place)
    grown = dataclasses.replace(there, passes=max(there.passes, manifest.passes))
    compare(place.url, wanted=flatten(manifest.to_dict()), found=flatten(grown.to_dict()),
            remedy=f"To keep both, name another folder by --config.store.path and run "
            f"{manifest.command}; to use this one, set the config back to its values.")
    if grown.passes > there.passes:
        write_manifest(place, grown)
    return grown


def open_store(path: str | Path | Place) -> "Store":
    """Opens an existing store; reads its manifest and nothing else.

    Args:
        path: a folder, a gs:// or s3:// URL, or a place.

    Raises:
        StoreError: no store is there, or its manifest is broken or of a newer format.
    """
    place = _to_place(path)
    return Store(place, read_manifest(place))


def _to_place(path: str | Path | Place) -> Place:
    return open_place(path) if isinstance(path, str | Path) else path


class Store:
    """Reads and writes the shards of one store; from any thread, and picklable.

    Args:
        place: where its files are.
        manifest: as it stands there; `create_store` and `open_store` see to that.

    Attributes:
        path: of the place, for messages: of a folder the Path, else the URL.
    """

    def __init__(self, place: Place, manifest: Manifest):
        self.place, self.manifest = place, manifest
        self.path: str | Path = place.path if isinstance(place, Folder) else place.url
        self._lock = threading.Lock()
        self._readers: OrderedDict[Shard, Reader] = OrderedDict()
        self._blocks: OrderedDict[tuple[Shard, int], Block] = OrderedDict()

    def __reduce__(self):
        return Store, (self.place, self.manifest)

    def shard(self, pass_number: int, number: int) -> Shard:
        """Shard `number` of a pass."""
        m = self.manifest
        start = number * m.shard_views
        return Shard(pass_number, number, start, min(start + m.shard_views, m.views_per_pass))

    def shards(self) -> list[Shard]:
        """Every shard that the complete store has, in the order of training."""
        return [self.shard(p, i) for p in range(self.manifest.passes)
                for i in range(self._shards_per_pass())]

    def missing(self) -> list[Shard]:
        """The shards that are not there yet, by one listing."""
        names = self.place.names()
        # The parts of `Shard.name`, once each: a store may have 78,030 shards, all of them there.
        parts = [(i, f"shard-{i:05d}.array_record", f"shard-{i:05d}.json")
                 for i in range(self._shards_per_pass())]
        return [self.shard(p, i) for p in range(self.manifest.passes)
                for folder in [f"pass-{p:05d}/"] for i, file, sidecar in parts
                if folder + file not in names or folder + sidecar not in names]

    def _shards_per_pass(self) -> int:
        return -(-self.manifest.views_per_pass // self.manifest.shard_views)

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

    def write_shard(self, shard: Shard, contents: Iterable[tuple[Keys, np.ndarray, np.ndarray]],
                    still_mine: Callable[[], bool] | None = None) -> bool:
        """Writes a shard, whole or not at all.

        Args:
            shard: one of `shards()`; replaced where it exists.
            contents: ((image index int64 [n], view seed uint32 [n]), index int32 [n, K], prob
                float32 [n, K]) for each block in order; n = block_views, fewer in the last alone.
            still_mine: asked once the shard is whole and before it appears; after a False nothing
                of it stays.

        Returns:
            Whether it was written: False where `still_mine` said so.

        Raises:
            StoreError: the blocks do not make up the shard, or the disk is full.
            ValueError: targets or keys that are none (`blocks.pack`).
        """
        written = shards.write_shard(self.place, self.manifest, shard, contents, still_mine)
        with self._lock:  # a shard that was replaced must not be read from the old file
            self._readers.pop(shard, None)
            for key in [key for key in self._blocks if key[0] == shard]:
                del self._blocks[key]
        return written

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
                    raise self._other_views(*self._find(pass_number, first))
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
        sizes = self.place.list()
        views = size = 0
        for shard in self.shards():
            parts = [sizes.get(shard.name + suffix) for suffix in (".array_record", ".json")]
            if None not in parts:
                views += shard.stop - shard.start
                size += sum(part or 0 for part in parts)
        if not views:
            raise StoreError(f"The store {self.path} has no shard yet. Make it with: "
                             f"{self.manifest.command}")
        return size / views

    def remove_leftovers(self) -> None:
        """Removes what dead writers of this machine left in a folder; a bucket keeps no such."""
        if isinstance(self.place, Folder):
            files.remove_leftovers(self.place.path)

    def verify(self, keys: Callable[[int, int, int], Keys] | None = None,
               shards: Sequence[Shard] = ()) -> list[Problem]:
        """Reads every byte of every shard that is there; says how far it is once a minute.

        Args:
            keys: (pass, start, stop) -> the keys that those positions should have; without it,
                whole and sound shards of another store are not told from this store's own.
            shards: to read; none = all.

        Returns:
            What is wrong; empty for a sound store. A missing shard is no damage, see `missing`;
            one that lacks its sidecar alone is, as sidecars are written first.
        """
        names = self.place.names()
        there = [s for s in shards or self.shards() if f"{s.name}.array_record" in names]
        problems: list[Problem] = []
        spoke = time.monotonic()
        for number, shard in enumerate(there):
            problems += self._problems(shard, keys)
            if time.monotonic() - spoke > _MINUTE:
                spoke = time.monotonic()
                logger.info("verify %s: %d of %d shards, %d problems", self.path, number + 1,
                            len(there), len(problems))
        return problems

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

    def _find(self, pass_number: int, first: int) -> tuple[Shard, int]:
        """The shard and the number in it of the block at position `first`."""
        number, offset = divmod(first, self.manifest.shard_views)
        return self.shard(pass_number, number), offset // self.manifest.block_views

    def _block(self, pass_number: int, first: int) -> Block:
        """The block at position `first`, from the cache or from disk."""
        key = self._find(pass_number, first)
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
                reader = self._open(shard)
            _put(self._readers, shard, reader, _OPEN_READERS)
        return reader

    def _open(self, shard: Shard) -> Reader:
        """Opens a shard whose sidecar and file agree on its blocks."""
        try:
            facts = json.loads(self.place.read(f"{shard.name}.json"))
            reader = Reader(self.place.fetch(f"{shard.name}.array_record"))
        except FileNotFoundError:
            raise StoreError(
                f"{shard} (positions {shard.start} to {shard.stop}) of the store {self.path} is "
                f"missing. Make it with: {self.manifest.command}") from None
        except ValueError as error:
            raise self._damaged(shard, f"its sidecar is no JSON ({error})") from error
        wanted = {"views": shard.stop - shard.start, "blocks": count_blocks(shard, self.manifest)}
        found = {key: facts.get(key) if isinstance(facts, dict) else None for key in wanted}
        if found != wanted:
            raise self._damaged(shard, f"its sidecar says {found}, expected {wanted}")
        if reader.count != wanted["blocks"]:
            raise self._damaged(shard, f"holds {reader.count} blocks, expected {wanted['blocks']}")
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
        m = self.manifest
        mend = f"Mend it with: {REPAIR}" if not m.origin else (
            f"Remove {self.path}/{shard.name}.array_record and run {m.command}, which writes that "
            f"shard again.")
        return StoreError(f"{shard} of the store {self.path} is damaged: {what}. {mend}")

    def _problems(self, shard: Shard, keys: Callable | None) -> Iterator[Problem]:
        """What is wrong with one shard."""
        try:
            file = self.place.fetch(f"{shard.name}.array_record")
            expected, sidecar = make_sidecar(shard, file.read_bytes(), self.manifest), b"none"
            with contextlib.suppress(FileNotFoundError):
                sidecar = self.place.read(f"{shard.name}.json")
            reader = Reader(file)
        except (OSError, RuntimeError) as error:  # ArrayRecord's own are RuntimeErrors
            yield Problem(shard, None, f"cannot be read ({error})")
            return
        if sidecar != expected:
            yield Problem(shard, None, f"its sidecar is {sidecar.decode(errors='replace')}, its "
                                       f"file needs {expected.decode()}")
        if reader.count != count_blocks(shard, self.manifest):
            yield Problem(shard, None, f"{reader.count} blocks, expected "
                                       f"{count_blocks(shard, self.manifest)}")
            return
        for number in range(reader.count):
            start = shard.start + number * self.manifest.block_views
            try:
                block = self._load(reader, shard, number)
            except StoreError as error:
                yield Problem(shard, number, str(error.__cause__ or error))
                continue
            stop = start + len(block.prob)
            if keys and not _holds(block, 0, stop - start, keys(shard.pass_number, start, stop)):
                yield Problem(shard, number, "holds the targets of other views")

def _holds(block: Block, a: int, b: int, keys: Keys) -> bool:
    """Whether rows [a, b) of a block are the views that `keys` name."""
    if b - a == len(block.prob):
        return view_keys.digest(*keys) == block.digest
    return bool((view_keys.key_bits(*keys) == block.bits[a:b]).all())


def _put(cache: OrderedDict, key: Any, value: Any, limit: int) -> None:
    """Adds the newest entry of a cache and drops the oldest beyond its limit."""
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > limit:
        cache.popitem(last=False)
