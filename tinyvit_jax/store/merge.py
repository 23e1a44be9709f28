"""One store out of several: the parts of one capture, more passes, or more images.

Stores are merged where everything that decides the meaning of a target is the same in all of them;
what differs otherwise is named, with both values. There are three ways:

- The parts of one capture, made at sites that share no folder: their shards come together, byte for
  byte.
- Passes of the same images with other seeds: pass after pass, in the order of the stores.
- Stores of other images (`extend`): pass p of the result is a random interleaving of the passes p.
  Which store gives the next unit (a view, or a pair where pairs are mixed) is drawn with the chance
  of what each has left, so that uniformly random orders make a uniformly random order of all.

Every view keeps its seed and its target.
"""

import dataclasses
import filecmp
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit_jax.data import draws
from tinyvit_jax.data.source import ImageSource
from tinyvit_jax.store.manifest import Manifest, StoreError, compare, flatten
from tinyvit_jax.store.rows import (
    Locate,
    Rows,
    carry_replay,
    check_complete,
    check_distinct,
    check_source,
    copy_shards,
    create,
    fill,
    find_keys,
    identify,
    is_paired,
    read_keys,
)
from tinyvit_jax.store.shards import Shard
from tinyvit_jax.store.store import Store

logger = logging.getLogger("tinyvit_jax")

MAX_KL = 1e-3  # between two captures of a shard: ten times what another backend's floats cost

_ORDER_SEED = 0x3E46E  # of the interleaving; frozen, as a merge that was killed goes on with it
_CHUNK = 1 << 20  # units whose store is drawn at once
_NAMED = 3  # keys that a message names

_SPLITS = (" A folder without train/ and val/ holds out a tenth of its images by their position, "
           "so that of all images holds out others than its parts: give every folder a train/ and "
           "a val/.")

# What two stores may differ in, because it decides nothing about a target.
_FREE = ("passes", "checksum", "replay", "image_set.name")
# And where they are put together view by view.
_CUT = ("keys", "format_version", "origin", "data_seed", "shard_views", "block_views")


def merge(stores: Sequence[Store], path: str | Path) -> Store:
    """Puts stores of the same images together; goes on where it was killed.

    Formula stores of one data seed are parts of one capture, and so are stores of one origin that
    hold the same views at the same places: what none of them has stays missing. Any others give
    their passes one after another.

    Args:
        stores: two or more, the first of which decides how the result is cut.
        path: of the new store.

    Returns:
        The new store.

    Raises:
        StoreError: the stores differ in what a target means, hold other targets for the same views,
            or the same views twice; and where `path` holds another store.
    """
    _check_number(stores)
    first, *others = stores
    if all(_are_parts(first, other) for other in others):
        return _unite(stores, path)
    return _append(stores, path)


def _check_number(stores: Sequence[Store]) -> None:
    if len(stores) < 2:
        raise StoreError(f"A merge needs two stores or more, found {len(stores)}.")


def _are_parts(first: Store, other: Store) -> bool:
    """Whether two stores hold the same views, as far as they hold them.

    Of stores with keys of their own the origin does not tell: two imports of different files have
    the same. A shard that both hold does; two that hold none in common can be nothing but parts, as
    passes follow one another only where they are whole.
    """
    a, b = first.manifest, other.manifest
    if "formula" in (a.keys, b.keys):
        return a.keys == b.keys and a.data_seed == b.data_seed
    if a.origin != b.origin:
        return False
    both = min(_find_held(first) & _find_held(other), default=None)
    return both is None or all(
        np.array_equal(x, y) for x, y in zip(*(
            store.keys(both.pass_number, both.start, both.stop) for store in (first, other)),
            strict=True))


def _find_held(store: Store) -> set[Shard]:
    """The shards that are there."""
    return set(store.shards()) - set(store.missing())


def _check_alike(first: Store, other: Store, free: tuple[str, ...], remedy: str) -> None:
    """Raises StoreError naming every field in which two stores may not differ and do."""
    if _is_one_file(first.manifest, other.manifest):
        free = (*free, "teacher.name")

    def decisive(store: Store) -> dict[str, Any]:
        return {name: value for name, value in flatten(store.manifest.to_dict()).items()
                if not any(name == f or name.startswith(f + ".") for f in free)}

    compare(other.path, decisive(first), decisive(other),
            f"(\"here\" is the store {first.path}, which it was to be merged with.) {remedy}")


