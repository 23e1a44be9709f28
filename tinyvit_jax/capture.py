"""The teacher pass: seeded views through a teacher, its top K probabilities into the store.

Any number of processes fill a store: each claims a shard that is missing, captures and publishes
it, and goes on until the store is complete. Processes that jax.distributed joined count as one:
they cut every batch among them, and the first claims and writes.
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from tinyvit_jax import log, matching, mix
from tinyvit_jax import mesh as meshes
from tinyvit_jax.data import augment, images, pipeline
from tinyvit_jax.data.order import AnyOrder
from tinyvit_jax.store import store as stores
from tinyvit_jax.store.claims import Claims
from tinyvit_jax.store.manifest import choose_block_views
from tinyvit_jax.store.place import open_place
from tinyvit_jax.teachers import Teacher
from tinyvit_jax.team import Team

_MINUTE = 60.0  # between two lines of progress
_DONE, _WAIT = -1, -2  # instead of the number of a shard


def make_manifest(config: ml_collections.ConfigDict, teacher: dict, source: images.ImageSource,
                  spec: augment.Spec, order: AnyOrder) -> stores.Manifest:
    """What a store of this config, teacher and image set says of itself."""
    s = config.store
    if s.top_k > len(source.class_names):
        raise ValueError(f"--config.store.top_k={s.top_k} is more than the "
                         f"{len(source.class_names)} classes of {source.name}. Set it to "
                         f"{len(source.class_names)} or less.")
    return stores.Manifest(
        teacher=teacher, class_names=tuple(source.class_names), top_k=s.top_k,
        augment=augment.to_dict(spec), image_set={
            "name": source.name, "fingerprint": source.fingerprint, "images": len(source)},
        data_seed=order.seed, passes=s.passes, views_per_pass=order.views_per_pass,
        shard_views=s.shard_views, block_views=s.block_views or choose_block_views(s.top_k),
        codec=s.codec, temperature=s.temperature, tail=s.tail,
        replay=matching.make_replay(source, spec, order))


def open_claims(config: ml_collections.ConfigDict, store: stores.Store) -> Claims:
    """The claims on the shards of a store."""
    return Claims(open_place(f"{store.place.url}/claims"), config.store.lease)


class _Work:
    """The shards that are left to make, here and elsewhere.

    Args:
        store: to fill.
        claims: of this process.
        chosen: shards to make, though they be there; none = those that are missing, until the
            store is complete.
    """

    def __init__(self, store: stores.Store, claims: Claims, chosen: Sequence[stores.Shard] = ()):
        self.store, self.claims, self.chosen = store, claims, chosen
        self.shards = store.shards()
        self.numbers = {shard.name: i for i, shard in enumerate(self.shards)}
        self.left = {shard.name: shard for shard in chosen}
        self.poll = max(claims.lease / 8, 1.0)  # seconds between two looks at the others
        self._due = 0.0
        self.refresh()
        self.total = _count_views(chosen or self.shards)

    def refresh(self) -> None:
        """Looks at what others have done since."""
        if not self.chosen:
            began = time.monotonic()
            self.left = {shard.name: shard for shard in self.store.missing()}
            ended = time.monotonic()
            # Listing a hundred thousand files takes seconds: a twentieth of the time at most.
            self._due = ended + max(self.poll, 20 * (ended - began))
            self.claims.sweep(self.left)

    def take(self) -> int:
        """Claims a shard: its number, or _WAIT where others are at all that is left, or _DONE."""
        if not self.left or time.monotonic() >= self._due:
            self.refresh()
        while self.left:
            name = self.claims.take(list(self.left))
            if name is None:
                self._due = 0.0
                return _WAIT
            if self.is_needed(name):
                return self.numbers[name]
            self.claims.finish(name)
        return _DONE

    def is_needed(self, name: str) -> bool:
        """Whether a shard is still to be made; lists the store where that is in doubt."""
        with contextlib.suppress(FileNotFoundError):
            self.store.place.read(f"{name}.json")
            self.refresh()  # published since it was listed; or its writer died after the sidecar
        return name in self.left

    def publish(self, shard: stores.Shard, index: np.ndarray, prob: np.ndarray,
                order: AnyOrder) -> bool:
        """Writes a shard that this process claimed, unless another has taken it over."""
        def is_mine() -> bool:
            return self.claims.owns(shard.name) and self.is_needed(shard.name)

        if self.store.write_shard(shard, _cut(shard, index, prob, order,
                                              self.store.manifest.block_views), is_mine):
            self.claims.finish(shard.name)
            self.left.pop(shard.name, None)
            return True
        log.logger.info("%s: dropped, another process took it over", shard)
        self.claims.release(shard.name)
        return False


def _count_views(shards: Iterable[stores.Shard]) -> int:
    return sum(shard.stop - shard.start for shard in shards)


def _cut(shard: stores.Shard, index: np.ndarray, prob: np.ndarray, order: AnyOrder, size: int
         ) -> Iterator[tuple]:
    """The keys and targets of a shard, block by block."""
    place = np.arange(shard.start, shard.stop)
    image, seed = order.keys(np.full(len(place), shard.pass_number), place)
    for start in range(0, len(place), size):
        rows = slice(start, start + size)
        yield (image[rows], seed[rows]), index[rows], prob[rows]


class _Meter:
    """What a capture says while it runs: how full the store is, and what this process adds.

    Args:
        work: that is measured.
    """

    def __init__(self, work: _Work):
        self.work = work
        self._views = self._shards = self._bytes = self._in_shard = 0  # of this process
        self._began, self._waited = time.perf_counter(), 0.0
        self._start = self._at = work.total - _count_views(work.left.values())
        self._progress = log.Progress("capture", work.total, self._start, every=_MINUTE)

    def advance(self, views: int) -> None:
        """Counts views of the shard at work, and speaks when it is time."""
        self._views += views
        self._in_shard += views
        self._at += views
        self._progress.advance(views)
        if self._progress.is_due():
            self.say()

    def end_shard(self, shard: stores.Shard, published: bool) -> None:
        """Counts the shard that was at work."""
        self._in_shard = 0
        if published:
            self._shards += 1
            self._bytes += json.loads(self.work.store.place.read(f"{shard.name}.json"))["bytes"]

    def wait(self, seconds: float) -> None:
        """Counts a time without work, and speaks when it is time."""
        self._waited += seconds
        if self._progress.is_due():
            self.say()

    def say(self) -> None:
        """Shows how full the store is by a new listing, and when it will be full at this rate."""
        work, past = self.work, time.perf_counter() - self._began
        if time.monotonic() >= work._due:
            work.refresh()
        left = _count_views(work.left.values()) - self._in_shard
        done = work.total - left
        self._progress.advance(done - self._at)
        self._at = done
        there = len(work.shards) - len(work.left)
        own = self._views / max(past - self._waited, 1e-9)
        rate = (done - self._start) / past  # of all processes
        self._progress.say(
            done, f"{there} of {len(work.shards)} shards, {self._shards} by this process: "
            f"{own:.4g} views/s, {self._bytes / 1e6:,.1f} MB", left / rate if rate > 0 else None)

    def close(self) -> None:
        """Says the last line."""
        self.say()
        self._progress.close()


def capture(config: ml_collections.ConfigDict, teacher: Teacher, views: pipeline.Views,
            store: stores.Store, mesh: Mesh, chosen: Sequence[stores.Shard] = ()) -> float:
    """Captures what a store lacks, beside any number of others; returns when it is complete.

    Args:
        config: of the run (teacher.batch_size, store.lease, data.threads ... are read).
        teacher: from `teachers.make_teacher`.
        views: of the same images, spec and order as the store's manifest.
        store: from `stores.create_store`.
        mesh: over which batches are cut.
        chosen: shards to make, there or not, instead of those that are missing.

    Returns:
        Seconds it took.

    Raises:
        TeamError: another process of jax.distributed failed.
    """
    began, team, top = time.perf_counter(), Team(), make_top(config.store.top_k, mesh)
    with team.stopping(), open_claims(config, store) as claims:
        work = team.in_turn(lambda: _Work(store, claims, chosen))
        meter = _Meter(work) if team.first else None

        def tell(method: Callable, *args) -> None:
            if meter is not None:
                team.attempt(lambda: method(meter, *args))

        while True:
            number = team.agree((team.attempt(work.take) if team.first else None) or 0)
            if number == _WAIT:
                time.sleep(work.poll)
                tell(_Meter.wait, work.poll)
                continue
            if number == _DONE:
                tell(_Meter.close)
                return time.perf_counter() - began
            shard = work.shards[number]
            index, prob = _run_shard(config, teacher, views, shard, top, mesh, team,
                                     lambda n: tell(_Meter.advance, n))
            if team.first:
                published = team.attempt(
                    functools.partial(work.publish, shard, index, prob, views.order))
                tell(_Meter.end_shard, shard, bool(published))


class ShardBatches:
    """The views of one shard in batches: this process's rows, all filled up to the same number.

    Args:
        views: what replays them.
        shard: of the store.
        batch_size: rows over all processes.
        rows: this process's share.
    """

    def __init__(self, views: pipeline.Views, shard: stores.Shard, batch_size: int,
                 rows: pipeline.Rows):
        self.views, self.batch_size, self.rows = views, batch_size, rows
        first = shard.pass_number * views.order.views_per_pass
        self.start, self.stop = first + shard.start, first + shard.stop

    def __len__(self) -> int:
        return -(-(self.stop - self.start) // self.batch_size)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        first = self.start + int(number) * self.batch_size + self.rows.first
        real = np.arange(first, min(first + self.rows.size, self.stop))
        if not len(real):  # the shard ends before this process's rows: any pair fills them
            real = np.arange(max(self.start, self.stop - 2), self.stop)
        return fill_rows(self.views.read(real), self.rows.size)


def fill_rows(batch, size: int) -> dict[str, np.ndarray]:
    """What a teacher needs of a batch, filled up to `size` rows so that it compiles once."""
    sizes = {"image": size, "lam": size // 2, "box": size // 2}  # a mix has one row for each pair
    return {k: np.concatenate([batch[k], np.repeat(batch[k][-1:], n - len(batch[k]), 0)])
            for k, n in sizes.items() if k in batch}


Top = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def make_top(k: int, mesh: Mesh) -> Top:
    """Compiled log-probabilities [B, C] -> (index int32 [B, K], prob float32 [B, K]), descending.

    All rows come to every process.
    """
    def top(log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
        prob, index = jax.lax.top_k(jnp.exp(log_probs), k)
        # Found where the rows are, so that what travels is K classes and not all of them.
        rows = meshes.sharded(mesh)
        return (jax.lax.with_sharding_constraint(index, rows),
                jax.lax.with_sharding_constraint(prob, rows))

    return jax.jit(top, out_shardings=meshes.replicated(mesh))


_view_pixels = jax.jit(mix.view_pixels)


def run_teacher(teacher: Teacher, batch: dict[str, np.ndarray], mesh: Mesh) -> jax.Array:
    """The log-probabilities [B, C] of a batch, of which each process brings its own rows."""
    return teacher.log_probs(_view_pixels(meshes.put_batch(batch, mesh)))


def _run_shard(config: ml_collections.ConfigDict, teacher: Teacher, views: pipeline.Views,
               shard: stores.Shard, top: Top, mesh: Mesh, team: Team,
               advance: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """Runs the teacher over a shard: index int32 [n, K] and prob float32 [n, K].

    A batch's results are fetched when the next one is on its way to the device.
    """
    size, count = config.teacher.batch_size, shard.stop - shard.start
    batches = ShardBatches(views, shard, size,
                           pipeline.Rows.of_process(size, team.index, team.count))
    stream: Iterator[Any] = pipeline.batch_stream(
        batches, threads=config.data.threads, prefetch=config.data.prefetch)
    running: list[tuple[jax.Array, jax.Array]] = []
    done: list[tuple[np.ndarray, np.ndarray]] = []

    def fetch() -> None:
        done.append(jax.device_get(running.pop()))
        advance(min(size, count - size * (len(done) - 1)))

    batch: Any = team.attempt(lambda: next(stream))
    for left in reversed(range(len(batches))):
        team.agree()  # all have their rows
        log_probs = team.attempt(functools.partial(run_teacher, teacher, batch, mesh))
        if left:
            batch = team.attempt(lambda: next(stream))
        team.agree()  # a teacher of the user's own may have failed in one of them
        if running:
            fetch()
        running.append(top(cast(jax.Array, log_probs)))  # as all agreed
    fetch()
    index, prob = (np.concatenate(parts)[:count] for parts in zip(*done, strict=True))
    return index, prob


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
    everything = make_top(len(views.source.class_names), mesh)
    largest, same, seen = 0.0, 0, 0
    for start in starts // 2 * 2:  # pairs stay together
        batch = views.read(np.arange(start, min(start + size, total)))
        log_probs = run_teacher(teacher, fill_rows(batch, size), mesh)
        index, prob = (x[:len(batch["label"])] for x in jax.device_get(everything(log_probs)))
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
