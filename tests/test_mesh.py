"""The mesh: rows in and out of global arrays, and weights cut over four devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tinyvit_jax import mesh as meshes

ROOT = Path(__file__).parents[1]


def test_rows_come_back_as_they_were_put():
    mesh = meshes.make_mesh()
    rows = {"image": np.arange(24, dtype=np.uint8).reshape(4, 2, 3),
            "label": np.arange(4, dtype=np.int32)}
    put = meshes.put_batch(rows, mesh)
    for name, array in put.items():
        np.testing.assert_array_equal(meshes.local_rows(array), rows[name], strict=True)
    np.testing.assert_array_equal(meshes.local_rows(jnp.arange(3)), [0, 1, 2])


def test_one_device_holds_all_of_a_state():
    tree = {"kernel": np.ones((3, 5), np.float32), "scale": np.float32(2), "none": np.zeros((0, 2))}
    put = meshes.shard_state(tree, meshes.make_mesh())
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)), put, tree)


_ON_FOUR = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tinyvit_jax import mesh as meshes

mesh = meshes.make_mesh()
tree = {"kernel": np.arange(3 * 8 * 16.0).reshape(3, 8, 16), "tall": np.arange(60.0).reshape(12, 5),
        "odd": np.arange(7.0), "scalar": np.float32(3)}
put = meshes.shard_state(tree, mesh)
for name, array in put.items():
    np.testing.assert_array_equal(np.asarray(array), tree[name])
    print(name, *{str(part.data.shape).replace(" ", "") for part in array.addressable_shards})
double = jax.jit(lambda x: x.sum(-1) + 1)(put["kernel"])
np.testing.assert_array_equal(np.asarray(double), tree["kernel"].sum(-1) + 1)

rows = np.random.default_rng(0).integers(0, 255, (8, 3))
for sharding in (meshes.sharded(mesh), meshes.replicated(mesh)):  # in one process, all are its own
    np.testing.assert_array_equal(meshes.local_rows(jax.device_put(rows, sharding)), rows)
across = jax.device_put(rows.T, NamedSharding(mesh, PartitionSpec(None, "data")))
try:
    meshes.local_rows(across)
except ValueError as error:
    print(error)
"""


def test_four_devices():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    done = subprocess.run([sys.executable, "-c", _ON_FOUR], text=True, capture_output=True,
                          env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    *said, refused = done.stdout.splitlines()
    assert said == ["kernel (3,8,4)", "odd (7,)", "scalar ()", "tall (3,5)"]
    assert "holds (3, 2) of an array of shape (3, 8)" in refused
    assert "Give it mesh.sharded(mesh) first" in refused