def _is_one_file(a: Manifest, b: Manifest) -> bool:
    """Whether two teachers have the same weights, whatever their files are called.

    The weights of a function, module:name, are a hash of its module: there the name tells which.
    """
    weights = a.teacher.get("weights")
    return bool(weights) and weights == b.teacher.get("weights") and not any(
        ":" in m.teacher.get("name", "") for m in (a, b))


def _unite(stores: Sequence[Store], path: str | Path) -> Store:
    """The shards of all stores together, byte for byte."""
    first, *others = stores
    for other in others:
        _check_alike(first, other, _FREE, "Parts of one capture come from one config and one "
                     "teacher: capture again what differs.")
    _check_replays(stores)
    most = max(stores, key=lambda store: store.manifest.passes).manifest
    out = create(path, dataclasses.replace(
        most, image_set=first.manifest.image_set,
        replay=next((s.manifest.replay for s in stores if s.manifest.replay), {})))
    held = [_find_held(store) for store in stores]

    def find(shard: Shard) -> tuple[Store, Shard]:
        holders = [s for s, there in zip(stores, held, strict=True) if shard in there]
        for other in holders[1:]:
            _check_same(holders[0], other, shard)
        return holders[0], shard

    known = set().union(*held)
    copy_shards(out, [shard for shard in out.missing() if shard in known], find, "merge")
    lost = out.missing()
    if lost:
        logger.info("merge: %d of %d shards are in none of the stores, the first: %s. Capture them "
                    "with --config.store.path=%s", len(lost), len(out.shards()), lost[0], out.path)
    return out


def _check_replays(stores: Sequence[Store]) -> None:
    """Raises StoreError where two stores remember other pixels of the same views."""
    told: dict[tuple[int, ...], tuple[str, Store]] = {}
    for store in stores:
        replay = store.manifest.replay
        for view, digest in zip(replay.get("views", []), replay.get("sha256", []), strict=True):
            before, first = told.setdefault(tuple(view), (digest, store))
            if before != digest:
                raise StoreError(
                    f"The stores {first.path} and {store.path} were captured of other pixels: of "
                    f"the view at (pass, position) {tuple(view)}, replay.sha256 is {before!r} in "
                    f"the first and {digest!r} in the second. Their image decoders differ "
                    f"({first.manifest.replay.get('versions')}, {replay.get('versions')}), or the "
                    f"images do. Capture one of them again with what the other was captured with.")


def _check_same(a: Store, b: Store, shard: Shard) -> None:
    """Raises StoreError unless a shard says the same in two stores."""
    name = f"{shard.name}.array_record"
    if filecmp.cmp(a.place.fetch(name), b.place.fetch(name), shallow=False):
        return
    largest = 0.0
    size = a.manifest.block_views
    for start in range(shard.start, shard.stop, size):
        block = (shard.pass_number, start, min(start + size, shard.stop))
        keys = read_keys(a, *block)
        largest = max(largest, float(divergence(a.read(*block, keys), b.read(*block, keys),
                                                len(a.manifest.class_names)).max()))
    if not largest <= MAX_KL:
        raise StoreError(f"{shard} has other targets in {a.path} than in {b.path}: KL up to "
                         f"{largest:.2e} between them, at most {MAX_KL:.0e} expected of the same "
                         f"teacher. Find out which is right with tools/check_store.py, and remove "
                         f"that shard from the other store.")


def divergence(p: tuple[np.ndarray, np.ndarray], q: tuple[np.ndarray, np.ndarray],
               num_classes: int) -> np.ndarray:
    """KL(p || q) in nats over the K classes of p and all others as one: float64 [n].

    Args:
        p, q: stored targets, index int32 [n, K] and prob float32 [n, K].
        num_classes: C.
    """
    index, prob = q
    view = np.arange(len(index))[:, None]
    order = np.argsort(index, 1)
    # One search for all views: the classes of view v are moved to [v C, (v + 1) C).
    held = (np.take_along_axis(index, order, 1) + view * num_classes).ravel()
    wanted = p[0] + view * num_classes
    place = np.minimum(np.searchsorted(held, wanted), held.size - 1)
    rest = np.maximum(1 - prob.sum(1, dtype=np.float64), 0) / max(num_classes - index.shape[1], 1)
    other = np.where(held[place] == wanted, np.take_along_axis(prob, order, 1).ravel()[place],
                     rest[:, None])
    own, other = (np.maximum(np.concatenate([x, 1 - x.sum(1, keepdims=True)], 1), 1e-12)
                  for x in (p[1].astype(np.float64), other))
    return (own * np.log(own / other)).sum(1)


