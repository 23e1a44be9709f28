"""A store of the original becomes one of ours: keys to image indices, files to shards.

A pass is an epoch of the original: its rank files one after another, in rank order. Where views are
mixed, the original mixes neighbours of a batch, which are lines 2k and 2k + 1 of a rank's file; so
the order of the file is kept, and with it the pairs.

Padding gives some images to two ranks. The original's reader of rank 0 looks into the files in
rank order: the lowest rank's view stands, and the others are dropped here. (That reader forgets
this once it has opened the later file; readers of other ranks begin with their own.) A pair that
loses one view so, and a last line without a partner, cannot be mixed as the teacher saw it: the
rest of the pair is left out too. Everything left out is counted, logged and kept in import.json.

Passes are never cut to one length: every image must have a key in every epoch, so lengths differ
only where pairs broke in one epoch and not in another, and then the files are not what they seem.
"""

import contextlib
import json
import logging
import multiprocessing
import time
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyvit_jax import log
from tinyvit_jax.data import augment, finder
from tinyvit_jax.data.finder import Find
from tinyvit_jax.data.images import ImageSource
from tinyvit_jax.store import blocks, microsoft, shards
from tinyvit_jax.store import store as stores
from tinyvit_jax.store.manifest import Manifest, StoreError, choose_block_views
from tinyvit_jax.store.microsoft import Rank
from tinyvit_jax.store.place import Place, open_place

logger = logging.getLogger("tinyvit_jax")

CODEC = "float16"  # the original's own precision: targets stay equal to the bit
_SAMPLE = 512  # views whose labels are compared with their targets
_NAMED = 3  # keys or images that a message names


class Settings(NamedTuple):
    """How the original's store was made, and how ours is cut.

    Attributes:
        spec: of the views; `spec.spec` must be "microsoft".
        paired: whether neighbours were mixed.
        top_k: which K, where the folder has several.
        teacher: its name, as far as it is known; "" = unknown.
        shard_views: views in a shard.
        block_views: views in a record; 0 = by K.
        processes: that write shards; 1 = this one.
    """

    spec: augment.Spec
    paired: bool
    top_k: int
    teacher: str = ""
    shard_views: int = 32768
    block_views: int = 0
    processes: int = 1


class Pass(NamedTuple):
    """One epoch of the original's as a pass of ours: n views."""

    ranks: list[Rank]
    starts: np.ndarray  # int64 [ranks + 1], position where each rank's views begin
    row: np.ndarray  # int64 [n], line of the rank's file, from 0
    image: np.ndarray  # int64 [n], index in the image source
    counts: dict[str, int]  # ranks, lines, duplicates, unpaired, views

    def cut(self, start: int, stop: int) -> "Pass":
        """The part of the pass at positions [start, stop), as views of its arrays."""
        return Pass(self.ranks, np.clip(self.starts - start, 0, stop - start),
                    self.row[start:stop], self.image[start:stop], self.counts)

    def read(self, start: int, stop: int, num_classes: int
             ) -> tuple[blocks.Keys, np.ndarray, np.ndarray]:
        """Keys, classes int32 [n, K] and probabilities float32 [n, K] of positions of the pass."""
        parts = []
        for rank, first, end in zip(self.ranks, self.starts, self.starts[1:], strict=False):
            rows = self.row[max(first, start):max(first, min(end, stop))]
            if len(rows):
                parts.append(rank.read(rows, num_classes))
        seed, index, prob = (np.concatenate(values) for values in zip(*parts, strict=True))
        return (self.image[start:stop], seed), index, prob


def check_spec(name: str) -> None:
    """Raises StoreError for views that the original's seeds do not stand for."""
    if name != "microsoft":
        raise StoreError(
            f"--config.augment.spec={name} gives other views than the seeds in an original store "
            f"stand for: they belong to the original's own generator and its order of draws. Set "
            f"--config.augment.spec=microsoft, here and in training.")


