"""Files of weights: PyTorch's .pth and .pt, and .safetensors, as dicts of numpy arrays."""

import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinyvit_jax.convert import pickles

State = dict[str, np.ndarray]

_TORCH = (".pth", ".pt", ".th")
_WRAPPERS = ("model", "state_dict")  # under which training scripts keep the weights
_NOTES = "tinyvit_jax"  # under which a .pth written here tells what its arrays do not


class WeightsError(ValueError):
    """A file or dict of weights that cannot be used; the message says what to do."""


def read_state(path: str | os.PathLike, tensors_only: bool = False) -> State:
    """Reads a file of weights; nothing that a file holds is ever run.

    A training checkpoint that keeps its weights under "model" or "state_dict" gives those. Half
    precision becomes float32. PyTorch is only needed for its files of before version 1.6.

    Args:
        path: a .pth, .pt or .safetensors file.
        tensors_only: takes the tensors of a PyTorch file that also holds objects of other classes,
            which is else refused.

    Returns:
        Arrays by the file's own keys.

    Raises:
        WeightsError: another ending, a truncated or foreign file, one with other things than
            tensors, or a package that is missing.
    """
    return read_described(path, tensors_only)[0]


def read_described(path: str | os.PathLike, tensors_only: bool = False
                   ) -> tuple[State, dict[str, str]]:
    """As `read_state`, and what the file tells of its arrays, as `write_state` takes it."""
    path = pathlib.Path(path)
    reader = _choose(path, lambda p: _read_torch(p, tensors_only), _read_safetensors)
    if not path.is_file():
        raise WeightsError(f"there is no file {path}; give the path of a .pth or .safetensors file")
    return reader(path)


def write_state(path: str | os.PathLike, state: Mapping[str, np.ndarray],
                notes: Mapping[str, str] | None = None) -> None:
    """Writes weights so that the file is either complete or not there.

    Args:
        path: a .pth or .pt, which gets {"model": tensors} as the original's files have, or a
            .safetensors.
        state: arrays by key.
        notes: texts by key that the arrays do not tell, such as the number of heads. They are a
            .safetensors' metadata; in a .pth they stand beside "model" under "tinyvit_jax", so the
            tensors load with strict=True as ever.

    Raises:
        WeightsError: another ending, or a package that is missing.
    """
    path = pathlib.Path(path)
    writer = _choose(path, _write_torch, _write_safetensors)
    arrays = {key: np.array(value, order="C") for key, value in state.items()}
    notes = {str(key): str(value) for key, value in (notes or {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        writer(pathlib.Path(temporary), arrays, notes)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's own is private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_writable(path: str | os.PathLike) -> None:
    """Raises WeightsError where `write_state` could not write such a file, before hours of work."""
    path = pathlib.Path(path)
    _choose(path, _import_torch, _import_safetensors)(path)


def unwrap(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights in a training checkpoint, or the dict itself where it holds weights."""
    for key in _WRAPPERS:
        if isinstance(state.get(key), Mapping):
            return state[key]
    return state


def _choose(path: pathlib.Path, of_torch: Callable, of_safetensors: Callable) -> Callable:
    if path.suffix in _TORCH:
        return of_torch
    if path.suffix == ".safetensors":
        return of_safetensors
    raise WeightsError(f"{path} has the ending {path.suffix!r}: expected .pth, .pt or .safetensors")


def _read_torch(path: pathlib.Path, tensors_only: bool) -> tuple[State, dict[str, str]]:
    """The weights of a PyTorch file of either format, and what it tells of them."""
    archive = pickles.is_archive(path)
    try:
        content = pickles.read(path) if archive else _read_old_torch(path, tensors_only)
    except WeightsError:
        raise
    except Exception as error:  # whatever a damaged file makes its readers meet
        raise WeightsError(
            f"{path} cannot be read as PyTorch weights ({type(error).__name__}: {_line(error)}). "
            "It is truncated or not a PyTorch file; download it again, or save the model's "
            "state_dict alone with torch.save.") from error
    if content.foreign and not tensors_only:
        raise WeightsError(
            f"{path} holds more than tensors: it names {', '.join(content.foreign)}. Nothing of "
            "that was run. Take the tensors alone, which never runs it either, with  python "
            f"tools/convert_checkpoint.py --from={path} --to={path.with_suffix('.safetensors')} "
            "--tensors_only")
    told = content.value.get(_NOTES) if isinstance(content.value, Mapping) else None
    notes = {str(key): value for key, value in told.items() if isinstance(value, str)} if (
        isinstance(told, Mapping)) else {}
    return _check_tensors(path, content.value, tensors_only), notes


def _check_tensors(path: pathlib.Path, loaded: Any, tensors_only: bool) -> State:
    """The arrays of what a PyTorch file holds; with `tensors_only` the rest is left out."""
    if not isinstance(loaded, Mapping):
        kind = "whole object" if isinstance(loaded, pickles.Inert) else type(loaded).__name__
        raise WeightsError(f"{path} holds a {kind}; expected a dict of tensors, as "
                           "torch.save(model.state_dict(), path) writes")
    state = unwrap(loaded)
    arrays = {str(key): value for key, value in state.items() if isinstance(value, np.ndarray)}
    others = [str(key) for key, value in state.items() if not isinstance(value, np.ndarray)]
    if not arrays or (others and not tensors_only):
        raise WeightsError(f"{path} holds other things than tensors: {', '.join(others[:5])}; save "
                           "the model's state_dict alone with torch.save")
    return arrays


def _read_old_torch(path: pathlib.Path, tensors_only: bool) -> pickles.Content:
    """A file in the format of before PyTorch 1.6, by PyTorch's own restricted reader."""
    if tensors_only:
        raise WeightsError(f"{path} is no file of PyTorch 1.6 or newer, and of older ones tensors "
                           "alone cannot be taken. Save its state_dict again with torch.save.")
    torch = _import_torch(path)

    def to_numpy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            return (value.float() if value.is_floating_point() else value).numpy()
        if isinstance(value, Mapping):
            return {key: to_numpy(inner) for key, inner in value.items()}
        return value

    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return pickles.Content(to_numpy(loaded), ())


def _write_torch(path: pathlib.Path, state: State, notes: dict[str, str]) -> None:
    torch = _import_torch(path)
    content = {"model": {key: torch.from_numpy(value) for key, value in state.items()}}
    torch.save({**content, _NOTES: notes} if notes else content, path)


def _read_safetensors(path: pathlib.Path) -> tuple[State, dict[str, str]]:
    safetensors = _import_safetensors(path)
    try:
        state = safetensors.numpy.load_file(path)
        with safetensors.safe_open(path, framework="np") as file:
            notes = file.metadata() or {}
    except Exception as error:  # the package's own error class is not public in every version
        raise WeightsError(f"{path} cannot be read as safetensors ({_line(error)}). It is "
                           "truncated or another kind of file; download it again.") from error
    return {key: value if value.dtype.kind in "iub" else value.astype(np.float32)
            for key, value in state.items()}, notes


def _write_safetensors(path: pathlib.Path, state: State, notes: dict[str, str]) -> None:
    _import_safetensors(path).numpy.save_file(state, path, notes or None)


def _import_torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise WeightsError(f"{path.name} needs PyTorch: pip install torch, or use a "
                           f".safetensors file") from error
    return torch


def _import_safetensors(path: pathlib.Path) -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise WeightsError(f"{path.name} needs the package safetensors: "
                           "pip install safetensors") from error
    return safetensors


def _line(error: Exception) -> str:
    """The start of an error's first line."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def _umask() -> int:
    """The process's mask of file permissions, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
