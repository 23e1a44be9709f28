"""What a training run is fed with: batches from the host, or a set that lives on the devices.

Both take a run from one step to another by the same update, and both know at which steps the host
has to look at it.
"""

from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from tinyvit_jax import live, log, memory, resident
from tinyvit_jax import mesh as meshes
from tinyvit_jax.data import pipeline
from tinyvit_jax.memory import Memory
from tinyvit_jax.meter import Meter
from tinyvit_jax.program import Program, describe_arrays
from tinyvit_jax.teachers import Teacher

# Bytes of batches kept ready for each thread: small ones are gone in no time, and for the half
# second in which a checkpoint is written the threads hardly get to work.
_READY = 1 << 21
_UNDER_WAY = 2  # updates given to the devices and not done: one at work, one that follows at once


class Run(NamedTuple):
    """What a feed needs to know of a run.

    Attributes:
        config: of it.
        views: that it shows.
        steps: updates in it.
        start: updates that were done before.
        classes: C.
        mesh: over which batches are cut.
        compiler: compiles programs in the background.
        title: for messages.
    """

    config: ml_collections.ConfigDict
    views: pipeline.Views
    steps: int
    start: int
    classes: int
    mesh: Mesh
    compiler: Executor
    title: str


def open_feed(run: Run, like: Any, step_fn: Any, teacher: Teacher | None) -> "Streamed | Resident":
    """The feed that the config asks for, its programs being compiled in the background.

    Args:
        run: what it is for.
        like: shapes of the state.
        step_fn: from `train.make_train_step`.
        teacher: for the live_teacher objective.
    """
    pipeline.import_grain()
    if run.config.data.resident:
        return Resident(run, like, step_fn)
    return Streamed(run, like, step_fn, teacher)


class Streamed:
    """Batches that threads or processes of the host prepare, each followed by its update.

    The host runs two updates ahead: the next batch travels while the present update runs.
    """

    def __init__(self, run: Run, like: Any, step_fn: Any, teacher: Teacher | None):
        self.run, rows = run, pipeline.Rows.of_process(
            run.config.train.batch_size, jax.process_index(), jax.process_count())
        self.batches = pipeline.TrainBatches(run.views, run.config.train.batch_size, rows,
                                             run.steps)
        shapes = describe_batch(self.batches, run.start, run.mesh)
        self._prefetch = run.config.data.prefetch or count_ready(shapes)
        self.teaching = live.Teaching(teacher, run.config.objective.name == "live_teacher", shapes,
                                      run.classes, run.mesh, run.compiler, run.title)
        self.update = Program(step_fn, (like, self.teaching.shapes), run.compiler,
                              f"{run.title}: the update")

    def open(self, workdir: Path) -> Meter:
        """Starts preparing batches, and the clock."""
        d = self.run.config.data
        self._stream = pipeline.batch_stream(self.batches, self.run.start, threads=d.threads,
                                             workers=d.workers, prefetch=self._prefetch)
        self._meter = _make_meter(self.run, workdir)
        return self._meter

    def measure(self) -> tuple[Memory, int, float]:
        """Waits for the programs: their memory, bytes of batches ahead, seconds of compiling."""
        needs, seconds = self.update.wait()
        ahead = _UNDER_WAY * memory.count_bytes(self.update.shapes[1])  # of arguments, one is there
        return self.teaching.add_memory(needs), ahead, seconds

    def stops(self, *marks: set[int]) -> Iterator[int]:
        """Each step: a batch has to be fetched for it."""
        return iter(range(self.run.start + 1, self.run.steps + 1))

    def prepare(self) -> None:
        """Waits for the next batch and sends it on its way."""
        with self._meter.waiting():
            rows = next(self._stream)
        self._batch = self.teaching(meshes.put_batch(rows, self.run.mesh))

    def advance(self, state: Any, stop: int) -> tuple[Any, dict[str, jax.Array]]:
        """Gives the devices the update to step `stop`, with the batch that was prepared."""
        with jax.transfer_guard("disallow"):
            return self.update(state, self._batch)

    def hold(self) -> None:
        """Waits while too many updates are under way: each holds its batch in memory."""
        self._meter.bound_queue(_UNDER_WAY)


class Resident:
    """A whole set in the memory of every device, where its views are made too (resident.py)."""

    def __init__(self, run: Run, like: Any, step_fn: Any):
        self.run, views = run, run.views
        order = resident.check(run.config, views.spec, views.order, views.store, run.steps,
                               memory.find_room())
        batch_of = resident.make_batches(views.spec, order, run.config.train.batch_size, run.mesh)
        whole, size = meshes.replicated(run.mesh), views.spec.image_size
        shapes = describe_arrays(
            {"image": jax.ShapeDtypeStruct((len(views.source), size, size, 3), jnp.uint8),
             "label": jax.ShapeDtypeStruct((len(views.source),), jnp.int32)}, whole)
        self._end = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        self.update = Program(resident.make_update(step_fn, batch_of, run.mesh),
                              (like, shapes, self._end), run.compiler, f"{run.title}: the updates")

    def open(self, workdir: Path) -> Meter:
        """Decodes the set and puts it on the devices; starts the clock."""
        views = self.run.views
        self._arrays = meshes.put_state(
            resident.read_arrays(views.source, views.spec.image_size), self.run.mesh)
        return _make_meter(self.run, workdir)

    def measure(self) -> tuple[Memory, int, float]:
        """Waits for the program: its memory, no bytes of batches ahead, seconds of compiling."""
        needs, seconds = self.update.wait()
        return needs, 0, seconds

    def stops(self, *marks: set[int]) -> Iterator[int]:
        """The steps after which there is something to write down, and the last."""
        return resident.list_stops(self.run.start, self.run.steps, *marks)

    def prepare(self) -> None:
        """Nothing: the devices make their batches."""

    def advance(self, state: Any, stop: int) -> tuple[Any, dict[str, jax.Array]]:
        """Gives the devices all updates to step `stop`; the means of their metrics."""
        end = jax.device_put(np.int32(stop), self._end.sharding)
        with jax.transfer_guard("disallow"):
            return self.update(state, self._arrays, end)

    def hold(self) -> None:
        """Nothing: no batch waits."""


def _make_meter(run: Run, workdir: Path) -> Meter:
    return Meter(run.title, run.config.train.batch_size, run.steps,
                 log.last_seconds(workdir / "metrics.jsonl"))


def count_ready(shapes: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Batches of these shapes to keep ready for each thread: two, or more of small ones."""
    return max(2, _READY // (memory.count_bytes(shapes) * jax.local_device_count()))


def describe_batch(batches: pipeline.TrainBatches, start: int, mesh: Mesh
                   ) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a run's batches, from the first two rows that this process reads."""
    first = start * batches.batch_size + batches.rows.first
    pair: Any = batches.views.read(np.arange(first, first + 2))
    return {name: jax.ShapeDtypeStruct(
        (x.shape[0] * batches.batch_size // 2, *x.shape[1:]), x.dtype,
        sharding=meshes.sharded(mesh)) for name, x in pair.items()}
