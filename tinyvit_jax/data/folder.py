"""Images in a tree with a folder for each class."""

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tinyvit_jax.data.source import Example, Fingerprint, SourceError, hold_out

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
EVAL_FOLDERS = ("val", "validation", "test", "eval")


class FolderSource:
    """A tree with a folder for each class."""

    def __init__(self, root: Path, split: str):
        self.name = f"folder:{root}"
        folders = find_splits(root)
        self._root = folders.get(split, root)
        if split not in ("train", "eval"):
            raise SourceError(f"{self.name} has no split {split!r}: expected train or eval.")
        self.class_names = _list_classes(folders.get("train", root))
        keys = sorted(_list_images(self._root))
        labels = _label_keys(keys, self.class_names, self._root, complete=split == "train")
        if not folders:
            kept = hold_out(len(keys), split)
            logging.getLogger(__name__).info(
                "%s has no train/ and val/: %d of its %d images are the %s split, by a fixed rule",
                self.name, len(kept), len(keys), split)
            keys, labels = [keys[i] for i in kept], labels[kept]
        # One string and an array of ends: a list of strings would cost each worker several times
        # as much memory, and a pickle of it many times the time.
        self._labels = labels
        self._ends = np.cumsum([0] + [len(key.encode()) for key in keys])
        self._keys = "".join(keys).encode()

    def __len__(self) -> int:
        return len(self._labels)

    def _key(self, i: int) -> str:
        return self._keys[self._ends[i]:self._ends[i + 1]].decode()

    def __getitem__(self, i: int) -> Example:
        i = range(len(self))[i]
        key = self._key(i)
        # Joining and reading by a Path takes longer, and of a view that counts.
        with open(f"{self._root}/{key}", "rb", buffering=0) as file:
            return Example(key, file.read(), int(self._labels[i]))

    def read(self, indices: Sequence[int]) -> list[Example]:
        """Reads several examples at once, in the order asked for."""
        return [self[i] for i in indices]

    def keys(self) -> np.ndarray:
        """The key of every image as UTF-8: dtype S [n]."""
        found = np.empty(len(self), f"S{np.diff(self._ends).max()}")
        for i in range(len(self)):
            found[i] = self._keys[self._ends[i]:self._ends[i + 1]]
        return found

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 over class names, keys and labels."""
        pairs = ((self._key(i), int(label)) for i, label in enumerate(self._labels))
        return Fingerprint(self.class_names).add(pairs).hexdigest()


def find_splits(root: Path) -> dict[str, Path]:
    """The folders of "train" and "eval" under a root that has both, else nothing."""
    if not root.is_dir():
        raise SourceError(
            f"The folder {root} does not exist. Give one that holds a folder of images for each "
            f"class, or train/ and val/ with such folders in them, as "
            f"--config.data.source=folder:/path."
        )
    held = [root / name for name in EVAL_FOLDERS if (root / name).is_dir()]
    return {"train": root / "train", "eval": held[0]} if held and (root / "train").is_dir() else {}


def _list_classes(root: Path) -> tuple[str, ...]:
    names = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    if len(names) < 2:
        raise SourceError(
            f"The folder {root} has {len(names)} class folder(s) {names}: expected two or more, as "
            f"a classifier has to choose. Put the images of each class into a folder of its own, "
            f"named after the class. (A folder train/ is a split only beside one of "
            f"{', '.join(f'{name}/' for name in EVAL_FOLDERS)}.)"
        )
    return tuple(names)


def _list_images(root: Path) -> Iterator[str]:
    """Paths, relative to root with forward slashes, of the images in its class folders."""
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        prefix = Path(folder).relative_to(root).as_posix()
        if prefix != ".":
            yield from (f"{prefix}/{name}" for name in files
                        if name.lower().endswith(SUFFIXES) and not name.startswith("."))


def _is_text(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _label_keys(keys: list[str], class_names: tuple[str, ...], root: Path,
                complete: bool) -> np.ndarray:
    """The label of each key, int32 [n]; `complete` asks for an image in every class."""
    odd = next((key for key in keys if not _is_text(key)), None)
    if odd is not None:
        raise SourceError(f"The folder {root} has an image whose name is not UTF-8: {odd!r}. "
                          f"Rename it; a key must mean the same on every machine.")
    index = {name: i for i, name in enumerate(class_names)}
    folders = {key.partition("/")[0] for key in keys}
    unknown, empty = sorted(folders - set(index)), sorted(set(index) - folders)
    if not keys or (complete and empty):
        raise SourceError(
            f"The folder {root} has no images in {'any class' if not keys else ', '.join(empty)}: "
            f"expected files ending in {', '.join(SUFFIXES)} in each of its class folders. Add "
            f"them, or delete the folder of a class that is not wanted."
        )
    if unknown:
        raise SourceError(
            f"The folder {root} has classes that train/ has not: {', '.join(unknown[:5])}"
            f"{' ...' if len(unknown) > 5 else ''}. Rename them, or add them to train/."
        )
    return np.array([index[key.partition("/")[0]] for key in keys], np.int32)
