"""The teacher pass: seeded views through a teacher, its top K probabilities into the store."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from tinyvit_jax import log, mix
from tinyvit_jax import mesh as meshes
from tinyvit_jax.data import augment, images, pipeline
from tinyvit_jax.data.order import AnyOrder
from tinyvit_jax.store import store as stores
from tinyvit_jax.teachers import Teacher


def make_manifest(config: ml_collections.ConfigDict, teacher: dict, source: images.ImageSource,
                  spec: augment.Spec, order: AnyOrder) -> stores.Manifest:
    """What a store of this config, teacher and image set says of itself."""
    top_k = config.store.top_k
    if top_k > len(source.class_names):
        raise ValueError(f"--config.store.top_k={top_k} is more than the {len(source.class_names)} "
                         f"classes of {source.name}. Set it to {len(source.class_names)} or less.")
    return stores.Manifest(
        teacher=teacher, class_names=tuple(source.class_names), top_k=top_k,
        augment=augment.to_dict(spec), image_set={
            "name": source.name, "fingerprint": source.fingerprint, "images": len(source)},
        data_seed=order.seed, passes=config.store.passes, views_per_pass=order.views_per_pass,
        shard_views=config.store.shard_views, block_views=config.store.block_views)


def estimate(config: ml_collections.ConfigDict, source: images.ImageSource, order: AnyOrder,
             path: Path) -> dict[str, int]:
    """Views, bytes and free disk of a capture, before anything runs.

    Returns:
        {"views", "bytes", "there", "free"}: of the whole store, on disk already, free on the disk
        that holds or will hold it.
    """
    views = order.views_per_pass * config.store.passes
    there = sum(file.stat().st_size for file in path.rglob("*.array_record"))
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return {"views": views, "there": there, "free": shutil.disk_usage(place).free,
            "bytes": stores.estimate(views, config.store.top_k, len(source.class_names),
                                     shard_views=config.store.shard_views)}


def check_fits(needed: dict[str, int], path: Path) -> None:
    """Raises OSError where what is still to be written is more than the free disk."""
    if needed["bytes"] - needed["there"] > needed["free"]:
        raise OSError(
            f"The store {path} needs about {needed['bytes'] - needed['there']:,} more bytes for "
            f"{needed['views']:,} views, and its disk has {needed['free']:,} free. Free "
            f"some, point --config.store.path at another disk, or lower --config.store.passes or "
            f"--config.store.top_k.")


def capture(config: ml_collections.ConfigDict, teacher: Teacher, views: pipeline.Views,
            store: stores.Store, mesh: Mesh) -> float:
    """Captures every missing shard of a store; a killed run loses at most the shard at work.

    Args:
        config: of the run (teacher.batch_size, data.threads ... are read).
        teacher: from `teachers.make_teacher`.
        views: of the same images, spec and order as the store's manifest.
        store: from `stores.create_store`.
        mesh: over which batches are cut.

    Returns:
        Seconds it took.
    """
    missing = store.missing()
    total = sum(s.stop - s.start for s in missing)
    progress = log.Progress("capture", total, quiet=jax.process_index() > 0)
    top = _make_top(config.store.top_k)
    began, done = time.perf_counter(), 0
    for shard in missing:
        store.write_shard(shard, _shard_blocks(config, teacher, views, shard, top, mesh))
        done += shard.stop - shard.start
        rate = done / (time.perf_counter() - began)
        progress.advance(shard.stop - shard.start)
        progress.report(done, {"views_per_second": rate}, eta=(total - done) / rate)
    progress.close()
    return time.perf_counter() - began


def _make_top(k: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Compiled logits [B, C] -> (prob float32 [B, K], index int32 [B, K]), descending."""
    return jax.jit(lambda x: jax.lax.top_k(jax.nn.softmax(x.astype(jnp.float32)), k))


