"""From step numbers to batches, by grain: the only file that imports it.

Every element is a whole batch and a pure function of its number, so any count of threads or worker
processes gives the same batches, and resuming is starting at another number.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from tinyvit_jax import cores
from tinyvit_jax.batch import Batch
from tinyvit_jax.data import augment, images, labels, ops
from tinyvit_jax.data.order import AnyOrder
from tinyvit_jax.store.store import Store


class Rows(NamedTuple):
    """This process's share of every batch: rows [first, first + size)."""

    first: int
    size: int

    @classmethod
    def of_process(cls, batch_size: int, index: int, count: int) -> "Rows":
        """The share of process `index` of `count`; batch_size must be a multiple of 2 * count."""
        share = batch_size // count
        return cls(index * share, share)


class Views:
    """Replays views of an image set: view numbers in, a Batch out.

    Args:
        source: the images.
        spec: how views are made.
        order: which image and seed each view number has.
        store: the teacher's targets for these views, or None.
        passes: of the store to show before they are shown again; 0 = all it has.
        top_k: how many of the stored classes to give, the most probable ones; 0 = all.
    """

    def __init__(self, source: images.ImageSource, spec: augment.Spec, order: AnyOrder,
                 store: Store | None = None, passes: int = 0, top_k: int = 0):
        self.source, self.spec, self.order, self.store = source, spec, order, store
        self.passes = passes or (store.manifest.passes if store else 0)
        self.top_k = top_k or (store.manifest.top_k if store else 0)

    def read(self, view: np.ndarray) -> Batch:
        """The batch of consecutive view numbers: int64 [n] -> n rows."""
        pass_number, position = self.order.locate(view)
        if self.store is not None:  # more epochs than stored passes show the passes again
            pass_number = pass_number % self.passes
        index, seed = self.order.keys(pass_number, position)
        examples, pixels = self._replay(index, seed)
        batch = Batch(
            image=pixels,
            label=np.array([e.label for e in examples], np.int32),
            weight=np.ones(len(examples), np.float32),
        )
        if self.order.paired:
            mixed = [augment.sample_mix(a, b, self.spec)
                     for a, b in zip(seed[::2].tolist(), seed[1::2].tolist(), strict=True)]
            batch["lam"] = np.array([lam for lam, _ in mixed], np.float32)
            batch["box"] = np.array([box for _, box in mixed], np.int32)
        if self.store is not None:
            batch["index"], batch["prob"] = self._targets(pass_number, position, index, seed)
        return batch

    def replay(self, pass_number: np.ndarray, position: np.ndarray
               ) -> tuple[list[images.Example], np.ndarray]:
        """The images at some places and their views, as `read` shows them: unmixed.

        Args:
            pass_number: int [n], of a store one that it has.
            position: int [n] in [0, views_per_pass), in any order.

        Returns:
            The n examples, and uint8 [n, S, S, 3].
        """
        return self._replay(*self.order.keys(pass_number, position))

    def _replay(self, index: np.ndarray, seed: np.ndarray
                ) -> tuple[list[images.Example], np.ndarray]:
        examples = self.source.read(index.tolist())
        size = self.spec.image_size
        # Filled row by row: a list of views to stack would hold every pixel twice.
        pixels = np.empty((len(examples), size, size, 3), np.uint8)
        views = augment.replay_batch([(e.image, e.key) for e in examples], seed.tolist(), self.spec)
        for row, view in zip(pixels, views, strict=True):
            row[...] = view
        return examples, pixels

    def _targets(self, pass_number: np.ndarray, position: np.ndarray, index: np.ndarray,
                 seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The stored targets, one range of positions for each pass that the batch touches."""
        assert self.store is not None
        cuts = np.flatnonzero(np.diff(position) != 1) + 1
        parts = []
        for run in np.split(np.arange(len(position)), cuts):
            keys = (index[run], seed[run])
            parts.append(self.store.read(int(pass_number[run[0]]), int(position[run[0]]),
                                         int(position[run[-1]]) + 1, keys))
        return (np.concatenate([i[:, :self.top_k] for i, _ in parts]),
                np.concatenate([p[:, :self.top_k] for _, p in parts]))


class TrainBatches:
    """Random access to the batches of a run: step -> this process's rows.

    Args:
        views: what replays them.
        batch_size: rows over all processes.
        rows: this process's share.
        steps: length of the run.
    """

    def __init__(self, views: Views, batch_size: int, rows: Rows, steps: int):
        self.views, self.batch_size, self.rows, self.steps = views, batch_size, rows, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        first = int(step) * self.batch_size + self.rows.first
        return self.views.read(np.arange(first, first + self.rows.size))


class EvalBatches:
    """Every image once, unaugmented and in order; the last batch is filled with weight 0.

    Args:
        source: the images.
        view: fn(pixels uint8 [h, w, 3]) -> uint8 [S, S, 3].
        batch_size: rows over all processes.
        rows: this process's share.
        most_labels: of an image, where a set has any number of them: the width of "labels".
            0 = each image has one, and batches have no "labels".
    """

    def __init__(self, source: images.ImageSource, view: Callable[[np.ndarray], np.ndarray],
                 batch_size: int, rows: Rows, most_labels: int = 0):
        self.source, self.view, self.batch_size, self.rows = source, view, batch_size, rows
        self.most_labels = most_labels

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        first = int(step) * self.batch_size + self.rows.first
        real = range(first, min(first + self.rows.size, len(self.source)))
        examples = self.source.read(list(real)) or [self.source[0]]  # all padding: any image does
        pixels = [self.view(ops.decode(e.image, e.key)) for e in examples]
        padding = self.rows.size - len(pixels)
        examples += examples[-1:] * padding
        weight = np.zeros(self.rows.size, np.float32)
        weight[: len(real)] = 1
        batch = Batch(image=np.stack(pixels + pixels[-1:] * padding),
                      label=np.array([e.label for e in examples], np.int32), weight=weight)
        if self.most_labels:
            batch["labels"] = labels.pad_labels([e.labels or () for e in examples],
                                                self.most_labels)
        return batch


def import_grain() -> None:
    """Imports grain, before threads compile.

    Its import makes any other thread's, for a moment, put a module off until it is used, which
    JAX's own do not survive; and a thread that traces a function imports some of these.
    """
    import grain  # noqa: F401


def batch_stream(batches, start: int = 0, *, threads: int = 0, workers: int = 0,
                 prefetch: int = 0) -> Iterator[Batch]:
    """Iterates over batches from number `start`, prepared ahead by threads or processes.

    Args:
        batches: TrainBatches, EvalBatches or anything of their shape.
        start: number of the first batch.
        threads: threads in each process; 0 = one for each CPU core that this process may use,
            shared out among the workers where there are any.
        workers: processes beside this one; 0 = none.
        prefetch: batches kept ready for each thread; 0 = 2.
    """
    import grain

    prefetch = prefetch or 2
    threads = threads or cores.count_cores(max(workers, 1))
    dataset = grain.MapDataset.source(batches)[start:]
    stream = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch * threads))
    if workers:
        _parse_flags()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=prefetch))
    return iter(stream)


def _parse_flags() -> None:
    """grain's worker processes read absl's flags; outside of absl's app.run nobody parsed them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["tinyvit_jax"])