def import_store(folder: Path, path: str | Path | Place, source: ImageSource, settings: Settings
                 ) -> stores.Store:
    """Brings the original's store into one of ours, or goes on where an earlier start stopped.

    Args:
        folder: holds the original's logits_top{K}_epoch{E} folders.
        path: of our store: a folder, a gs:// or s3:// URL, or a place.
        source: the images that its keys name.
        settings: what else decides.

    Returns:
        The complete store.

    Raises:
        StoreError: the files are no such store, or not one of these images; names file and line.
        SourceError: the images cannot be found by such keys.
        OSError: our store would not fit on its disk.
    """
    check_spec(settings.spec.spec)
    top_k, epochs = microsoft.choose_epochs(folder, settings.top_k)
    logger.info("%s: epochs %d to %d of K = %d; checking their sizes", folder, min(epochs),
                max(epochs), top_k)
    plans = Plans([microsoft.open_ranks(epoch, top_k) for epoch in epochs.values()], source,
                  settings.paired)
    place = open_place(path) if isinstance(path, str | Path) else path
    manifest = _make_manifest(place, source, settings, plans, top_k, epochs)
    needed = estimate(manifest, place)
    store = stores.create_store(place, manifest)
    missing = store.missing()
    if not missing:
        logger.info("%s is complete: %d passes of %s views", place.url, manifest.passes,
                    f"{manifest.views_per_pass:,}")
        return store
    logger.info("import: %d of %d shards of %s are missing; up to %s bytes for %s views in all",
                len(missing), len(store.shards()), place.url, f"{needed['bytes']:,}",
                f"{needed['views']:,}")
    _check_fits(needed, place)
    _fill(store, plans, missing, settings.processes)
    return store


class Plans:
    """Makes the passes one at a time, as they are needed; the images are listed for the first.

    Args:
        ranks: of each epoch, from `microsoft.open_ranks`.
        source: the images.
        paired: whether neighbours were mixed.
    """

    def __init__(self, ranks: list[list[Rank]], source: ImageSource, paired: bool):
        self.ranks, self.source, self.paired = ranks, source, paired
        self._find: Find | None = None
        self._last: tuple[int, Pass] | None = None

    def check_lengths(self, views: int, begun: int) -> None:
        """Raises StoreError where a pass has another length, before anything is written.

        Epochs with the same lines in every rank have the same padding; one of each kind is made.

        Args:
            views: in a pass of the store.
            begun: passes that an earlier start has checked.
        """
        kinds: set[tuple[int, ...]] = set()
        for number, ranks in enumerate(self.ranks):
            kind = tuple(rank.lines for rank in ranks)
            if number >= begun and kind not in kinds:
                _check_length(self.make(number), views)
            kinds.add(kind)

    def make(self, number: int) -> Pass:
        """Pass `number`; asked for twice in a row it is not made again."""
        if self._last is None or self._last[0] != number:
            self._last = None  # its memory is free before the next is made
            if self._find is None:
                logger.info("import: listing the %s images of %s", f"{len(self.source):,}",
                            self.source.name)
                example = bytes(self.ranks[0][0].read_keys()[0])
                self._find = finder.make_finder(self.source, example)
            self._last = number, plan_pass(self.ranks[number], self._find, self.source, self.paired)
        return self._last[1]


def plan_pass(ranks: list[Rank], find: Find, source: ImageSource, paired: bool) -> Pass:
    """Which line of which file stands at each place of a pass.

    Args:
        ranks: the files of one epoch.
        find: of the images.
        source: the images.
        paired: whether pairs of lines stay together.

    Raises:
        StoreError: a key has no image, an image has no key, or a rank has one twice.
    """
    began = time.perf_counter()
    seen = np.zeros(len(source), bool)
    rows, images = [], []
    duplicates = unpaired = 0
    for rank, image in zip(ranks, _find_images(ranks, find, source), strict=True):
        _check_once(rank, image)
        new = ~seen[image]
        seen[image] = True
        kept = _keep_pairs(new) if paired else new
        duplicates += int((~new).sum())
        unpaired += int((new & ~kept).sum())
        rows.append(np.flatnonzero(kept))
        images.append(image[kept])
    _check_covered(ranks, source, seen)
    counts = {"ranks": len(ranks), "lines": sum(rank.lines for rank in ranks),
              "duplicates": duplicates, "unpaired": unpaired, "views": sum(map(len, rows))}
    logger.info("%s: %s lines of %d ranks, %d left out as duplicates and %d for want of their "
                "partner: %s views (%.0f s)", _epoch(ranks), f"{counts['lines']:,}", len(ranks),
                duplicates, unpaired, f"{counts['views']:,}", time.perf_counter() - began)
    return Pass(ranks, np.cumsum([0, *map(len, rows)]), np.concatenate(rows),
                np.concatenate(images), counts)


