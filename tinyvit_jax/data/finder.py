"""Finds images by the keys that another program gave them: by name, or by position in a list."""

import re
from collections.abc import Callable

import numpy as np

from tinyvit_jax.data.source import ImageSource, SourceError

Find = Callable[[np.ndarray], np.ndarray]  # keys, dtype S [n] -> image indices int64 [n]; -1: none

_DIGITS = 10  # of a position: ImageFolder has fewer than 10**10 images
_BOUND = "Give the image set that the keys belong to by --config.data.source."


def make_finder(source: ImageSource, example: bytes) -> Find:
    """What finds the images of keys in a source.

    Args:
        source: the images.
        example: one of the keys. Digits alone are a position in torchvision's ImageFolder; anything
            else is the name of a file without folder and suffix, as ImageNet-22k has them.

    Raises:
        SourceError: two images have the same name, or keys of the source that are no file names
            cannot be put into ImageFolder's order.
    """
    return _find_numbers(source) if re.fullmatch(rb"\d+", example) else _find_names(source)


def _find_names(source: ImageSource) -> Find:
    keys = source.keys()
    names = np.empty(len(keys), keys.dtype)
    for i, key in enumerate(keys):
        name = key[key.rfind(b"/") + 1:]
        names[i] = name[:name.rfind(b".")] if b"." in name else name
    order = np.argsort(names, kind="stable")
    names = names[order]
    twice = np.flatnonzero(names[1:] == names[:-1])
    if len(twice):
        a, b = (keys[order[twice[0] + i]].decode() for i in range(2))
        raise SourceError(f"{source.name} has two images of one name, {a} and {b}: a key that is a "
                          f"name cannot say which of them it means. {_BOUND}")

    def find(wanted: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(names, wanted), len(names) - 1)
        return np.where(names[place] == wanted, order[place], -1)

    return find


def _find_numbers(source: ImageSource) -> Find:
    """By position in ImageFolder's list: classes sorted, in each its folders, in each its files.

    This is not the order of whole paths, where a class "a-b" comes before "a": "-" sorts before
    "/".
    """
    keys = source.keys().tolist()
    odd = next((key for key in keys if b"." not in key), None)
    if odd is not None:
        raise SourceError(f"The keys to find are positions in a sorted list of files, and those of "
                          f"{source.name} are no names of files ({odd.decode()}). {_BOUND}")

    def parts(i: int) -> tuple[bytes, bytes, bytes]:
        folder, _, name = keys[i].rpartition(b"/")
        return folder.partition(b"/")[0], folder, name

    order = np.array(sorted(range(len(keys)), key=parts), np.int64)

    def find(wanted: np.ndarray) -> np.ndarray:
        short = wanted.astype(f"S{_DIGITS}")
        digits = np.char.isdigit(short) & (short == wanted)
        number = np.where(digits, short, b"0").astype(np.int64)
        # "007" is 7 to int() and no key that the original writes.
        good = digits & (number < len(order)) & (number.astype(f"S{_DIGITS}") == short)
        return np.where(good, order[np.where(good, number, 0)], -1)

    return find
