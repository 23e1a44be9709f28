"""CIFAR-10, CIFAR-100 and STL-10 from the binary files that they are published as.

Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; Coates, Lee and Ng, AISTATS
2011. Files are mapped into memory, which processes of one machine share, and images are handed on
as their very pixels (data/ppm.py).
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyvit_jax.data import ppm
from tinyvit_jax.data.source import Example, Fingerprint, SourceError

_SPLITS = {"train": "train", "eval": "test"}  # by what we call them: the sets' own names


class Layout(NamedTuple):
    """How the files of a set are laid out.

    Attributes:
        title: of the set.
        archive: where it is published.
        folder: that its archive unpacks to.
        names: file of the class names, one a line.
        classes: how many.
        side: of an image in pixels.
        files: (name, images) of each split's files.
        head: bytes before each image; the last of them is its label. 0 = labels have files.
        labels: of each split, the file with a byte for each image, from 1; where head is 0.
        columns: pixels go down the columns, not along the rows.
    """

    title: str
    archive: str
    folder: str
    names: str
    classes: int
    side: int
    files: dict[str, tuple[tuple[str, int], ...]]
    head: int
    labels: dict[str, str]
    columns: bool

    @property
    def record(self) -> int:
        """Bytes of an image and what stands before it."""
        return self.head + 3 * self.side ** 2


LAYOUTS = (
    Layout("CIFAR-10", "cifar-10-binary.tar.gz of www.cs.toronto.edu/~kriz/cifar.html",
           "cifar-10-batches-bin", "batches.meta.txt", 10, 32,
           {"train": tuple((f"data_batch_{i}.bin", 10_000) for i in range(1, 6)),
            "test": (("test_batch.bin", 10_000),)}, 1, {}, False),
    # The first of its two bytes is one of 20 coarse labels.
    Layout("CIFAR-100", "cifar-100-binary.tar.gz of www.cs.toronto.edu/~kriz/cifar.html",
           "cifar-100-binary", "fine_label_names.txt", 100, 32,
           {"train": (("train.bin", 50_000),), "test": (("test.bin", 10_000),)}, 2, {}, False),
    Layout("STL-10", "stl10_binary.tar.gz of cs.stanford.edu/~acoates/stl10",
           "stl10_binary", "class_names.txt", 10, 96,
           {"train": (("train_X.bin", 5_000),), "test": (("test_X.bin", 8_000),)}, 0,
           {"train": "train_y.bin", "test": "test_y.bin"}, True),
)
# Files of the same sets in forms that are not read: Python's pickles and MATLAB's.
_OTHER_FORMS = ("data_batch_1", "train", "data_batch_1.mat", "train.mat")


class BinarySource:
    """One split of CIFAR-10, CIFAR-100 (by its 100 fine labels) or STL-10.

    The key of an image is its split and place in it: "train/00042".
    """

    def __init__(self, root: Path, split: str):
        self.name = f"binary:{root}"
        self._layout, folder = _find_layout(root)
        if split not in _SPLITS:
            raise SourceError(
                f"{self.name} has no split {split!r}: expected train or eval, which is "
                f"{self._layout.title}'s own test split. Images without labels are no split here: "
                f"a classifier has nothing to be scored by.")
        self._split = _SPLITS[split]
        self._files = [(folder / name, count) for name, count in self._layout.files[self._split]]
        self._starts = np.cumsum([0] + [count for _, count in self._files])
        self.class_names = _read_names(folder / self._layout.names, self._layout)
        self._open()
        self._labels = self._read_labels(folder)

    def _open(self) -> None:
        self._records = [_map_file(path, count, self._layout) for path, count in self._files]

    def __getstate__(self) -> dict:
        # A mapping would be pickled as the bytes of the whole file.
        return {key: value for key, value in self.__dict__.items() if key != "_records"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def _read_labels(self, folder: Path) -> np.ndarray:
        """The class of every image, int32 [n], checked."""
        layout = self._layout
        if layout.head:
            found = np.concatenate([records[:, layout.head - 1] for records in self._records])
            paths, first = [path for path, _ in self._files], 0
        else:
            paths, first = [folder / layout.labels[self._split]], 1
            found = _map_file(paths[0], len(self), layout._replace(head=1, side=0))[:, 0]
        labels = found.astype(np.int32) - first
        wrong = np.flatnonzero((labels < 0) | (labels >= layout.classes))
        if len(wrong):
            file = int(np.searchsorted(self._starts, wrong[0], side="right")) - 1
            path = paths[min(file, len(paths) - 1)]
            raise SourceError(
                f"{path} is damaged, or not of {layout.title}: image {wrong[0]} of the "
                f"{self._split} split has the label {found[wrong[0]]}, expected {first} to "
                f"{layout.classes - 1 + first}. Unpack {layout.archive} again.")
        return labels

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _key(self, i: int) -> str:
        return f"{self._split}/{i:05d}"

    def __getitem__(self, i: int) -> Example:
        return self.read([i])[0]

    def read(self, indices: Sequence[int]) -> list[Example]:
        """Reads several examples at once, in the order asked for."""
        wanted = np.array([range(len(self))[i] for i in indices], np.int64)
        side, head = self._layout.side, self._layout.head
        planes = np.empty((len(wanted), 3 * side * side), np.uint8)
        file = np.searchsorted(self._starts, wanted, side="right") - 1
        for number in np.unique(file):
            rows = np.flatnonzero(file == number)
            planes[rows] = self._records[number][wanted[rows] - self._starts[number], head:]
        order = (0, 3, 2, 1) if self._layout.columns else (0, 2, 3, 1)
        pixels = np.ascontiguousarray(planes.reshape(-1, 3, side, side).transpose(order))
        start = ppm.header(side, side)
        return [Example(self._key(i), start + image.tobytes(), int(self._labels[i]))
                for i, image in zip(wanted.tolist(), pixels, strict=True)]

    def keys(self) -> np.ndarray:
        """The key of every image as UTF-8: dtype S [n]."""
        return np.array([self._key(i).encode() for i in range(len(self))])

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 over class names, keys and labels."""
        pairs = ((self._key(i), label) for i, label in enumerate(self._labels.tolist()))
        return Fingerprint(self.class_names).add(pairs).hexdigest()


