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
