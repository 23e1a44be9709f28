"""What editing has in common: keys of any store, rows on their way to a new one, files as they are.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit_jax.data.order import AnyOrder, Order, follow_store
from tinyvit_jax.data.source import ImageSource
from tinyvit_jax.store.blocks import Keys
from tinyvit_jax.store.manifest import Manifest, StoreError, compare, flatten, read_manifest
from tinyvit_jax.store.place import open_place
from tinyvit_jax.store.shards import Shard, make_sidecar
from tinyvit_jax.store.store import Store, create_store

logger = logging.getLogger("tinyvit_jax")

Rows = tuple[Keys, np.ndarray, np.ndarray]  # keys, index int32 [n, K], prob float32 [n, K]
Locate = Callable[[int, int], tuple[int, int] | None]  # old pass, position -> new ones, or dropped

_READ = 1024  # images that are read at once for their labels
_LARGE = 100_000  # images whose reading takes so long that a message says so
_QUIET = 60.0  # seconds between two lines of the log
_COMPARED = 1 << 24  # keys that are searched for repeated views at once, at most: 0.4 GB
_CHANCE = 2  # views that two passes may share: of 14 M seeds of 32 bits, one may meet by chance


def is_paired(manifest: Manifest) -> bool:
    """Whether neighbours of a store are one mixed pair, by its augmentation."""
    a = manifest.augment
    return a.get("mix_prob", 1) > 0 and (a.get("mixup", 0) > 0 or a.get("cutmix", 0) > 0)


def make_order(store: Store) -> AnyOrder:
    """The order that shows the views of a store: its formula, or what its blocks keep."""
    m = store.manifest
    return follow_store(Order(m.data_seed, int(m.image_set.get("images", 0)), is_paired(m)), store)


def read_keys(store: Store, pass_number: int, start: int, stop: int) -> Keys:
    """The keys of positions [start, stop) of a pass, stored or by formula.

    Returns:
        Image index int64 [n] and view seed uint32 [n].

    Raises:
        StoreError: a shard is missing or damaged, or the manifest contradicts the formula.
    """
    m = store.manifest
    if m.keys == "stored":
        return store.keys(pass_number, start, stop)
    order = Order(m.data_seed, int(m.image_set.get("images", 0)), is_paired(m))
    if order.views_per_pass != m.views_per_pass:
        raise StoreError(f"The manifest of {store.path} gives views_per_pass={m.views_per_pass}, "
                         f"and its {order.num_images} images (image_set.images) make "
                         f"{order.views_per_pass} by the formula of data/order.py. Put back the "
                         f"manifest.json of the capture.")
    return order.keys(np.full(stop - start, pass_number), np.arange(start, stop))


def identify(manifest: Manifest) -> str:
    """What an edited store remembers of a store it was made of: a sha256 in hex.

    Passes may be added to a store, and the views that replay it may be others; it stays the same.
    """
    fields = {k: v for k, v in manifest.to_dict().items()
              if k not in ("passes", "replay", "checksum", "format_version")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def create(path: str | Path, manifest: Manifest) -> Store:
    """Makes a store that --out names, or opens the same one again, to go on with it.

    Raises:
        StoreError: another store is there; names every field that differs.
    """
    place = open_place(path)
    if "manifest.json" in place.names():
        there = read_manifest(place)
        grown = dataclasses.replace(there, passes=max(there.passes, manifest.passes))
        compare(place.url, wanted=flatten(manifest.to_dict()), found=flatten(grown.to_dict()),
                remedy="To keep it, name another folder by --out. To go on with it, give the "
                       "stores and the flags that it was begun with. To make it anew, remove the "
                       "folder.")
    return create_store(place, manifest)


def carry_replay(parts: Sequence[tuple[dict[str, Any], Locate]]) -> dict[str, Any]:
    """The pixel hashes of the views that are still there, under their new places.

    Args:
        parts: `Manifest.replay` of each store that went in, and where its views are now.

    Returns:
        {"views", "sha256", "versions"}; empty where none is left.
    """
    views: list[list[int]] = []
    hashes: list[str] = []
    versions: dict[str, str] = {}
    for replay, locate in parts:
        found = [(locate(*view), digest) for view, digest in zip(
            replay.get("views", []), replay.get("sha256", []), strict=True)]
        kept = [(list(place), digest) for place, digest in found if place is not None]
        views += [place for place, _ in kept]
        hashes += [digest for _, digest in kept]
        for name, version in replay.get("versions", {}).items() if kept else ():
            told = versions.setdefault(name, version)
            if version not in told.split(", "):
                versions[name] = f"{told}, {version}"
    return {"views": views, "sha256": hashes, "versions": versions} if views else {}


def check_source(store: Store, source: ImageSource) -> None:
    """Raises StoreError unless a source holds the images of a store."""
    held = store.manifest.image_set.get("fingerprint")
    if source.fingerprint != held:
        raise StoreError(f"The images of the store {store.path} (image_set.fingerprint={held!r}) "
                         f"are not those of {source.name}, which has {source.fingerprint!r}. Name "
                         f"the store's own by --config.data.source and data.train_split.")


def check_complete(store: Store, passes: Iterable[int] | None = None) -> None:
    """Raises StoreError where shards are missing, of some passes or of all."""
    wanted = None if passes is None else set(passes)
    missing = [s for s in store.missing() if wanted is None or s.pass_number in wanted]
    if missing:
        raise StoreError(f"The store {store.path} lacks {len(missing)} shards that are needed, the "
                         f"first: {missing[0]}. Make them with: {store.manifest.command}")


def check_distinct(stores: Sequence[Store]) -> None:
    """Raises StoreError where two passes show the same views: some of them came twice.

    Every view of every pass is looked at, whether its key is stored or a formula's, and one sort
    finds what any two passes share. Of more than _COMPARED views, one in `thin` is kept, by its
    seed: what is shared is kept in all passes or in none, so nothing but a few single views of
    large passes can hide.
    """
    views = sum(s.manifest.passes * s.manifest.views_per_pass for s in stores)
    thin = -(-views // _COMPARED)
    if thin > 1:
        logger.info("merge: reading the keys of all %s views, to see that none comes twice",
                    f"{views:,}")
    parts = [_pack_keys(store, p, thin) for store in stores for p in range(store.manifest.passes)]
    names = [f"pass {p} of {s.path}" for s in stores for p in range(s.manifest.passes)]
    packed = np.concatenate(parts)
    order = np.argsort(packed, kind="stable")
    packed = packed[order]
    same = np.flatnonzero(packed[1:] == packed[:-1])
    ends = np.cumsum([len(part) for part in parts])
    a, b = (np.searchsorted(ends, order[same + i], "right") for i in (0, 1))
    pairs, counts = np.unique((a * len(parts) + b)[a != b], return_counts=True)
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        one, other = divmod(pair, len(parts))
        if count > min(_CHANCE, len(parts[one]) // 16):
            raise StoreError(f"{names[other]} shows {count} of the {len(parts[one]):,} views that "
                             f"were compared of {names[one]}: merged, they would be shown twice. "
                             f"Leave one of the passes out, with tools/edit_store.py --do=subset "
                             f"--passes=...")


def _pack_keys(store: Store, pass_number: int, thin: int) -> np.ndarray:
    """Image << 32 | seed of the views of a pass whose seed is a multiple of `thin`: int64 [n]."""
    m, kept = store.manifest, []
    for start in range(0, m.views_per_pass, m.shard_views):
        image, seed = read_keys(store, pass_number, start,
                                min(start + m.shard_views, m.views_per_pass))
        here = seed % thin == 0
        kept.append(image[here] << 32 | seed[here])
    return np.concatenate(kept)


def find_keys(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted key stands among keys: dtype S [n] and [m] -> int64 [m]; -1: nowhere."""
    if not len(wanted):
        return np.empty(0, np.int64)
    order = np.argsort(keys, kind="stable")
    place = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    return np.where(keys[order[place]] == wanted, order[place], -1)


