import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tinyvit_jax import config as configs
from tinyvit_jax import memory
from tinyvit_jax import mesh as meshes

GB = 10**9


def make_config(**changes):
    c = configs.default()
    c.update_from_flattened_dict(changes)
    return c


def test_the_compilers_figures():
    whole = NamedSharding(meshes.make_mesh(), PartitionSpec())
    x = jax.ShapeDtypeStruct((1000, 1000), jnp.float32, sharding=whole)
    f = jax.jit(lambda a, b: (a + b @ b @ b, b.sum()), donate_argnums=0)
    found = memory.measure_memory(f.lower(x, x).compile())
    assert found.arguments == 8_000_000
    assert found.outputs < 1000  # the first takes the place of `a`
    assert 4_000_000 <= found.temporaries < 10_000_000
    assert found.peak == sum(found)
    assert memory.count_bytes({"x": x, "y": x}) == 8_000_000
    assert memory.find_limit() is None  # a CPU does not tell


def test_a_sharded_array_counts_its_part(monkeypatch):
    class OnFour:
        def shard_shape(self, shape):
            return (shape[0] // 4, *shape[1:])

    image = type("Shape", (), {"shape": (8, 3), "dtype": np.dtype("uint8"), "sharding": OnFour()})
    assert memory.count_bytes([image]) == 6


def test_what_does_not_fit_names_the_settings():
    needs = memory.Memory(arguments=GB, outputs=0, temporaries=40 * GB, program=0)
    config = make_config(**{"train.batch_size": 96, "train.accumulate": 2})
    memory.check_fits(config, needs, GB, None)
    memory.check_fits(config, needs, GB, 42 * GB)
    with pytest.raises(memory.OutOfMemory) as error:
        memory.check_fits(config, needs, GB, 16 * GB)
    for part in ("needs 42.0 GB", "has 16.0 GB", "train.accumulate=6 ", "model.remat=True",
                 "model.dtype=bfloat16", "train.batch_size=96"):  # 2 + 40 * 2 / 6 < 16
        assert part in str(error.value)
    assert "resident" not in str(error.value)
    config.data.resident = True
    with pytest.raises(memory.OutOfMemory, match=r"helps: set --config\.data\.resident=False"):
        memory.check_fits(config, needs, GB, 16 * GB)
    config.data.resident = False
    config.model.remat, config.model.dtype = True, "bfloat16"
    with pytest.raises(memory.OutOfMemory) as error:
        memory.check_fits(config, needs, 15 * GB, 16 * GB)  # no micro-batch is small enough
    for part in ("remat", "dtype", "accumulate="):
        assert part not in str(error.value)
    assert "train.accumulate above 2" in str(error.value)


def test_pairs_stay_together_in_what_is_suggested():
    needs = memory.Memory(0, 0, 30 * GB, 0)
    config = make_config(**{"train.batch_size": 12, "augment.mixup": 0.8})
    with pytest.raises(memory.OutOfMemory, match=r"accumulate=6 .*fewer than 12 views "):
        memory.check_fits(config, needs, 0, 7 * GB)  # 5 parts would fit, and 12 views have none


def test_running_out_of_memory_is_explained():
    with pytest.raises(memory.OutOfMemory, match=r"ran out of memory: .*17592186044416 bytes\. "
                       r"What .*train\.accumulate above 1.*eval\.batch_size=256"), \
            memory.explaining(make_config()):
        jax.block_until_ready(jax.jit(lambda: jnp.zeros(1 << 44, jnp.uint8))())
    with pytest.raises(ValueError, match="other"), memory.explaining(make_config()):
        raise ValueError("other")


def test_the_line():
    needs = memory.Memory(GB, 0, 2 * GB, 0)
    said = memory.describe(needs, GB // 2, 16 * GB)
    assert said.startswith("peak memory 3.50 of 16.0 GB on each device: temporaries 2.00, ")
    assert memory.describe(needs, 0, None).startswith("peak memory 3.00 GB on each device")
