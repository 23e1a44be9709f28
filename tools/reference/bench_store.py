"""Measures the store against the original's files: bytes, error, writing and reading.

All in one run, on one CPU (where the system can pin a process), the contenders of a race by turns,
on files that were just written and so lie in the page cache. Targets come from a pool of distinct
views of a made-up teacher, repeated until there are enough: a block is compressed by itself, and no
file holds fewer bytes for it.
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reference import original_logits
from reference.bench_timing import one_cpu, race, race_rows, speed
from reference.synthetic_teachers import KINDS, Teacher, make_teacher, measure_error
from tinyvit_jax.data.order import Order
from tinyvit_jax.store.manifest import Manifest, choose_block_views
from tinyvit_jax.store.store import Store, create_store

SHARD = Manifest.shard_views  # by default
BATCH = 128  # images of one GPU in the original's distillation on 22k
CHUNK = SHARD  # views that a reader reads in its turn: a file
_POOL, _SMALL_POOL = 4096, 1024  # distinct views in a race, and where only bytes are counted
_ROUNDS = 5  # of a race, at the least
_ORIGINAL = "original"

Keys = tuple[np.ndarray, np.ndarray]  # image int64 [n], seed uint32 [n]


class Settings(NamedTuple):
    """How much is measured."""

    views: int = 200_000
    top_k: int = 100
    classes: int = 21_841
    seconds: float = 2.0  # that the readers read for, each, about
    images: int = 14_197_122  # of the store that is opened
    passes: int = 90
    keys: int = 1_000_000  # of the original's epoch that is opened


MEANINGS = {
    "views": "that are written and read",
    "top_k": "classes of a view",
    "classes": "in all",
    "seconds": "that each reader reads for, about",
    "images": "of the whole store that is opened",
    "passes": "of that store",
    "keys": "of the original's epoch that is opened",
}


def check_settings(settings: Settings) -> None:
    """Raises ValueError for what cannot be measured."""
    for name, lowest in {**dict.fromkeys(MEANINGS, 1), "views": 4096, "classes": 16,
                         "seconds": 0.0}.items():
        if getattr(settings, name) < lowest:
            raise ValueError(f"--{name}={getattr(settings, name)}: expected {lowest} or more")
    if settings.top_k >= settings.classes:
        raise ValueError(f"--top_k={settings.top_k}: expected less than "
                         f"--classes={settings.classes}")


def measure(settings: Settings, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes, reads and counts.

    Args:
        settings: at least as many views as a block has.
        folder: for the files that are measured, about 0.5 GB at the default size.
        say: takes a line of progress.

    Returns:
        The rows of "bytes", "write" and "read", as JSON knows them.
    """
    with one_cpu() as cpus:
        pool = min(_POOL, settings.views)
        say(f"draws {pool:,} views of {settings.classes:,} classes")
        teacher = make_teacher(KINDS[0], pool, settings.classes, settings.top_k)
        keys = Order(seed=0, num_images=settings.views, paired=False).keys(
            np.zeros(settings.views, np.int64), np.arange(settings.views))
        names = image_names(keys[0], settings.classes)
        # A quarter of the views in float16 mode: it differs from compact in the values alone.
        block = choose_block_views(settings.top_k)
        some = max(settings.views // 4 // block, 1) * block
        stores = {"compact": make_store(folder / "compact", teacher, settings.views),
                  "float16": make_store(folder / "float16", teacher, some, "float16")}
        say(f"writes {settings.views:,} views")
        written = race_writers(stores, folder, teacher, keys, names, cpus)
        say("reads them")
        read = race_readers(stores, folder, settings, keys, names)
        sizes = [_size_row(teacher, "store, " + mode, store.bytes_per_view(), SHARD,
                           _read_pool(store, len(teacher.index)))
                 for mode, store in stores.items()]
        size = sum(file.stat().st_size for file in _epoch(folder, settings.top_k).iterdir())
        sizes.append(_size_row(teacher, _ORIGINAL, size / settings.views, 0, _round(teacher)))
        del teacher
        sizes += _other_sizes(settings, folder, say)
    return {"bytes": sizes, "write": written, "read": read}


def image_names(image: np.ndarray, classes: int) -> list[str]:
    """The original's keys of images: file names for ImageNet-22k, numbers for ImageNet-1k."""
    if classes <= 1000:
        return [str(i) for i in image.tolist()]
    return [f"n{i % classes * 700 + 4475:08d}_{i // classes * 29 + i % 29}" for i in image.tolist()]


def make_store(path: Path, teacher: Teacher, views: int, mode: str = "compact", *,
               passes: int = 1, shard_views: int = SHARD) -> Store:
    """An empty store for a teacher's targets."""
    return create_store(path, Manifest(
        teacher={"name": teacher.name}, top_k=teacher.index.shape[1],
        class_names=tuple(f"n{700 * i + 4475:08d}" for i in range(teacher.classes)),
        augment={}, image_set={"name": "synthetic", "images": views}, data_seed=0, passes=passes,
        views_per_pass=views, shard_views=shard_views, codec=mode,
        block_views=choose_block_views(teacher.index.shape[1])))


def make_blocks(teacher: Teacher, keys: Keys, start: int, stop: int) -> list:
    """The contents of a shard as ready arrays."""
    blocks, size = [], choose_block_views(teacher.index.shape[1])
    for first in range(start, stop, size):
        rows = np.arange(first, min(first + size, stop))
        pool = rows % len(teacher.index)
        blocks.append(((keys[0][rows], keys[1][rows]), teacher.index[pool], teacher.prob[pool]))
    return blocks


def _epoch(folder: Path, top_k: int) -> Path:
    return original_logits.epoch_folder(folder / _ORIGINAL, top_k, 0)


def race_writers(stores: dict[str, Store], folder: Path, teacher: Teacher, keys: Keys,
                 names: list[str], cpus: set[int]) -> list[dict[str, Any]]:
    """Fills the stores and the original's epoch 0, one shard and one rank's files a turn.

    Args:
        stores: by mode; one that is full takes no further part. "compact" takes all views.
        folder: the original's files lie in "original" beneath it.
        teacher: whose targets are written.
        keys: image and seed of every view.
        names: the original's keys of them.
        cpus: beside the one that all run on; where there are, the original is given them as well.

    Returns:
        A row for each.
    """
    originals = {_ORIGINAL: set[int]()} | ({f"{_ORIGINAL}, two cores": cpus} if cpus else {})
    speeds: dict[str, list[float]] = {what: [] for what in (
        *(f"store, {mode}" for mode in stores), *originals)}
    for mode in stores:  # whatever is imported or compiled late
        size = choose_block_views(teacher.index.shape[1])
        store = make_store(folder / f"first-{mode}", teacher, size, mode)
        _write(store, store.shards()[0], make_blocks(teacher, keys, 0, size))
    for number, longest in enumerate(stores["compact"].shards()):
        for mode, store in stores.items():
            if number < len(shards := store.shards()):
                shard = shards[number]
                blocks = make_blocks(teacher, keys, shard.start, shard.stop)
                speeds[f"store, {mode}"].append(speed(partial(_write, store, shard, blocks))[0])
        rows = np.arange(longest.start, longest.stop)
        pool = rows % len(teacher.index)
        batch = (names[longest.start:longest.stop], (keys[1][rows] >> 1).astype(np.int32),
                 teacher.index[pool], teacher.prob[pool])
        for what, others in originals.items():
            epoch = original_logits.epoch_folder(folder / what, teacher.index.shape[1], 0)
            writer = original_logits.Writer(epoch, number)
            if others:
                writer.move_to(others)
            speeds[what].append(speed(partial(_write_original, writer, batch))[0])
    return race_rows(speeds, (_ORIGINAL,))


def _write(store: Store, shard: Any, blocks: list) -> int:
    store.write_shard(shard, blocks)
    return shard.stop - shard.start


def _write_original(writer: original_logits.Writer, batch: tuple) -> int:
    writer.write_batch(*batch)
    writer.close()
    return len(batch[0])


LOADED, WHOLE = "original, keys loaded", "original, keys and all"


def race_readers(stores: dict[str, Store], folder: Path, settings: Settings, keys: Keys,
                 names: list[str]) -> list[dict[str, Any]]:
    """Reads what `race_writers` wrote, CHUNK views a turn; each turn of ours opens its files anew.

    Args:
        stores: by mode.
        folder: the original's files lie in "original" beneath it.
        settings: seconds and K.
        keys: image and seed of every view, which ours are held against.
        names: the original's keys.

    Returns:
        A row for each contender.
    """
    chunk = min(CHUNK, stores["float16"].manifest.views_per_pass)
    views = original_logits.Views(folder / _ORIGINAL, names, settings.top_k)
    fresh = original_logits.Views(folder / _ORIGINAL, names, settings.top_k)
    shuffled = np.random.default_rng(0).permutation(len(names))
    first_rank = np.arange(min(SHARD, len(names)))
    compact = stores["compact"]
    turns: dict[str, Callable[[], int]] = {
        "store, compact, batches of 1,024": partial(_read, _chunks(compact, chunk), 1024, keys),
        "store, compact, batches of 256": partial(_read, _chunks(compact, chunk), 256, keys),
        "store, compact, random blocks": partial(_read, _random_blocks(compact, chunk),
                                                 compact.manifest.block_views, keys),
        "store, float16, batches of 1,024": partial(_read, _chunks(stores["float16"], chunk), 1024,
                                                    keys),
        LOADED: partial(_read_original, views, _cycle(np.arange(len(names)), chunk)),
        WHOLE: partial(_read_epoch, fresh, first_rank.tolist()),
        f"original, keys loaded, stacked to batches of {BATCH}": partial(
            _read_stacked, views, _cycle(np.arange(len(names)), chunk)),
        "original, keys loaded, in another order": partial(
            _read_original, views, _cycle(shuffled, chunk))}
    for turn in turns.values():  # opens what stays open, imports what is imported late
        turn()
    for number in range(len(names)):  # all keys
        views.read(number)
    speeds, busy = race(turns, settings.seconds, _ROUNDS)
    views.set_epoch(0)  # closes its files
    fresh.set_epoch(0)
    return [row | {"per_cpu_second": float(np.median(busy[row["what"]]))}
            for row in race_rows(speeds, (LOADED, WHOLE))]


def _cycle(order: np.ndarray, chunk: int) -> Iterator[list[int]]:
    """Whole chunks of an order, again and again."""
    starts = range(0, len(order) - chunk + 1, chunk)
    return itertools.cycle([order[start:start + chunk].tolist() for start in starts])


def _chunks(store: Store, chunk: int) -> Iterator[tuple[Store, list[tuple[int, int]]]]:
    """A store and the one range that a turn reads of it, again and again."""
    stops = range(chunk, store.manifest.views_per_pass + 1, chunk)
    return itertools.cycle([(store, [(stop - chunk, stop)]) for stop in stops])


def _random_blocks(store: Store, chunk: int) -> Iterator[tuple[Store, list[tuple[int, int]]]]:
    """A store and the whole blocks that a turn reads of it, in a random order of all."""
    size = store.manifest.block_views
    starts = np.random.default_rng(0).permutation(store.manifest.views_per_pass // size) * size
    ranges = [(start, start + size) for start in starts.tolist()]
    count = max(chunk // size, 1)
    return itertools.cycle([(store, ranges[i:i + count])
                            for i in range(0, len(ranges) - count + 1, count)])


def _read(turns: Iterator[tuple[Store, list[tuple[int, int]]]], batch: int, keys: Keys) -> int:
    store, ranges = next(turns)
    store = copy.copy(store)  # as a worker gets it: no open file, no decoded block
    views = 0
    for start, stop in ranges:
        for first in range(start, stop, batch):
            last = min(first + batch, stop)
            index, _ = store.read(0, first, last, (keys[0][first:last], keys[1][first:last]))
            views += len(index)
    return views


def _read_original(views: original_logits.Views, turns: Iterator[list[int]]) -> int:
    numbers = next(turns)
    for number in numbers:
        views.read(number)
    return len(numbers)


def _read_stacked(views: original_logits.Views, turns: Iterator[list[int]]) -> int:
    numbers = next(turns)
    for first in range(0, len(numbers), BATCH):
        _, index, prob = zip(*map(views.read, numbers[first:first + BATCH]), strict=True)
        np.stack(index).astype(np.int64)
        np.stack(prob).astype(np.float32)
    return len(numbers)


def _read_epoch(views: original_logits.Views, numbers: list[int]) -> int:
    """One rank's epoch by one worker: its keys, then its views."""
    views.set_epoch(0)
    for number in numbers:
        views.read(number)
    return len(numbers)


def _read_pool(store: Store, views: int) -> tuple[np.ndarray, np.ndarray]:
    """The first views of a store, at most as many as it has."""
    return store.read(0, 0, min(views, store.manifest.views_per_pass))


def _round(teacher: Teacher) -> tuple[np.ndarray, np.ndarray]:
    """The targets as the original's files give them back."""
    return teacher.index.astype(np.int16), teacher.prob.astype(np.float16).astype(np.float32)


def _size_row(teacher: Teacher, what: str, size: float, shard_views: int,
              stored: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Bytes of a view and the error of what was read."""
    views = len(stored[0])
    part = dataclasses.replace(teacher, index=teacher.index[:views], prob=teacher.prob[:views])
    return {"teacher": teacher.name, "top_k": teacher.index.shape[1], "classes": teacher.classes,
            "what": what, "shard_views": shard_views, "bytes": size,
            "kept": float(teacher.prob.sum(1).mean()), "top1": float(teacher.prob[:, 0].mean()),
            "student_kl": teacher.student_kl, **measure_error(part, *stored)}


def _other_sizes(settings: Settings, folder: Path, say: Callable[[str], None]
                 ) -> list[dict[str, Any]]:
    """Bytes and errors of one shard: the other teachers, and all of them at K = 10 of 1,000."""
    rows = []
    cases = [(kind, settings.top_k, settings.classes, SHARD) for kind in KINDS[1:]]
    cases += [(KINDS[0], 10, 1000, SHARD), *((kind, 10, 1000, 4 * SHARD) for kind in KINDS)]
    for number, (kind, top_k, classes, shard_views) in enumerate(cases):
        say(f"counts bytes: {kind}, K = {top_k} of {classes:,}, shards of {shard_views:,}")
        # No view comes twice in a block: it would be found, and cost next to nothing.
        pool = max(_SMALL_POOL, choose_block_views(top_k))
        teacher = make_teacher(kind, min(pool, settings.views), classes, top_k)
        views = min(shard_views, settings.views)
        keys = np.arange(views), np.arange(views).astype(np.uint32)
        for mode in ("compact", "float16"):
            store = make_store(folder / f"case-{number}-{mode}", teacher, views, mode,
                               shard_views=shard_views)
            store.write_shard(store.shards()[0], make_blocks(teacher, keys, 0, views))
            rows.append(_size_row(teacher, f"store, {mode}", store.bytes_per_view(), shard_views,
                                  _read_pool(store, len(teacher.index))))
        key_bytes = float(np.mean([len(name) + 1 for name in image_names(keys[0], classes)]))
        rows.append(_size_row(teacher, _ORIGINAL, original_logits.item_bytes(top_k) + key_bytes, 0,
                              _round(teacher)))
    return rows
