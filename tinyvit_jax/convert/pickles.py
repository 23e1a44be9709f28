"""PyTorch's .pth files read without PyTorch, and without running anything that they hold.

Since PyTorch 1.6 such a file is a zip archive: `data.pkl` is a pickle of the saved object, and each
tensor's numbers lie beside it as `data/KEY`. A pickle may name any function for the reader to call.
This reader looks no name up: a few it knows, and for all others an inert object takes the place.
"""

import math
import os
import pickle
import zipfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

# Names of torch's typed storages; bfloat16, which numpy has not, is read as its 16 bits.
_STORAGES = {
    "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "BFloat16Storage": "<u2",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "|i1",
    "ByteStorage": "|u1", "BoolStorage": "|b1"}
# What training checkpoints of the original and of timm hold beside the weights: numbers, settings.
_EXPECTED = {
    "yacs.config.CfgNode", "argparse.Namespace", "collections.defaultdict", "collections.Counter",
    "torch.Size", "torch.device", "torch.serialization._get_layout", "builtins.set",
    "builtins.dict", "builtins.int", "builtins.float", "_codecs.encode", "numpy.dtype",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
_DTYPES = {f"torch.{name}" for name in (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
    "bool")}


class Content(NamedTuple):
    """What a file holds."""

    value: Any  # arrays, dicts, lists, tuples, numbers, strings; Inert for everything else
    foreign: tuple[str, ...]  # classes and functions it names that are no part of weights, sorted


class Inert:
    """Stands where a file names another class; takes whatever is done to it and does nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        """Whatever it is made of."""
        return object.__new__(cls)

    def __call__(self, *_: Any) -> "Inert":
        """Whatever it is called with, and whatever is added to it."""
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    append = extend = add = __call__


class _Dict(dict):
    """A dict for an OrderedDict, to which a pickle cannot add attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Storage(NamedTuple):
    """The numbers of one or several tensors."""

    kind: str
    data: bytearray


class _StorageType(NamedTuple):
    kind: str


class _RebuildTensor(Inert):
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2.

    An object and no function: a pickle can set a function's attributes, and here there are none.
    """

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, size: Any, stride: Any,  # type: ignore[override]
                 *_: Any) -> np.ndarray:
        """A view of a storage; numpy checks that it stays within its bounds."""
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without numbers")
        dtype = np.dtype(_STORAGES[storage.kind])
        if math.prod(size) > len(storage.data) // dtype.itemsize:
            raise pickle.UnpicklingError(f"a tensor {size} is larger than its numbers")
        strides = tuple(step * dtype.itemsize for step in stride)
        array: np.ndarray = np.ndarray(size, dtype, storage.data, offset * dtype.itemsize, strides)
        if storage.kind == "BFloat16Storage":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32, copy=False) if dtype.kind == "f" else array


class _RebuildParameter(Inert):
    """torch._utils._rebuild_parameter: the tensor itself."""

    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:  # type: ignore[override]
        return data


_KNOWN = {"torch._utils._rebuild_tensor": _RebuildTensor(),
          "torch._utils._rebuild_tensor_v2": _RebuildTensor(),
          "torch._utils._rebuild_parameter": _RebuildParameter(),
          "collections.OrderedDict": _Dict}


class _Reader(pickle.Unpickler):
    """Reads a file's data.pkl."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(archive.open(f"{folder}data.pkl"), encoding="utf-8")
        self.named: set[str] = set()
        self._archive, self._folder = archive, folder
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What takes the place of a name; nothing is imported."""
        path = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if path in _KNOWN:
            return _KNOWN[path]
        if module == "torch" and name in _STORAGES:
            return _StorageType(name)
        self.named.add(path)
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        """The numbers that a tensor refers to: pid = ("storage", type, key, device, count)."""
        kind, key = pid[1], pid[2]
        if not isinstance(kind, _StorageType):
            return Inert()
        if key not in self._storages:
            with self._archive.open(f"{self._folder}data/{key}") as file:
                self._storages[key] = _Storage(kind.kind, bytearray(file.read()))
        return self._storages[key]


def is_archive(path: str | os.PathLike) -> bool:
    """Whether a file begins as a zip archive does."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read(path: str | os.PathLike) -> Content:
    """Reads a file that torch.save wrote.

    Args:
        path: of a zip archive, PyTorch's format since 1.6.

    Returns:
        Its content, tensors as arrays (halves and doubles as float32), and the foreign names.

    Raises:
        Exception: whatever a damaged archive or pickle makes zipfile and pickle meet.
    """
    with zipfile.ZipFile(path) as archive:
        folder = _find_folder(archive.namelist())
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise pickle.UnpicklingError("its numbers are big-endian")
        reader = _Reader(archive, folder)
        value = reader.load()
    return Content(value, tuple(sorted(reader.named - _EXPECTED - _DTYPES)))


def _find_folder(names: Iterable[str]) -> str:
    """The folder within the archive that holds data.pkl, with its slash."""
    for name in names:
        if name.count("/") == 1 and name.endswith("/data.pkl"):
            return name.removesuffix("data.pkl")
    raise pickle.UnpicklingError("the archive holds no data.pkl")
