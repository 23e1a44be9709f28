"""New stores out of a store: fewer passes, images, classes or a smaller K; and its rows as a table.

A store that is made by editing keeps the keys of its views (`Manifest.keys`), and its manifest
says of which store it was made (`Manifest.origin`); the first passes of a formula store alone stay
one. What can be copied is copied byte for byte: those, and whole passes of a store of stored keys.
Everything else is decoded and encoded again: in float16 mode targets stay equal to the bit, in
compact mode they are rounded once more, about as much as the first time at worst.

Where views are mixed in pairs, the target of both is of the pixels of both: a pair stays where both
its images do, and only there.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyvit_jax.data.order import AnyOrder
from tinyvit_jax.data.source import ImageSource
from tinyvit_jax.data.spec import Spec, from_dict
from tinyvit_jax.store import files
from tinyvit_jax.store.blocks import Keys
from tinyvit_jax.store.manifest import Manifest, StoreError, write_manifest
from tinyvit_jax.store.rows import (
    Rows,
    carry_replay,
    check_complete,
    check_source,
    copy_shards,
    create,
    fill,
    find_keys,
    identify,
    is_paired,
    make_order,
    read_keys,
    read_labels,
    regroup,
)
from tinyvit_jax.store.shards import Shard
from tinyvit_jax.store.store import Store

logger = logging.getLogger("tinyvit_jax")

_NAMED = 3  # keys that a message names


class Pixels(NamedTuple):
    """How to look at views, which a store by itself cannot: functions of the floors above it."""

    open_images: Callable[[], ImageSource]
    check: Callable[[Store, Any, Spec, str], None]  # matching.check_replay
    make: Callable[[ImageSource, Spec, AnyOrder], dict[str, Any]]  # matching.make_replay
    mode: str = "refuse"  # store.replay of the config


def subset(store: Store, path: str | Path, source: ImageSource | None = None, *,
           passes: Sequence[int] | None = None, images: np.ndarray | str | Path | None = None,
           classes: Sequence[str] | None = None, top_k: int | None = None,
           pixels: Pixels | None = None) -> Store:
    """Makes a store of some views of another, in their order; goes on where it was killed.

    Classes, targets and image set stay those of the whole: training on the same images shows the
    views that the new store has. Passes have one length, that of the shortest.

    Args:
        store: what is cut; the shards of the passes asked for must be there.
        path: of the new store.
        source: the images of the store; needed for a file of keys and for classes.
        passes: which, in the order of the new store; None = all.
        images: indices int [n] into the source, or a file with a key a line; None = all.
        classes: names; the images that have one of these labels. None = all.
        top_k: how many classes of a view to keep; None = as many as there are.
        pixels: for a subset in which no view stays whose pixels the store has hashes of: those it
            has are checked here, and others are hashed. None = the new store has none.

    Returns:
        The new store, complete.

    Raises:
        StoreError: something that the store or the source has not, a missing shard, or nothing
            that stays; views that have other pixels here; and where `path` holds another store.
    """
    m = store.manifest
    passes = _check_passes(m, passes)
    k = m.top_k if top_k is None else top_k
    if not 1 <= k <= m.top_k:
        raise StoreError(f"A subset of top_k={k} cannot be cut from {store.path}, which holds "
                         f"top_k={m.top_k}. Ask for 1 to {m.top_k}.")
    check_complete(store, passes)
    chosen = choose_images(store, source, images, classes)
    first = passes == list(range(len(passes)))
    if chosen is None and k == m.top_k and (m.keys == "stored" or first):
        made, write = _plan_copies(store, passes)
    else:
        made, write = _plan_rows(store, passes, chosen, k)
    seen = None
    if m.replay and not made.replay and pixels is not None:  # before anything is written
        seen = _look(store, path, pixels)
    out = create(path, made)
    write(out)
    if seen is None or pixels is None or out.manifest.replay:
        return out
    replay = pixels.make(seen, from_dict(m.augment), make_order(out))
    known = dataclasses.replace(out.manifest, replay=replay)
    write_manifest(out.place, known)
    return Store(out.place, known)


Planned = tuple[Manifest, Callable[[Store], None]]  # of a new store, and what writes its shards


def _plan_rows(store: Store, passes: list[int], chosen: np.ndarray | None, k: int) -> Planned:
    """Views that are decoded and encoded again."""
    m, plan = store.manifest, _plan(store, passes, chosen)
    first = passes == list(range(len(passes)))
    made = dataclasses.replace(m, passes=len(passes), views_per_pass=plan.views, top_k=k,
                               replay=carry_replay([(m.replay, plan.locate)]))
    if m.keys == "stored" or chosen is not None or not first:
        kept = b"" if chosen is None else np.packbits(chosen).tobytes()
        made = dataclasses.replace(made, keys="stored", data_seed=0, origin={
            "format": "edited", "edit": "subset", "from": [identify(m)], "passes": passes,
            "images": hashlib.sha256(kept).hexdigest() if kept else "all"})
    return made, lambda out: fill(
        out, lambda shard: regroup(plan.rows(shard, k), made.block_views), "subset")


def _plan_copies(store: Store, passes: list[int]) -> Planned:
    """Whole passes of a store, byte for byte."""
    m = store.manifest

    def locate(pass_number: int, position: int) -> tuple[int, int] | None:
        return (passes.index(pass_number), position) if pass_number in passes else None

    origin = {"format": "edited", "edit": "subset", "from": [identify(m)], "passes": passes,
              "images": "all"} if m.keys == "stored" else {}
    made = dataclasses.replace(
        m, passes=len(passes), replay=carry_replay([(m.replay, locate)]), origin=origin)
    return made, lambda out: copy_shards(
        out, out.missing(), lambda s: (store, s._replace(pass_number=passes[s.pass_number])),
        "subset")


class _Shown(NamedTuple):
    """The images of a store and the order it shows them in."""

    train: ImageSource
    order: AnyOrder


def _look(store: Store, path: str | Path, pixels: Pixels) -> ImageSource | None:
    """The images of a store, if they are here and its views look here as at its capture.

    Else None, and a warning that the subset at `path` has no hashes of pixels; other pixels raise
    StoreError where `pixels.mode` is "refuse".
    """
    try:
        images = pixels.open_images()
        check_source(store, images)
        spec = from_dict(store.manifest.augment)
    except (ValueError, OSError, ImportError) as error:
        logger.warning(
            "subset: no view stays whose pixels %s has a hash of, and its images are not at hand "
            "(%s). Without them nobody can check the pixels that a training from %s will show. "
            "Give them by --config.data.source and run this again: it adds hashes.",
            store.path, error, path)
        return None
    try:
        pixels.check(store, _Shown(images, make_order(store)), spec, "refuse")
    except StoreError as error:
        if pixels.mode == "refuse":
            raise
        logger.warning("%s The subset %s is made without hashes of pixels.", error, path)
        return None
    return images


def describe(store: Store) -> str:
    """What a store has become, and how to train from it, as a text for people."""
    m, missing = store.manifest, store.missing()
    state = f"{len(missing)} shards are missing" if missing else "complete"
    return (f"{store.path}: {state}, {m.passes} passes of {m.views_per_pass:,} views, "
            f"{store.bytes_per_view():.1f} bytes a view. Train from it with "
            f"--config.store.path={store.path} --config.store.passes={m.passes} "
            f"--config.store.top_k={m.top_k}")


def _check_passes(manifest: Manifest, passes: Sequence[int] | None) -> list[int]:
    """The passes asked for, each once and there."""
    every = range(manifest.passes)
    if passes is None:
        return list(every)
    wanted = [int(p) for p in passes]
    if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(every):
        raise StoreError(f"passes={wanted} cannot be taken: expected numbers from 0 to "
                         f"{manifest.passes - 1}, each once.")
    return wanted


def choose_images(store: Store, source: ImageSource | None, images: np.ndarray | str | Path | None,
                  classes: Sequence[str] | None) -> np.ndarray | None:
    """Which images stay: bool [images of the set]; None for all.

    Args:
        store: whose images they are.
        source: the images; needed for a file of keys and for classes.
        images: indices, or a file with a key a line; None = all.
        classes: names of labels; None = all.
    """
    if images is None and classes is None:
        return None
    chosen = np.ones(int(store.manifest.image_set.get("images", 0)), bool)
    if source is not None:
        check_source(store, source)
    elif classes is not None or isinstance(images, str | Path):
        raise StoreError(f"Keys and classes of images are known by the images alone: give those of "
                         f"the store {store.path} by --config.data.source.")
    if isinstance(images, str | Path):
        assert source is not None
        images = _find_listed(Path(images), source)
    if images is not None:
        images = np.asarray(images)
        if images.dtype.kind not in "iu" or images.ndim != 1 or (
                len(images) and not 0 <= images.min() <= images.max() < len(chosen)):
            raise StoreError(f"images must be indices in [0, {len(chosen)}), found {images}")
        listed = np.zeros(len(chosen), bool)
        listed[images] = True
        chosen &= listed
    if classes is not None:
        assert source is not None
        unknown = sorted(set(classes) - set(source.class_names))
        if unknown:
            raise StoreError(f"{source.name} has no class {', '.join(unknown[:_NAMED])}. Its "
                             f"classes are {', '.join(source.class_names[:8])} ...")
        numbers = [i for i, name in enumerate(source.class_names) if name in set(classes)]
        chosen &= np.isin(read_labels(source), numbers)
    return chosen


def _find_listed(path: Path, source: ImageSource) -> np.ndarray:
    """The indices of the keys in a file, a key a line: int64 [n]."""
    try:
        wanted = [line.encode() for line in path.read_text(encoding="utf-8").splitlines() if line]
    except OSError as error:
        raise StoreError(f"The list of images {path} cannot be read: {error.strerror}.") from error
    found = find_keys(source.keys(), np.array(wanted, "S"))
    strangers = [wanted[i].decode() for i in np.flatnonzero(found < 0)]
    if strangers:
        raise StoreError(f"{path}: {len(strangers):,} of its {len(wanted):,} keys have no image in "
                         f"{source.name}, the first: {'; '.join(strangers[:_NAMED])}. A key is a "
                         f"path below the folder, as \"class/image.jpg\".")
    return found


class Plan(NamedTuple):
    """Which views of a store stay, counted shard by shard: little memory however many they are."""

    store: Store
    passes: list[int]
    chosen: np.ndarray | None  # bool [images]; None = all
    ends: list[np.ndarray]  # of each pass, int64 [shards + 1]: views that stay before each shard
    views: int  # of each pass

    def stays(self, pass_number: int, start: int, stop: int) -> tuple[Keys, np.ndarray]:
        """Keys of positions [start, stop) of a pass of the store, and which stay: bool [n]."""
        keys = read_keys(self.store, pass_number, start, stop)
        if self.chosen is None:
            return keys, np.ones(stop - start, bool)
        return keys, _keep_pairs(self.chosen[keys[0]], is_paired(self.store.manifest))

    def rows(self, shard: Shard, top_k: int) -> Iterator[Rows]:
        """The rows of a shard of the new store, a block of the old one at a time."""
        m = self.store.manifest
        p, ends = self.passes[shard.pass_number], self.ends[shard.pass_number]
        number = int(np.searchsorted(ends, shard.start, "right")) - 1
        skipped, wanted = shard.start - int(ends[number]), shard.stop - shard.start
        for first in range(number * m.shard_views, m.views_per_pass, m.block_views):
            last = min(first + m.block_views, m.views_per_pass)
            keys, stay = self.stays(p, first, last)
            every = np.flatnonzero(stay)
            rows = every[skipped:][:wanted]
            skipped = max(skipped - len(every), 0)
            if len(rows):
                index, prob = self.store.read(p, first, last, keys)
                yield ((keys[0][rows], keys[1][rows]), index[rows, :top_k], prob[rows, :top_k])
                wanted -= len(rows)
            if not wanted:
                return

    def locate(self, pass_number: int, position: int) -> tuple[int, int] | None:
        """The new pass and position of a view of the store, if it stays."""
        if pass_number not in self.passes:
            return None
        m, at = self.store.manifest, self.passes.index(pass_number)
        number, offset = divmod(position, m.shard_views)
        start = position - offset
        _, stay = self.stays(pass_number, start, min(start + m.shard_views, m.views_per_pass))
        new = int(self.ends[at][number]) + int(stay[:offset].sum())
        return (at, new) if stay[offset] and new < self.views else None


def _keep_pairs(stay: np.ndarray, paired: bool) -> np.ndarray:
    """Which views stay where only whole pairs do: bool [n] -> bool [n]."""
    return stay.reshape(-1, 2).all(1).repeat(2) if paired else stay


def _plan(store: Store, passes: list[int], chosen: np.ndarray | None) -> Plan:
    """Counts what stays, and says what is lost to pairs and to the shortest pass."""
    m = store.manifest
    paired = is_paired(m)
    if paired and m.views_per_pass % 2:
        raise StoreError(f"The store {store.path} mixes views in pairs and has an odd number of "
                         f"them in a pass ({m.views_per_pass}): its manifest.json is not that of "
                         f"the capture. Put back a copy of it.")
    starts = np.append(np.arange(0, m.views_per_pass, m.shard_views), m.views_per_pass)
    if chosen is None:
        return Plan(store, passes, None, [starts] * len(passes), m.views_per_pass)
    ends, alone = [], 0
    for p in passes:
        counts = [0]
        for start, stop in itertools.pairwise(starts):
            stay = chosen[read_keys(store, p, int(start), int(stop))[0]]
            counts.append(int(_keep_pairs(stay, paired).sum()))
            alone += int(stay.sum()) - counts[-1]
        ends.append(np.cumsum(counts))
    views = min(int(e[-1]) for e in ends)
    logger.info("subset: %s of %s images; %s views a pass", f"{int(chosen.sum()):,}",
                f"{len(chosen):,}", f"{views:,}")
    if alone:
        logger.info("subset: %s views of these images are left out because their partner in a "
                    "mixed pair is of another image", f"{alone:,}")
    cut = sum(int(e[-1]) - views for e in ends)
    if cut:
        logger.info("subset: %s views are left out to cut all passes to the length of the shortest",
                    f"{cut:,}")
    if not views:
        raise StoreError(f"A pass of the subset would have no view: none of the passes {passes} of "
                         f"{store.path} shows {'pairs of' if paired else ''} the images asked for. "
                         f"Ask for more images.")
    return Plan(store, passes, chosen, ends, views)


def export(store: Store, path: str | Path, passes: Sequence[int] | None = None,
           source: ImageSource | None = None) -> int:
    """Writes views and targets as a Parquet file, a row group for each shard.

    The columns: pass int32, position int64, image int64, seed uint32; key and label as text, with a
    source; index list<int32> and prob list<float> of the K classes, descending; left_over float.
    The manifest of the store is in the file's metadata under "tinyvit_jax".

    Args:
        store: what is exported; the shards of the passes must be there.
        path: of the file, replaced where it exists; it is there whole or not at all.
        passes: which; None = all.
        source: the images, for their keys and labels.

    Returns:
        The number of views.

    Raises:
        StoreError: a shard is missing or damaged, or pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise StoreError("A Parquet file needs pyarrow. Install it with: pip install "
                         "'.[parquet]'") from error

    m, path = store.manifest, Path(path)
    numbers = set(_check_passes(m, passes))
    check_complete(store, numbers)
    columns = [("pass", pa.int32()), ("position", pa.int64()), ("image", pa.int64()),
               ("seed", pa.uint32()), ("index", pa.list_(pa.int32())),
               ("prob", pa.list_(pa.float32())), ("left_over", pa.float32())]
    if source is not None:
        check_source(store, source)
        columns[4:4] = [("key", pa.string()), ("label", pa.string())]
        names, keys, labels = pa.array(source.class_names), source.keys(), read_labels(source)
    schema = pa.schema(columns, {"tinyvit_jax": json.dumps(m.to_dict())})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = files.temporary_path(path)
    with contextlib.ExitStack() as cleaning:
        cleaning.callback(temporary.unlink, missing_ok=True)
        with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for shard in (s for s in store.shards() if s.pass_number in numbers):
                (image, seed), index, prob = _read_shard(store, shard)
                rows = {"pass": np.full(len(image), shard.pass_number, np.int32),
                        "position": np.arange(shard.start, shard.stop), "image": image,
                        "seed": seed, "index": _lists(index), "prob": _lists(prob),
                        "left_over": left_over(prob)}
                if source is not None:
                    rows["key"] = pa.array(keys[image].tolist(), pa.binary()).cast(pa.string())
                    rows["label"] = names.take(pa.array(labels[image]))
                writer.write_table(pa.table(rows, schema), row_group_size=len(image))
        files.sync(temporary)
        os.replace(temporary, path)
    return len(numbers) * m.views_per_pass


def left_over(prob: np.ndarray) -> np.ndarray:
    """The mass outside the top K: float32 [n, K] -> float32 [n], never below 0."""
    return np.maximum(1 - prob.sum(1, dtype=np.float64), 0).astype(np.float32)


def _read_shard(store: Store, shard: Shard) -> Rows:
    """All rows of one shard."""
    keys = read_keys(store, shard.pass_number, shard.start, shard.stop)
    return (keys, *store.read(shard.pass_number, shard.start, shard.stop, keys))


def _lists(values: np.ndarray) -> Any:
    """The rows of [n, K] as an array of lists."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(
        np.arange(0, values.size + 1, values.shape[1], dtype=np.int32),
        np.ascontiguousarray(values).reshape(-1))