def estimate(manifest: Manifest, place: Place) -> dict[str, int | None]:
    """{"views", "bytes", "there", "free"}: at most of the store, there already, free beside it.

    "free" is None where the place does not say.
    """
    views = manifest.passes * manifest.views_per_pass
    there = sum(size for name, size in place.list().items() if name.endswith(".array_record"))
    return {"views": views, "free": place.free(), "there": there,
            "bytes": manifest.passes * shards.estimate(
                manifest.views_per_pass, manifest.top_k, len(manifest.class_names),
                shard_views=manifest.shard_views, mode=manifest.codec,
                key_bytes=blocks.key_bytes(manifest))}


def _check_fits(needed: dict, place: Place) -> None:
    """Raises OSError where what is still to be written is more than the free disk."""
    if needed["free"] is not None and needed["bytes"] - needed["there"] > needed["free"]:
        raise OSError(f"The store {place.url} needs up to {needed['bytes'] - needed['there']:,} "
                      f"more bytes, and its disk has {needed['free']:,} free. Free some, or point "
                      f"--config.store.path at another disk.")


def _make_manifest(place: Place, source: ImageSource, settings: Settings, plans: Plans, top_k: int,
                   epochs: dict[int, Path]) -> Manifest:
    """What our store says of itself; a store that was begun knows the length of its passes."""
    begun = stores.open_store(place).manifest if "manifest.json" in place.names() else None
    views = begun.views_per_pass if begun else len(plans.make(0).row)
    plans.check_lengths(views, begun.passes if begun else 0)
    return Manifest(
        teacher={"name": settings.teacher or "unknown", "weights": ""},
        class_names=tuple(source.class_names), top_k=top_k,
        augment=augment.to_dict(settings.spec), image_set={
            "name": source.name, "fingerprint": source.fingerprint, "images": len(source)},
        data_seed=0, passes=len(epochs), views_per_pass=views, shard_views=settings.shard_views,
        block_views=settings.block_views or choose_block_views(top_k), codec=CODEC, keys="stored",
        origin={"format": "microsoft", "first_epoch": min(epochs)})


def _find_images(ranks: list[Rank], find: Find, source: ImageSource) -> list[np.ndarray]:
    """The image index of each line of each rank, int64 [lines]; all are there."""
    found, strangers, lines = [], 0, []
    for rank in ranks:
        keys = rank.read_keys()
        found.append(find(keys))
        absent = np.flatnonzero(found[-1] < 0)
        strangers += len(absent)
        lines += [f"{keys[i].decode()} ({rank.keys_file}, line {i + 1})" for i in absent[:_NAMED]]
    if strangers:
        raise StoreError(
            f"{_epoch(ranks)}: {strangers:,} of its {sum(map(len, found)):,} keys have no image in "
            f"{source.name}, the first: {'; '.join(lines[:_NAMED])}. Expected the images that the "
            f"store was made of, all of them. Set --config.data.source, and data.train_split.")
    return found


def _check_once(rank: Rank, image: np.ndarray) -> None:
    """Raises StoreError where a rank has an image twice, which the original does not write."""
    order = np.argsort(image, kind="stable")
    twice = np.flatnonzero(np.diff(image[order]) == 0)
    if len(twice):
        a, b = order[twice[0]] + 1, order[twice[0] + 1] + 1
        raise StoreError(f"{rank.keys_file}, line {b}: the key of line {a} again. The original "
                         f"writes each key of a rank once, so the lines of two runs lie in one "
                         f"file. Copy it again.")


def _keep_pairs(new: np.ndarray) -> np.ndarray:
    """Which lines stay where only whole pairs of new ones do: bool [n] -> bool [n]."""
    kept = np.zeros_like(new)
    whole = len(new) // 2 * 2
    kept[:whole] = new[:whole].reshape(-1, 2).all(1).repeat(2)
    return kept


def _check_covered(ranks: list[Rank], source: ImageSource, seen: np.ndarray) -> None:
    """Raises StoreError where images have no key."""
    absent = np.flatnonzero(~seen)
    if len(absent):
        names = ", ".join(source[int(i)].key for i in absent[:_NAMED])
        raise StoreError(
            f"{_epoch(ranks)}: {len(absent):,} of the {len(source):,} images of {source.name} have "
            f"no key in it, the first: {names}. An epoch of the original has all its images, so "
            f"files of the last ranks are missing, or it was made of fewer images. Copy them, or "
            f"give just those images by --config.data.source.")


