"""The original's files of teacher logits (microsoft/Cream, TinyViT, save_logits.py), as they are.

    FOLDER/logits_top{K}_epoch{E}/rank{R}-keys.txt    a key a line
    FOLDER/logits_top{K}_epoch{E}/rank{R}-values.bin  for each key: seed int32, K classes int16,
                                                      K probabilities float16; little endian

There is no header, no checksum and no class list, so everything that can be checked is: sizes
against each other, classes, probabilities and seeds by their ranges. A key is the image's name for
ImageNet-22k (n00007846_10001), else its position in the data set. A rank writes its keys in the
order of its batches, each once, and an epoch's files appear when the rank is through with it.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np

from tinyvit_jax.store import codec
from tinyvit_jax.store.manifest import StoreError

_FOLDER = re.compile(r"logits_top(\d+)_epoch(\d+)")
_FILE = re.compile(r"rank(\d+)-(keys\.txt|values\.bin)")
_LONGEST_KEY = 1024  # bytes; a longer line is no name of an image
_CHUNK = 1 << 18  # lines, or bytes times 64, at a time: bounds memory
_OVERFLOW = 1 << 15


def find_epochs(folder: Path) -> dict[tuple[int, int], Path]:
    """The epochs in a folder of the original's: (K, epoch) -> their own folder, ascending.

    Raises:
        StoreError: the folder holds none.
    """
    if not folder.is_dir():
        raise StoreError(f"The folder {folder} does not exist. Give the one that the original "
                         f"calls DISTILL.TEACHER_LOGITS_PATH, by --from=FOLDER.")
    found = {(int(m[1]), int(m[2])): p for p in folder.iterdir()
             if (m := _FOLDER.fullmatch(p.name)) and p.is_dir()}
    if not found:
        parent = _FOLDER.fullmatch(folder.resolve().name)
        advice = f"It is one epoch itself: give --from={folder.resolve().parent}" if parent else (
            "Give the folder that holds them, by --from=FOLDER")
        raise StoreError(f"{folder} has no folder named like logits_top100_epoch0. {advice}.")
    return dict(sorted(found.items()))


def choose_epochs(folder: Path, top_k: int) -> tuple[int, dict[int, Path]]:
    """The K of a folder and its epochs: epoch -> its folder, ascending and without a gap.

    Args:
        folder: of the original's.
        top_k: which K to take where the folder has several.

    Raises:
        StoreError: there is no epoch, an epoch is missing between two, or K cannot be chosen.
    """
    found = find_epochs(folder)
    sizes = sorted({k for k, _ in found})
    if len(sizes) > 1 and top_k not in sizes:
        raise StoreError(f"{folder} has epochs of K = {', '.join(map(str, sizes))} classes a view. "
                         f"Say which by --config.store.top_k=K; it is {top_k} now.")
    chosen = top_k if len(sizes) > 1 else sizes[0]
    epochs = {epoch: path for (k, epoch), path in found.items() if k == chosen}
    absent = sorted(set(range(min(epochs), max(epochs))) - set(epochs))
    if absent:
        raise StoreError(
            f"{folder} has epochs {min(epochs)} to {max(epochs)} of K = {chosen} but not "
            f"{_list(absent)}: expected a folder logits_top{chosen}_epoch{absent[0]}. Copy what is "
            f"missing, or move the epochs behind the gap elsewhere.")
    return chosen, epochs


@dataclasses.dataclass(frozen=True)
class Rank:
    """The two files that one process wrote in one epoch."""

    keys_file: Path
    values_file: Path
    lines: int
    top_k: int

    def read_keys(self) -> np.ndarray:
        """Every key in order: dtype S (zero-padded bytes), [lines].

        Raises:
            StoreError: a line is no text, empty or too long; names it.
        """
        data = self.keys_file.read_bytes().replace(b"\r\n", b"\n")
        _check_text(data, self.keys_file)
        raw = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(raw == ord("\n"))
        lengths = np.diff(ends, prepend=-1) - 1
        bad = np.flatnonzero((lengths < 1) | (lengths > _LONGEST_KEY))
        if len(bad):
            raise _line_error(self.keys_file, bad[0], f"a key of 1 to {_LONGEST_KEY} bytes",
                              f"one of {lengths[bad[0]]}")
        width = int(lengths.max())
        table = np.zeros((len(lengths), width), np.uint8)
        for a in range(0, len(lengths), _CHUNK):
            rows = slice(a, a + _CHUNK)
            chunk = raw[ends[a] - lengths[a]:ends[rows][-1]]
            table[rows][np.arange(width) < lengths[rows, None]] = chunk[chunk != ord("\n")]
        return table.view(f"S{width}")[:, 0]

    def read(self, rows: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What stands in some rows of the values, checked.

        Args:
            rows: line numbers from 0, int [n].
            num_classes: C.

        Returns:
            seed uint32 [n], classes int32 [n, K] and probabilities float32 [n, K], which are the
            stored float16 numbers; classes in the order of the file.

        Raises:
            StoreError: a value that no teacher gives; names the file and the line.
        """
        values = np.memmap(self.values_file, _item(self.top_k), "r")[rows]
        seed, index = values["seed"], values["index"].astype(np.int32)
        prob = values["prob"].astype(np.float32)
        self._check(rows, seed, index, prob, num_classes)
        return seed.astype(np.uint32), index, prob

    def _check(self, rows: np.ndarray, seed: np.ndarray, index: np.ndarray, prob: np.ndarray,
               classes: int) -> None:
        """Raises StoreError for the first row that cannot be."""
        ordered, total = np.sort(index, axis=1), prob.sum(1, dtype=np.float64)
        most = codec.max_sum(self.top_k, "float16")
        for good, expected, found in (
            (seed >= 0, "a seed of 0 or more", seed),
            ((index >= 0).all(1), "classes of 0 or more; the format's int16 overflows above "
             f"{_OVERFLOW - 1:,} classes, and which class was meant is lost", index.min(1)),
            ((index < classes).all(1), f"classes below {classes:,}, the classes of the images",
             index.max(1)),
            ((ordered[:, 1:] > ordered[:, :-1]).all(1), "no class twice", ordered),
            (np.isfinite(prob).all(1), "finite probabilities", prob),
            (~np.signbit(prob).any(1), "probabilities of 0 or more", prob.min(1)),
            ((total > 0) & (total <= most), f"probabilities that sum to more than 0 and at most "
             f"{most:.5f}, which is 1 and the rounding to float16", total),
        ):
            if not good.all():
                at = int(np.argmin(good))
                raise _line_error(self.values_file, int(rows[at]), expected, f"{found[at]}")