class _ShardBatches:
    """The views of one shard in teacher batches, the last one shorter."""

    def __init__(self, views: pipeline.Views, shard: stores.Shard, batch_size: int):
        self.views, self.batch_size = views, batch_size
        first = shard.pass_number * views.order.views_per_pass
        self.start, self.stop = first + shard.start, first + shard.stop

    def __len__(self) -> int:
        return -(-(self.stop - self.start) // self.batch_size)

    def __getitem__(self, number: int):
        start = self.start + int(number) * self.batch_size
        return self.views.read(np.arange(start, min(start + self.batch_size, self.stop)))


def _shard_blocks(config, teacher: Teacher, views: pipeline.Views, shard: stores.Shard,
                  top: Callable, mesh: Mesh) -> Iterator:
    """Runs the teacher over a shard and yields (keys, index, prob) for each block."""
    size = config.teacher.batch_size
    batches = pipeline.batch_stream(_ShardBatches(views, shard, size), threads=config.data.threads,
                                    prefetch=config.data.prefetch)
    index, prob = zip(*(_run(teacher, batch, size, top, mesh) for batch in batches), strict=True)
    index, prob = np.concatenate(index), np.concatenate(prob)
    place = np.arange(shard.start, shard.stop)
    image, seed = views.order.keys(np.full(len(place), shard.pass_number), place)
    for start in range(0, len(place), config.store.block_views):
        rows = slice(start, start + config.store.block_views)
        yield (image[rows], seed[rows]), index[rows], prob[rows]


_view_pixels = jax.jit(mix.view_pixels)


def _run(teacher: Teacher, batch, size: int, top: Callable, mesh: Mesh
         ) -> tuple[np.ndarray, np.ndarray]:
    """One batch through the teacher, filled up to `size` rows so that it compiles once."""
    rows = len(batch["label"])
    padded = {k: np.concatenate([v, np.repeat(v[-1:], _target(k, size) - len(v), 0)])
              for k, v in batch.items() if k in ("image", "lam", "box")}
    pixels = _view_pixels(meshes.put_batch(padded, mesh))
    prob, index = jax.device_get(top(teacher.logits(pixels)))
    return index[:rows], prob[:rows]


def _target(key: str, size: int) -> int:
    """Rows that a padded array of a batch has: mixing parameters have one for each pair."""
    return size // 2 if key in ("lam", "box") else size


MAX_KL = 1e-3  # between stored and recomputed targets: ten times what another backend's floats cost


def compare(config: ml_collections.ConfigDict, teacher: Teacher, views: pipeline.Views, count: int,
            mesh: Mesh) -> dict[str, float]:
    """Runs the teacher again on views spread over a store and compares with what is stored.

    Args:
        config: of the run.
        teacher: from `teachers.make_teacher`.
        views: with the store.
        count: how many views, rounded up to whole teacher batches.
        mesh: over which batches are cut.

    Returns:
        {"views", "kl", "top1"}: the largest KL over the K stored classes and the rest as one, and
        the share of views whose top class is the same.
    """
    assert views.store is not None
    size = config.teacher.batch_size
    total = views.order.views_per_pass * views.store.manifest.passes
    starts = np.linspace(0, max(total - size, 0), max(1, -(-count // size))).astype(np.int64)
    everything = _make_top(len(views.source.class_names))
    largest, same, seen = 0.0, 0, 0
    for start in starts // 2 * 2:  # pairs stay together
        batch = views.read(np.arange(start, min(start + size, total)))
        index, prob = _run(teacher, batch, size, everything, mesh)
        now = np.take_along_axis(prob, np.argsort(index, -1), -1)
        kl = _kl(batch["prob"], np.take_along_axis(now, batch["index"].astype(np.int64), -1))
        largest = float(np.maximum(largest, kl.max()))  # unlike max(), it keeps a NaN
        same += int((index[:, 0] == batch["index"][:, 0]).sum())
        seen += len(kl)
    return {"views": seen, "kl": largest, "top1": same / seen}


def _kl(stored: np.ndarray, now: np.ndarray) -> np.ndarray:
    """KL(stored || now) of [n, K] probabilities and what they leave over, in float64: [n]."""
    def whole(p):
        p = p.astype(np.float64)
        return np.maximum(np.concatenate([p, 1 - p.sum(-1, keepdims=True)], -1), 1e-12)

    p, q = whole(stored), whole(now)
    return (p * (np.log(p) - np.log(q))).sum(-1)
