"""One mesh axis, "data", over every device of every process; batches are cut along it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """The mesh of all devices, those of a process side by side so that its rows stay its own."""
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def sharded(mesh: Mesh) -> NamedSharding:
    """Rows cut over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of the rows that each process holds.

    Args:
        batch: arrays whose leading dimension is this process's share of the rows.
        mesh: from `make_mesh`.

    Returns:
        Global arrays, cut along "data".
    """
    sharding = sharded(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def put_state(tree, mesh: Mesh):
    """Puts a tree of host or single-device arrays, equal in all processes, on every device."""
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def shard_state(tree, mesh: Mesh):
    """Cuts a tree of host arrays, equal in all processes, so that each device holds its own part.

    Each array is cut along the largest of its dimensions that the devices divide, and is whole on
    every device where they divide none. A compiled function takes the parts as they are; XLA puts
    them together where they are used.
    """
    def put(x) -> jax.Array:
        x = np.asarray(x)
        even = [axis for axis, length in enumerate(x.shape) if length % mesh.size == 0]
        longest = max(even, key=lambda axis: x.shape[axis], default=None)
        spec = PartitionSpec(*("data" if axis == longest else None for axis in range(x.ndim)))
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), x.__getitem__)

    return jax.tree.map(put, tree)


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of a global array, in order: what `put_batch` made it of.

    Args:
        array: [B, ...], its rows cut over the devices as by `sharded`.

    Raises:
        ValueError: the array is cut in another way, so that this process has other rows or columns.
    """
    parts = {part.index[0].start or 0: part.data for part in array.addressable_shards}
    rows = np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
    expected = (array.shape[0] // jax.process_count(), *array.shape[1:])
    if rows.shape != expected:
        raise ValueError(f"This process holds {rows.shape} of an array of shape {array.shape}, cut "
                         f"as {array.sharding}; expected {expected}: rows cut over the devices. "
                         f"Give it mesh.sharded(mesh) first.")
    return rows


def check_rows(rows: int, key: str, units: int = 1) -> None:
    """Raises ValueError where a batch cannot be cut evenly over the devices.

    Args:
        rows: views in the batch.
        key: the config key that holds it.
        units: what the rows of one device must be a multiple of (pairs, micro-batches).
    """
    least = jax.device_count() * units
    if rows % least:
        raise ValueError(
            f"--config.{key}: a batch of {rows} views cannot be cut evenly over "
            f"{jax.device_count()} devices"
            f"{f', in multiples of {units} on each' if units > 1 else ''}. Set it to a multiple "
            f"of {least}, for instance {max(1, rows // least) * least}.")