def _append(stores: Sequence[Store], path: str | Path) -> Store:
    """The passes of all stores one after another."""
    first, *others = stores
    for other in others:
        _check_alike(first, other, _FREE + _CUT, "Make both of the same length and K first, with "
                     "tools/edit_store.py --do=subset, or merge stores of one teacher and one "
                     "config alone.")
    for store in stores:
        check_complete(store)
    check_distinct(stores)
    origins = [(store, p) for store in stores for p in range(store.manifest.passes)]
    offsets = np.cumsum([0, *(store.manifest.passes for store in stores)]).tolist()
    replays = [(s.manifest.replay, _shift(offset)) for s, offset in zip(stores, offsets,
                                                                      strict=False)]
    m = dataclasses.replace(
        first.manifest, keys="stored", data_seed=0, passes=len(origins),
        replay=carry_replay(replays), origin={
            "format": "edited", "edit": "merge",
            "from": [identify(s.manifest) for s in stores],
            "passes": [s.manifest.passes for s in stores]})
    out = create(path, m)

    def is_cut_alike(shard: Shard) -> bool:
        n = origins[shard.pass_number][0].manifest
        return n.keys == "stored" and (n.shard_views, n.block_views) == (m.shard_views,
                                                                         m.block_views)

    def find(shard: Shard) -> tuple[Store, Shard]:
        store, p = origins[shard.pass_number]
        return store, shard._replace(pass_number=p)

    copy_shards(out, list(filter(is_cut_alike, out.missing())), find, "merge")
    fill(out, lambda shard: _copied_rows(*origins[shard.pass_number], shard, m.block_views),
         "merge")
    return out


def _shift(offset: int) -> Locate:
    """Where the views of a store are once its passes come after others."""
    return lambda pass_number, position: (pass_number + offset, position)


def _copied_rows(store: Store, pass_number: int, shard: Shard, size: int) -> Iterator[Rows]:
    """The rows of a pass at the positions of a shard."""
    for start in range(shard.start, shard.stop, size):
        stop = min(start + size, shard.stop)
        keys = read_keys(store, pass_number, start, stop)
        yield (keys, *store.read(pass_number, start, stop, keys))


def extend(stores: Sequence[Store], sources: Sequence[ImageSource], union: ImageSource,
           path: str | Path) -> Store:
    """Merges stores of different images into one of all of them; goes on where it was killed.

    An image is known by its key. Class names and labels of all sources are the same; the images of
    `sources` have no key in common, and `union` has the images of all of them and no others.

    Args:
        stores: two or more, of one teacher, spec and list of classes, with as many passes each; the
            first decides how the result is cut.
        sources: the images of each store, in the order of the stores.
        union: all the images.
        path: of the new store.

    Returns:
        The new store, complete, of the images of `union`.

    Raises:
        StoreError: the stores or the images do not go together; and where `path` holds another
            store.
    """
    _check_number(stores)
    first, *others = stores
    for other in others:
        _check_alike(first, other, ("image_set", "views_per_pass", "checksum", "replay", *_CUT),
                     "Cut both to the same passes and K first, with tools/edit_store.py "
                     "--do=subset, or merge stores of one teacher and one config alone.")
    for store, source in zip(stores, sources, strict=True):
        check_source(store, source)
        check_complete(store)
    maps = map_images(sources, union)
    deal = _Deal(stores, maps)
    m = dataclasses.replace(
        first.manifest, keys="stored", data_seed=0, views_per_pass=deal.units * deal.unit,
        image_set={"name": union.name, "fingerprint": union.fingerprint, "images": len(union)},
        replay=carry_replay([(s.manifest.replay, deal.locator(i))
                                  for i, s in enumerate(stores)]),
        origin={"format": "edited", "edit": "extend",
                "from": [identify(s.manifest) for s in stores]})
    out = create(path, m)
    fill(out, lambda shard: deal.rows(shard, m.block_views), "extend")
    return out