def _find_layout(root: Path) -> tuple[Layout, Path]:
    """Which set lies in a folder, or in one inside of it that an archive unpacks to."""
    found = [(layout, folder) for layout in LAYOUTS for folder in (root, root / layout.folder)
             if any((folder / name).is_file() for files in layout.files.values()
                    for name, _ in files)]
    if len(found) == 1:
        return found[0]
    if found:
        places = " and ".join(f"{layout.title} in {folder}" for layout, folder in found)
        raise SourceError(f"binary:{root} could be {places}. Name the folder of one of them by "
                          f"--config.data.source=binary:/path.")
    other = [name for name in _OTHER_FORMS if (root / name).is_file()]
    hint = (f"It has {other[0]}, a file of the versions for Python or MATLAB, which are not read: "
            f"unpack the binary version. ") if other else ""
    state = "has none of their files" if root.is_dir() else "does not exist"
    forms = "; ".join(f"{layout.title}: {layout.files['train'][0][0]} ... {layout.names}"
                      for layout in LAYOUTS)
    raise SourceError(
        f"binary:{root} is to be the binary version of CIFAR-10, CIFAR-100 or STL-10, and the "
        f"folder {state}. {hint}Expected what their archives unpack to ({forms}). Set it by "
        f"--config.data.source=binary:/path; images of your own are read as folder:/path.")


def _read_names(path: Path, layout: Layout) -> tuple[str, ...]:
    try:
        names = tuple(path.read_bytes().decode(errors="replace").split())
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}): the class names of "
                          f"{layout.title} stand there. Unpack {layout.archive} again.") from error
    if len(names) != layout.classes or len(set(names)) != layout.classes:
        raise SourceError(f"{path} names {len(names)} classes: expected the {layout.classes} of "
                          f"{layout.title}, each once. Unpack {layout.archive} again.")
    return names


def _map_file(path: Path, count: int, layout: Layout) -> np.ndarray:
    """The records of a file, uint8 [count, bytes], as they lie on the disk."""
    found = path.stat().st_size if path.is_file() else None
    expected = count * layout.record
    if found != expected:
        state = "is missing" if found is None else f"has {found:,} bytes"
        raise SourceError(
            f"{path} {state}: expected {expected:,} bytes, {count:,} of {layout.record:,} each, as "
            f"{layout.title} has them. It was cut off, or is another file; unpack {layout.archive} "
            f"again.")
    return np.memmap(path, np.uint8, "r", shape=(count, layout.record))
