"""What a source of images is: encoded bytes and labels by position, in an order that never changes.

A source can be pickled to worker processes and read by several threads at once. Its fingerprint is
what a store of teacher logits remembers of it: the same images under the same keys have the same
one, whether they lie in a folder or in the pack made of it.
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from tinyvit_jax.data import draws

_HELD_OUT = 10  # one image of this many
_CHUNK = 1024  # examples read at once for their keys
_LARGE = 100_000  # images whose reading takes so long that a message says so
_HOLD_OUT_SEED = 0x7E57  # frozen: another value would move images between train and eval


class SourceError(ValueError):
    """A source that cannot be used; the message says what was found and what to do."""


class Example(NamedTuple):
    """One image: its key in the source, the bytes of its file, and its class."""

    key: str
    image: bytes
    label: int
    # Every right class, ascending, of a set that has any number of them; None: the label alone.
    labels: tuple[int, ...] | None = None


class ImageSource(Protocol):
    """What every source offers.

    Attributes:
        name: how messages call it.
        class_names: names of the classes; a label is an index into them.
        fingerprint: sha256 in hex over class names, keys and labels.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def class_names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example: ...

    def read(self, indices: Sequence[int]) -> list[Example]:
        """Reads several examples at once, in the order asked for."""
        ...

    def keys(self) -> np.ndarray:
        """The key of every image by position, as UTF-8: dtype S (zero-padded bytes), [n].

        A folder has them in memory; other sources read their records, images and all.
        """
        ...


def read_keys(source: ImageSource) -> np.ndarray:
    """The keys of a source that has them in its records alone: dtype S [n]."""
    if len(source) > _LARGE:
        logging.getLogger(__name__).info(
            "%s keeps its keys in its records: reading all %d of them", source.name, len(source))
    starts = range(0, len(source), _CHUNK)
    return np.concatenate([
        np.array([e.key.encode() for e in source.read(range(s, min(s + _CHUNK, len(source))))])
        for s in starts])


class Fingerprint:
    """The sha256 of class names and then of the key and label of each example in order."""

    def __init__(self, class_names: Sequence[str]):
        self._digest = hashlib.sha256("".join(f"{name}\0" for name in class_names).encode())

    def add(self, examples: Iterable[tuple[str, int]]) -> "Fingerprint":
        """Takes in further keys and labels."""
        for key, label in examples:
            self._digest.update(f"{key}\0{label}\0".encode())
        return self

    def hexdigest(self) -> str:
        """The fingerprint of all that was taken in."""
        return self._digest.hexdigest()


def hold_out(size: int, split: str) -> np.ndarray:
    """Positions, int64 and ascending, of a split of a set that has none of its own.

    Args:
        size: images of the set, two or more.
        split: "eval" gets a tenth of them, at least one; "train" gets the others.
    """
    held = min(max(1, size // _HELD_OUT), size - 1)
    is_held = draws.shuffled(np.arange(size), size, _HOLD_OUT_SEED) < held
    return np.flatnonzero(is_held if split == "eval" else ~is_held)
