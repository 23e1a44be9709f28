"""Views that are drawn on the devices are those of the host; many updates are one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvit_jax import config as configs
from tinyvit_jax import mesh as meshes
from tinyvit_jax import resident
from tinyvit_jax.data import augment, pipeline, ppm
from tinyvit_jax.data.order import Order
from tinyvit_jax.data.source import Example

SIZE = 16
ROOM = 10**9  # bytes


class ArraySource:
    """Random images, in PPM."""

    name, class_names, fingerprint = "arrays", ("a", "b"), "0" * 64

    def __init__(self, count, side=SIZE):
        generator = np.random.default_rng(1)
        self.pixels = generator.integers(0, 256, (count, side, side, 3), np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return Example(str(i), ppm.encode(self.pixels[i]), i % 2)

    def read(self, indices):
        return [self[i] for i in indices]


def make_spec(**changes):
    a = configs.default().augment
    a.update({"spec": "small", "rand_augment": "", "color_jitter": 0.0, "erase": 0.0, **changes})
    return augment.make_spec(a, SIZE)


def both(spec, paired, count=37, batch=24, steps=5, mesh=None):
    """(ours on the devices, the host's) of every batch."""
    source, order = ArraySource(count), Order(3, count, paired)
    mesh = mesh or meshes.make_mesh()
    host = pipeline.TrainBatches(pipeline.Views(source, spec, order), batch,
                                 pipeline.Rows(0, batch), steps)
    arrays = meshes.put_state(resident.read_arrays(source, SIZE), mesh)
    make = jax.jit(resident.make_batches(spec, order, batch, mesh))
    return [(jax.device_get(make(arrays, jnp.int32(step))), host[step]) for step in range(steps)]


@pytest.mark.parametrize("changes", [{}, {"pad": 0}, {"pad": 2, "flip": 1.0}, {"flip": 0.0}])
def test_crops_and_flips_are_the_hosts(changes):
    for found, expected in both(make_spec(**changes), False):
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], name)


def test_colours_are_the_hosts_to_a_level():
    pairs = both(make_spec(color_jitter=0.4, greyscale=0.3), False)
    found, expected = (np.stack([pair[i]["image"] for pair in pairs]).astype(int) for i in (0, 1))
    assert np.abs(found - expected).max() <= 2  # a level, which the next operation may stretch
    assert (found != expected).mean() < 0.001
    grey = (expected == expected[..., :1]).all((2, 3, 4))
    assert 0.2 < grey.mean() < 0.4


@pytest.mark.parametrize("changes", [
    {"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0, "mix_prob": 0.7},
    {"mixup": 0.8, "cutmix": 1.0, "mix_switch": 0.3}])
def test_pairs_are_mixed_as_by_the_host(changes):
    pairs = both(make_spec(**changes), True, steps=8)
    for found, expected in pairs:
        np.testing.assert_array_equal(found["image"], expected["image"])
        np.testing.assert_array_equal(found["box"], expected["box"])
        np.testing.assert_allclose(found["lam"], expected["lam"], atol=2e-6)
    assert {"lam", "box"} < set(pairs[0][0])


def test_images_of_another_size_are_resized_once():
    source, spec = ArraySource(8, 20), make_spec(pad=2)
    order = Order(0, 8, False)
    arrays = meshes.put_state(resident.read_arrays(source, SIZE), meshes.make_mesh())
    found = jax.jit(resident.make_batches(spec, order, 8, meshes.make_mesh()))(arrays, 0)
    expected = pipeline.TrainBatches(pipeline.Views(source, spec, order), 8, pipeline.Rows(0, 8),
                                     1)[0]
    np.testing.assert_array_equal(found["image"], expected["image"])


def test_any_number_of_updates_is_one_program():
    """However the steps are cut, a state adds up the same, and nothing is compiled anew."""
    from typing import NamedTuple

    class State(NamedTuple):
        step: jax.Array
        total: jax.Array

    def train_step(state, batch):
        seen = batch["image"].astype(jnp.float32).mean()
        metrics = {"loss": seen, "skipped": state.step, "learning_rate": 1.0 * state.step}
        return State(state.step + 1, state.total * 0.5 + seen), metrics

    source, spec, order = ArraySource(37), make_spec(), Order(3, 37, False)
    mesh = meshes.make_mesh()
    arrays = meshes.put_state(resident.read_arrays(source, SIZE), mesh)
    update = resident.make_update(
        train_step, resident.make_batches(spec, order, 24, mesh), mesh)

    def run(stops):
        state = meshes.put_state(State(jnp.int32(0), jnp.float32(0)), mesh)
        means = []
        for stop in stops:
            state, metrics = update(state, arrays, jnp.int32(stop))
            means.append(jax.device_get(metrics))
        return jax.device_get(state), means

    whole, means = run([7])
    cut, parts = run([1, 2, 5, 7])
    assert update._cache_size() == 1
    assert whole == cut
    assert whole.step == 7
    assert means[0]["skipped"] == parts[-1]["skipped"] == means[0]["learning_rate"] == 6
    weights = np.array([1, 1, 3, 2])
    assert means[0]["loss"] == pytest.approx(
        float((np.array([p["loss"] for p in parts]) * weights).sum() / 7), rel=1e-6)


def test_stops():
    assert list(resident.list_stops(3, 10, {2, 4}, {10, 5, 4, 30})) == [4, 5, 10]
    assert list(resident.list_stops(0, 3)) == [3]


@pytest.mark.parametrize(("changes", "word"), [
    ({"spec": "imagenet"}, "augment.spec=imagenet"),
    ({"rand_augment": "rand-m9"}, "rand_augment=rand-m9"), ({"erase": 0.1}, "erase=0.1")])
def test_what_only_the_host_can_do_is_named(changes, word):
    config, order = configs.default(), Order(0, 8, False)
    config.train.batch_size = 64
    with pytest.raises(resident.ResidentError, match=word):
        resident.check(config, make_spec(**changes), order, None, 10, ROOM)
    resident.check(config, make_spec(), order, None, 10, ROOM)
    with pytest.raises(resident.ResidentError, match=r"takes 0\.0 GB as pixels of .*are 0\.0 GB"):
        resident.check(config, make_spec(), order, None, 10, resident.count_bytes(8, SIZE) - 1)
    with pytest.raises(resident.ResidentError, match="a store is read by the host"):
        resident.check(config, make_spec(), order, object(), 10, ROOM)
    with pytest.raises(resident.ResidentError, match="views, expected fewer than 2,147,483,648"):
        resident.check(config, make_spec(), order, None, 2**25, ROOM)
    config.objective.name = "live_teacher"
    with pytest.raises(resident.ResidentError, match=r"objective\.name=live_teacher"):
        resident.check(config, make_spec(), order, None, 10, ROOM)


def test_bytes():
    arrays = resident.read_arrays(ArraySource(5), SIZE)
    assert resident.count_bytes(5, SIZE) == sum(x.nbytes for x in arrays.values())