def read_labels(source: ImageSource) -> np.ndarray:
    """The label of every image, int32 [N]; every image is read, none decoded."""
    if len(source) > _LARGE:
        logger.info("reading the labels of all %s images of %s", f"{len(source):,}", source.name)
    return np.concatenate([
        np.array([e.label for e in source.read(range(s, min(s + _READ, len(source))))], np.int32)
        for s in range(0, len(source), _READ)])


def regroup(pieces: Iterable[Rows], size: int) -> Iterator[Rows]:
    """Rows in pieces of any length as blocks of `size`, the last one shorter."""
    kept: list[tuple[np.ndarray, ...]] = []
    count = 0
    for (image, seed), index, prob in pieces:
        kept.append((image, seed, index, prob))
        count += len(image)
        if count >= size:
            whole = [np.concatenate(values) for values in zip(*kept, strict=True)]
            for start in range(0, count - size + 1, size):
                yield _rows(*(v[start:start + size] for v in whole))
            count %= size
            kept = [tuple(v[len(v) - count:] for v in whole)]
    if count:
        yield _rows(*(np.concatenate(values) for values in zip(*kept, strict=True)))


def _rows(image: np.ndarray, seed: np.ndarray, index: np.ndarray, prob: np.ndarray) -> Rows:
    return (image, seed), index, prob


def fill(out: Store, contents: Callable[[Shard], Iterable[Rows]], what: str) -> None:
    """Writes the missing shards of a new store, and says how far it is."""
    for shard in _report(out, out.missing(), what, "written"):
        out.write_shard(shard, contents(shard))


def copy_shards(out: Store, wanted: Sequence[Shard], origin: Callable[[Shard], tuple[Store, Shard]],
                what: str) -> None:
    """Copies shards of a new store byte for byte from where `origin` says that they are."""
    for shard in _report(out, wanted, what, "copied"):
        copy_shard(*origin(shard), out, shard)


def _report(out: Store, wanted: Sequence[Shard], what: str, done_to: str) -> Iterator[Shard]:
    """The shards that are to be made; logs how many are done while they are taken."""
    if not wanted:
        return
    logger.info("%s: %d of %d shards of %s are to be %s", what, len(wanted), len(out.shards()),
                out.path, done_to)
    began = told = time.monotonic()
    for done, shard in enumerate(wanted, 1):
        yield shard
        now = time.monotonic()
        if now - told >= _QUIET or done == len(wanted):
            logger.info("%s: %d of %d shards %s, %.0f s", what, done, len(wanted), done_to,
                        now - began)
            told = now


def copy_shard(store: Store, shard: Shard, out: Store, target: Shard) -> None:
    """Copies one shard to a place in another store, and holds it against its checksum.

    Raises:
        StoreError: its bytes are not those that its sidecar tells of.
    """
    data = store.place.fetch(f"{shard.name}.array_record").read_bytes()
    sidecar = store.place.read(f"{shard.name}.json")
    if sidecar != make_sidecar(shard, data, store.manifest):
        raise StoreError(f"{shard} of the store {store.path} is damaged: its sidecar says "
                         f"{sidecar.decode(errors='replace')}, and its {len(data)} bytes are "
                         f"others. Nothing of it was copied. Write it again with: "
                         f"{store.manifest.command}")
    with out.place.publish(f"{target.name}.array_record") as temporary:
        temporary.write_bytes(data)
        out.place.write(f"{target.name}.json", sidecar)  # before the shard, as a capture does
