"""TinyViT's own files of teacher logits, written and read step for step as the original does.

What microsoft/Cream, folder TinyViT, does in data/augmentation/manager.py, dataset_wrapper.py and
save_logits.py, in lines of our own, so that this package's store can be measured against it without
its code. The files are those of tinyvit_jax/store/microsoft.py. Three steps differ, none to the
original's disadvantage: the writer's process is there before the first view is; files are moved by
Python, not by a shell; and the seed is taken out of its array by [0], as today's numpy refuses the
int() of an array of one element.
"""

import multiprocessing
import os
import queue
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_KEYS, _VALUES = "-keys.txt", "-values.bin"
_START_SECONDS = 60.0  # within which a new process must be there


def epoch_folder(folder: Path, top_k: int, epoch: int) -> Path:
    """Where the files of an epoch lie."""
    return folder / f"logits_top{top_k}_epoch{epoch}"


def item_bytes(top_k: int) -> int:
    """Bytes of a view in the values file: its seed, K classes and K probabilities."""
    return 4 + 2 * top_k + 2 * top_k


class Writer:
    """Hands views one by one to a process that appends them to the two files of a rank.

    Args:
        folder: of the epoch; made when the writer is closed.
        rank: number of the process that captures.

    Raises:
        RuntimeError: the writing process does not start.
    """

    def __init__(self, folder: Path, rank: int):
        # Not forked: other threads of this process may hold locks that a copy would wait for.
        context = multiprocessing.get_context("spawn")
        self._messages: Any = context.Queue()
        self._started: Any = context.Queue()
        self._process = context.Process(target=_write_items, daemon=True,
                                        args=(self._messages, self._started, str(folder), rank))
        self._process.start()
        try:
            self._started.get(timeout=_START_SECONDS)
        except queue.Empty:
            raise RuntimeError(f"the process that writes {folder} did not start within "
                               f"{_START_SECONDS:.0f} seconds") from None

    def move_to(self, cpus: Iterable[int]) -> None:
        """Lets the writing process run on other CPUs than the one that started it (Linux)."""
        os.sched_setaffinity(self._process.pid or 0, cpus)

    def write_batch(self, keys: Sequence[str], seed: np.ndarray, index: np.ndarray,
                    prob: np.ndarray) -> None:
        """What the original does with a batch of the teacher's, once it has its top K.

        Args:
            keys: of the views.
            seed: int32 [n].
            index: classes, int32 [n, K]; above 32,767 they overflow, as the original's do.
            prob: float32 [n, K].
        """
        classes, values = index.astype(np.int16), prob.astype(np.float16)
        for key, one_seed, one_classes, one_values in zip(keys, seed, classes, values, strict=True):
            item = one_seed.tobytes() + one_classes.tobytes() + one_values.tobytes()
            self._messages.put((key, item))

    def close(self) -> None:
        """Waits until everything is written and moved to its place.

        Raises:
            RuntimeError: the writing process failed, and there are no files.
        """
        self._messages.put(None)
        self._process.join()
        if self._process.exitcode:
            raise RuntimeError(f"the writing process ended with exit code {self._process.exitcode}")


def _write_items(messages: Any, started: Any, folder: str, rank: int) -> None:
    """The writing process: appends each key once, and moves both files when told to end."""
    with tempfile.TemporaryDirectory(prefix="original_logits_") as temporary:
        names = [f"rank{rank}{suffix}" for suffix in (_KEYS, _VALUES)]
        seen: dict[str, int] = {}
        with (open(os.path.join(temporary, names[0]), "w", encoding="utf-8") as keys_file,
              open(os.path.join(temporary, names[1]), "wb") as values_file):
            started.put(True)
            while (message := messages.get()) is not None:
                key, value = message
                if key in seen:
                    continue
                seen[key] = len(seen)
                keys_file.write(key + "\n")
                values_file.write(value)
        os.makedirs(folder, exist_ok=True)
        for name in names:
            shutil.move(os.path.join(temporary, name), os.path.join(folder, name))


class Reader:
    """The files of an epoch: a dict of every key read so far, and one seek and read a view.

    Args:
        folder: of the epoch.
        top_k: K.
        rank: number of the process that reads; its own files are looked through first.
    """

    def __init__(self, folder: Path, top_k: int, rank: int = 0):
        self._size = item_bytes(top_k)
        ranks = [int(name[len("rank"):-len(_VALUES)]) for name in os.listdir(folder)
                 if name.endswith(_VALUES)]
        count = len(ranks)
        self._names = [os.path.join(folder, f"rank{number}")
                       for number in sorted(ranks, key=lambda number: (number - rank) % count)]
        self._files: list[BinaryIO | None] = [None] * count
        self._loaded = 0  # how many ranks' keys the dict holds
        self._places: dict[str, tuple[int, int]] = {}

    def read(self, key: str) -> bytes:
        """The bytes of a view; loads the keys of rank after rank until this one is found.

        Raises:
            KeyError: no rank has it.
        """
        place = self._places.get(key)
        package, line = self._find(key) if place is None else place
        file = self._files[package]
        if file is None:
            file = self._files[package] = open(self._names[package] + _VALUES, "rb")  # noqa: SIM115
        file.seek(self._size * line)
        return file.read(self._size)

    def _find(self, key: str) -> tuple[int, int]:
        while self._loaded < len(self._names):
            package = self._loaded
            self._loaded += 1
            with open(self._names[package] + _KEYS, encoding="utf-8") as file:
                for line, text in enumerate(file.readlines()):
                    self._places[text.strip()] = package, line
            if key in self._places:
                return self._places[key]
        raise KeyError(key)

    def close(self) -> None:
        """Closes the values files."""
        for file in self._files:
            if file is not None:
                file.close()


class Views:
    """The reading half of the original's data set: a number of an image in, its target out.

    Args:
        folder: that holds the epochs.
        keys: of the images, by number.
        top_k: K.
        rank: number of the process that reads.
    """

    def __init__(self, folder: Path, keys: Sequence[str], top_k: int, rank: int = 0):
        self._folder, self._keys, self._top_k, self._rank = folder, keys, top_k, rank
        self._epoch = multiprocessing.Value("i", 0)  # shared with the workers, so behind a lock
        self._open: tuple[int | None, Reader | None] = None, None

    def set_epoch(self, epoch: int) -> None:
        """Goes to another epoch, or begins this one again; forgets every key."""
        if self._open[1] is not None:
            self._open[1].close()
        self._epoch.value = epoch
        self._open = None, None

    def read(self, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The target of an image in this epoch.

        Returns:
            View seed, classes int16 [K] and probabilities float16 [K], arrays of their own.
        """
        key = self._keys[number]
        data = self._reader().read(key)
        seed = int(np.frombuffer(data[:4], dtype=np.int32)[0])
        data = data[4:]
        index = np.frombuffer(data[:self._top_k * 2], dtype=np.int16).copy()
        data = data[self._top_k * 2:]
        return seed, index, np.frombuffer(data[:self._top_k * 2], dtype=np.float16).copy()

    def _reader(self) -> Reader:
        epoch = self._epoch.value
        reader = self._open[1]
        if reader is None or epoch != self._open[0]:
            reader = Reader(epoch_folder(self._folder, self._top_k, epoch), self._top_k, self._rank)
            self._open = epoch, reader
        return reader