def _check_length(plan: Pass, views: int) -> None:
    """Raises StoreError where a pass has another length than the store's passes."""
    if len(plan.row) != views:
        raise StoreError(
            f"{_epoch(plan.ranks)} gives {len(plan.row):,} views ({plan.counts['duplicates']:,} "
            f"duplicates and {plan.counts['unpaired']:,} views without their partner left out), "
            f"and the passes of the store have {views:,}. Passes have one length, and cutting them "
            f"would lose views. Copy its files again, or leave it and the epochs behind it out of "
            f"the folder.")


def _epoch(ranks: list[Rank]) -> str:
    """The folder of an epoch."""
    return ranks[0].keys_file.parent.name


def _log_agreement(plan: Pass, source: ImageSource) -> None:
    """Logs how often the top class is the image's own; of wrong images it is by chance."""
    classes = len(source.class_names)
    places = np.unique(np.linspace(0, len(plan.row) - 1, _SAMPLE).astype(np.int64))
    tops = [plan.read(int(p), int(p) + 1, classes)[1:] for p in places]
    top = np.array([index[0, prob[0].argmax()] for index, prob in tops])
    label = np.array([e.label for e in source.read(plan.image[places].tolist())])
    logger.info("import: the top class is the image's own label in %.1f %% of %d views (chance is "
                "%.3g %%; near it, the images or the order of their classes are others)",
                100 * (top == label).mean(), len(places), 100 / classes)


def _fill(store: stores.Store, plans: Plans, missing: list[stores.Shard], processes: int) -> None:
    """Writes the missing shards, pass by pass, and says how far it is."""
    manifest = store.manifest
    progress = log.Progress("import", sum(s.stop - s.start for s in missing))
    began, done = time.perf_counter(), 0
    for number in sorted({shard.pass_number for shard in missing}):
        plan = plans.make(number)
        _check_length(plan, manifest.views_per_pass)
        if number == 0:
            _log_agreement(plan, plans.source)
        for shard in _write_shards(
                store, plan, [s for s in missing if s.pass_number == number], processes):
            done += shard.stop - shard.start
            rate = done / (time.perf_counter() - began)
            progress.advance(shard.stop - shard.start)
            progress.report(done, {"views_per_second": rate}, (progress.total - done) / rate)
        epoch = manifest.origin["first_epoch"] + number
        _record(store.place, {"epoch": epoch, **plan.counts})
    progress.close()


def _write_shards(store: stores.Store, plan: Pass, shards: list[stores.Shard], processes: int
                  ) -> Iterator[stores.Shard]:
    """Writes some shards of one pass, several at once; after an error it begins no further one.

    Processes, as ArrayRecord's writer lets no other thread run while it compresses.
    """
    if processes == 1:
        for shard in shards:
            _write_shard(store, plan.cut(shard.start, shard.stop), shard)
            yield shard
        return
    context = multiprocessing.get_context("spawn")  # JAX, if it runs here, does not survive a fork
    with futures.ProcessPoolExecutor(min(processes, len(shards)), context) as pool:
        at_work = {pool.submit(_write_shard, store, plan.cut(shard.start, shard.stop), shard): shard
                   for shard in shards}
        try:
            for future in futures.as_completed(at_work):
                future.result()
                yield at_work[future]
        except BrokenProcessPool as error:
            raise StoreError(f"A process that wrote shards of {store.path} was killed, for want of "
                             f"memory perhaps. Run the same command again with fewer --processes: "
                             f"the shards that are complete are kept.") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _write_shard(store: stores.Store, part: Pass, shard: stores.Shard) -> None:
    """Writes one shard from the part of a pass that it holds."""
    m = store.manifest

    def contents() -> Iterator:
        for start in range(0, len(part.row), m.block_views):
            yield part.read(start, min(start + m.block_views, len(part.row)), len(m.class_names))

    store.write_shard(shard, contents())


def _record(place: Place, entry: dict[str, int]) -> None:
    """Adds what became of an epoch to import.json."""
    entries = []
    with contextlib.suppress(FileNotFoundError):
        entries = json.loads(place.read("import.json"))
    entries = [e for e in entries if e["epoch"] != entry["epoch"]] + [entry]
    text = json.dumps(sorted(entries, key=lambda e: e["epoch"]), indent=1) + "\n"
    place.write("import.json", text.encode())