def map_images(sources: Sequence[ImageSource], union: ImageSource) -> list[np.ndarray]:
    """Where the images of each source are in the union: int64 [len(source)] each.

    Raises:
        StoreError: classes differ, an image is in two sources or not in the union, or the union has
            images that no source has.
    """
    keys = union.keys()
    taken = np.full(len(keys), -1, np.int32)
    maps = []
    for number, source in enumerate(sources):
        if tuple(source.class_names) != tuple(union.class_names):
            raise StoreError(f"{union.name} has {len(union.class_names)} classes and {source.name} "
                             f"{len(source.class_names)}, or others: a target means the same in "
                             f"one list of classes alone. Put a folder for every class into both.")
        own = source.keys()
        place = find_keys(keys, own)
        _refuse(own[place < 0], f"images of {source.name} are not in {union.name}", _SPLITS)
        _refuse(own[taken[place] >= 0],
                f"images of {source.name} are also in one of the other sources; leave them out of "
                f"one of the stores, with tools/edit_store.py --do=subset --images=FILE")
        taken[place] = number
        maps.append(place)
    _refuse(keys[taken < 0], f"images of {union.name} are in none of "
                             f"{', '.join(source.name for source in sources)}", _SPLITS)
    return maps


def _refuse(keys: np.ndarray, what: str, advice: str = "") -> None:
    """Raises StoreError if any key is there to complain of."""
    if len(keys):
        names = ", ".join(key.decode() for key in keys[:_NAMED].tolist())
        raise StoreError(f"{len(keys):,} {what}. The first: {names}.{advice}")


class _Deal:
    """Which store and which of its units stand at each place of each pass of a merged store.

    Place q of the units of a pass is given to the store that holds element s(q) of all units
    written one store after another, s being a seeded permutation. That draws store i with the
    chance of what it has left, needs no state, and is the same whenever it is asked for.
    """

    def __init__(self, stores: Sequence[Store], maps: Sequence[np.ndarray]):
        self.stores, self.maps = stores, maps
        self.unit = 2 if is_paired(stores[0].manifest) else 1
        views = [s.manifest.views_per_pass for s in stores]
        if any(v % self.unit for v in views):
            raise StoreError(f"The stores mix views in pairs and have an odd number of them in a "
                             f"pass ({views}): a manifest.json is not that of its capture.")
        self.ends = np.cumsum([v // self.unit for v in views])
        self.units = int(self.ends[-1])
        self._dealt: tuple[int, np.ndarray] | None = None

    def labels(self, pass_number: int) -> np.ndarray:
        """The store of each unit of a pass: int32 [units]; kept for the pass last asked for."""
        if self._dealt is None or self._dealt[0] != pass_number:
            seed = draws.hash64(_ORDER_SEED, pass_number)
            given = np.empty(self.units, np.int32)
            for start in range(0, self.units, _CHUNK):
                q = np.arange(start, min(start + _CHUNK, self.units))
                given[start:start + _CHUNK] = np.searchsorted(
                    self.ends, draws.shuffled(q, self.units, seed), "right")
            self._dealt = pass_number, given
        return self._dealt[1]

    def rows(self, shard: Shard, size: int) -> Iterator[Rows]:
        """The rows of a shard, block by block; each store is read from front to back."""
        labels = self.labels(shard.pass_number)
        done = [int((labels[:shard.start // self.unit] == i).sum()) * self.unit
                for i in range(len(self.stores))]
        for start in range(shard.start, shard.stop, size):
            stop = min(start + size, shard.stop)
            of = labels[start // self.unit:stop // self.unit].repeat(self.unit)
            yield self._block(shard.pass_number, of, done)

    def _block(self, pass_number: int, of: np.ndarray, done: list[int]) -> Rows:
        """The next views of the stores that `of` names, int32 [n]; moves `done` on."""
        image, seed = np.empty(len(of), np.int64), np.empty(len(of), np.uint32)
        top_k = self.stores[0].manifest.top_k
        index = np.empty((len(of), top_k), np.int32)
        prob = np.empty((len(of), top_k), np.float32)
        for i, store in enumerate(self.stores):
            here = np.flatnonzero(of == i)
            if len(here):
                first, done[i] = done[i], done[i] + len(here)
                keys = read_keys(store, pass_number, first, done[i])
                index[here], prob[here] = store.read(pass_number, first, done[i], keys)
                image[here], seed[here] = self.maps[i][keys[0]], keys[1]
        return (image, seed), index, prob

    def locator(self, number: int) -> Locate:
        """Where the views of one store are now."""
        def locate(pass_number: int, position: int) -> tuple[int, int]:
            unit, offset = divmod(position, self.unit)
            place = np.flatnonzero(self.labels(pass_number) == number)[unit]
            return pass_number, int(place) * self.unit + offset

        return locate
