"""What a capture will need, before it runs: a bound on its bytes, and rates by a few batches."""

import math
import time
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from tinyvit_jax import capture
from tinyvit_jax.data import images, pipeline
from tinyvit_jax.data.order import AnyOrder
from tinyvit_jax.store import codec, shards
from tinyvit_jax.store.manifest import choose_block_views
from tinyvit_jax.store.place import Place
from tinyvit_jax.teachers import Teacher

_SHARD_BYTES = 96 * 1024  # that a file of ArrayRecord has more than its records, on average
_PIECE = 16  # views that a thread prepares at a time: few, so that all threads have some


class Needs(NamedTuple):
    """What a whole store needs, and what is there."""

    views: int
    shards: int
    most_bytes: int  # an upper bound
    missing: int  # shards that are not there yet
    free: int | None  # bytes, where the place says

    @property
    def files(self) -> int:
        """Two for each shard, and the manifest."""
        return 2 * self.shards + 1


def estimate(config: ml_collections.ConfigDict, source: images.ImageSource, order: AnyOrder,
             place: Place) -> Needs:
    """What a capture needs, from its config alone."""
    s = config.store
    count = -(-order.views_per_pass // s.shard_views) * s.passes
    there = sum(name.endswith(".array_record") and int(name[5:10]) < s.passes
                for name in place.names() if name.startswith("pass-"))
    one_pass = shards.estimate(order.views_per_pass, s.top_k, len(source.class_names),
                               shard_views=s.shard_views, mode=s.codec)
    return Needs(order.views_per_pass * s.passes, count, one_pass * s.passes,
                 max(count - there, 0), place.free())


def check_fits(needs: Needs, place: Place, part: float = 1.0) -> None:
    """Raises OSError where what is to be written is more than the free disk.

    Args:
        needs: of the whole store.
        place: of the store.
        part: of the store that is to be written.
    """
    more = math.ceil(needs.most_bytes * part)
    if needs.free is not None and more > needs.free:
        raise OSError(
            f"The store {place.url} needs up to {more:,} more bytes, of {needs.views:,} views in "
            f"all, and its disk has {needs.free:,} free. Free some, point "
            f"--config.store.path at another disk, or lower --config.store.passes or "
            f"--config.store.top_k.")


class Pilot(NamedTuple):
    """What a few teacher batches took; rates in views a second of one process."""

    views: int
    read: float  # of preparing views, on all threads
    teach: float  # of the teacher
    write: float  # of encoding targets
    view_bytes: float  # of an encoded target
    shared: bool  # whether the teacher runs on the cores that prepare views

    @property
    def rate(self) -> float:
        """Views a second of all of it: side by side where that is so, one after the other else."""
        both = (1 / (1 / self.read + 1 / self.teach) if self.shared
                else min(self.read, self.teach))
        return 1 / (1 / both + 1 / self.write)

    def count_bytes(self, needs: Needs) -> int:
        """Bytes that the whole store will have."""
        return round(self.view_bytes * needs.views) + needs.shards * _SHARD_BYTES


def pilot(config: ml_collections.ConfigDict, teacher: Teacher, views: pipeline.Views, mesh: Mesh,
          most: int = 4, seconds: float = 20.0) -> Pilot:
    """Measures a capture by its first views; what compiles is left out.

    Args:
        config: of the run.
        teacher: from `teachers.make_teacher`.
        views: to capture.
        mesh: over which batches are cut.
        most: teacher batches.
        seconds: after which fewer will do: half for preparing views, half for the teacher.
    """
    most *= config.teacher.batch_size
    batch, count, read = _time_reading(config, views, most, seconds / 2)
    index, prob, teach = _time_teacher(config, teacher, batch, count, mesh, seconds / 2)
    size = config.store.block_views or choose_block_views(config.store.top_k)
    began, total = time.perf_counter(), 0
    for block in (slice(start, start + size) for start in range(0, len(index), size)):
        # A digest of the block and a bit for each view say whose targets they are.
        total += 8 + -(-len(index[block]) // 8) + len(codec.encode(
            index[block], prob[block], num_classes=len(views.source.class_names),
            mode=config.store.codec))
    write = len(index) / (time.perf_counter() - began)
    return Pilot(len(index), read, teach, write, total / len(index),
                 jax.default_backend() == "cpu")


def _time_reading(config: ml_collections.ConfigDict, views: pipeline.Views, most: int,
                  seconds: float) -> tuple[dict[str, np.ndarray], int, float]:
    """Prepares views as a capture does: a batch of them, how many, and how many a second."""
    count = min(most, views.order.views_per_pass)
    pieces = capture.ShardBatches(views, shards.Shard(0, 0, 0, count), _PIECE,
                                  pipeline.Rows(0, _PIECE))
    parts: list[Any] = []
    ends = [time.perf_counter()]
    for part in pipeline.batch_stream(pieces, threads=config.data.threads,
                                      prefetch=config.data.prefetch):
        parts.append(part)
        ends.append(time.perf_counter())
        if ends[-1] - ends[0] > seconds:
            break
    count = min(count, len(parts) * _PIECE)
    # The first piece waits for threads to start; it counts only where it is the only one.
    rate = ((count - _PIECE) / (ends[-1] - ends[1]) if len(parts) > 1
            else count / (ends[1] - ends[0]))
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}, count, rate


def _time_teacher(config: ml_collections.ConfigDict, teacher: Teacher,
                  batch: dict[str, np.ndarray], count: int, mesh: Mesh, seconds: float
                  ) -> tuple[np.ndarray, np.ndarray, float]:
    """Runs the teacher over views at hand: their targets, and how many views a second."""
    size, top = config.teacher.batch_size, capture.make_top(config.store.top_k, mesh)
    done: list[tuple[np.ndarray, np.ndarray]] = []
    began = 0.0
    for start in [0, *range(0, count, size)]:  # the first ones twice, as they compile
        rows = {k: v[start:start + size] if k == "image" else v[start // 2:(start + size) // 2]
                for k, v in batch.items()}
        log_probs = capture.run_teacher(teacher, capture.fill_rows(rows, size), mesh)
        done.append(jax.device_get(top(log_probs)))
        if len(done) == 1:
            began = time.perf_counter()
        elif time.perf_counter() - began > seconds:
            break
    rate = (len(done) - 1) * size / (time.perf_counter() - began)
    index, prob = (np.concatenate(parts)[:count] for parts in zip(*done[1:], strict=True))
    return index, prob, rate