def open_ranks(epoch: Path, top_k: int) -> list[Rank]:
    """The files of an epoch in the order of their ranks, sizes checked; reads every line end.

    Args:
        epoch: its folder.
        top_k: K, as the folder's name says.

    Raises:
        StoreError: a file is missing, empty, cut short or of another K.
    """
    found: dict[int, set[str]] = {}
    for path in epoch.iterdir():
        if m := _FILE.fullmatch(path.name):
            found.setdefault(int(m[1]), set()).add(m[2])
    if not found:
        raise StoreError(f"{epoch} has no rank0-keys.txt and rank0-values.bin: the original moves "
                         f"them there when the epoch is done, so it was not. Capture it again with "
                         f"the original, or move the folder elsewhere.")
    for rank in range(max(found) + 1):
        absent = {"keys.txt", "values.bin"} - found.get(rank, set())
        if absent:
            raise StoreError(f"{epoch / f'rank{rank}-{min(absent)}'} is missing, and there are "
                             f"files of ranks up to {max(found)}: expected both files of each. "
                             f"Copy it from where the others come from.")
    return [_open_rank(epoch, rank, top_k) for rank in sorted(found)]


def _open_rank(epoch: Path, rank: int, top_k: int) -> Rank:
    """One rank's files, held against each other by their sizes."""
    keys, values = epoch / f"rank{rank}-keys.txt", epoch / f"rank{rank}-values.bin"
    for path in (keys, values):
        if not path.stat().st_size:
            raise StoreError(f"{path} is empty: expected the views of one process. It was not "
                             f"copied, or the disk was full. Copy it again.")
    lines, size = _count_lines(keys), values.stat().st_size
    item = _item(top_k).itemsize
    if size != lines * item:
        fits, rest = divmod(size - 4 * lines, 4 * lines)
        hint = f"K = {fits} would fit {size:,} bytes. " if fits >= 1 and not rest else ""
        raise StoreError(
            f"{values} has {size:,} bytes: expected {lines * item:,}, that is 4 + 4 * {top_k} for "
            f"each of the {lines:,} lines of {keys.name}. {hint}One of the two files was cut short "
            f"or is of another run. Copy both again, or name the folder by the K it has.")
    return Rank(keys, values, lines, top_k)


def _count_lines(path: Path) -> int:
    """Lines of a text file, which must end with one."""
    lines, chunk = 0, b""
    with open(path, "rb") as file:
        while part := file.read(64 * _CHUNK):
            lines, chunk = lines + part.count(b"\n"), part
    if not chunk.endswith(b"\n"):
        raise _line_error(path, lines, "a key and the end of its line", f"{chunk[-40:]!r} at the "
                          f"end of the file, which was cut short")
    return lines


def _item(top_k: int) -> np.dtype:
    """One key's values."""
    return np.dtype([("seed", "<i4"), ("index", "<i2", (top_k,)), ("prob", "<f2", (top_k,))])


def _check_text(data: bytes, path: Path) -> None:
    """Raises StoreError unless these are lines of UTF-8 without control characters."""
    try:
        data.decode()
        odd = re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", data)
        at = odd.start() if odd else -1
    except UnicodeDecodeError as error:
        at = error.start
    if at >= 0:
        line = data[data.rfind(b"\n", 0, at) + 1:][:40].split(b"\n")[0]
        raise _line_error(path, data.count(b"\n", 0, at), "a key in UTF-8", f"{line!r}")


def _line_error(path: Path, line: int, expected: str, found: str) -> StoreError:
    """What to say of a line, counted from 0 here and from 1 in the message."""
    return StoreError(f"{path}, line {line + 1}: expected {expected}; found {found}. The file is "
                      f"damaged or is no file of the original's. Copy it again.")


def _list(numbers: list[int]) -> str:
    """The first few of many numbers."""
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")
