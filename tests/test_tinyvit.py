"""Whole models: shapes, settings, and parity with PyTorch to 1e-4."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvit_jax.models import VARIANTS, create_model

SMALL = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4),
         "window_sizes": (7, 7, 7, 3)}


def make_small(**changes):
    return create_model("tiny_vit", 10, 28, **{**SMALL, "stem_strides": (2, 1), **changes})


def make_images(*shape, seed=0):
    return np.asarray(np.random.default_rng(seed).normal(size=(*shape, 3)), np.float32)


def random_variables(model, seed=0):
    """Variables of a plausible size, none of them zero, so that no branch is silent."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = np.asarray(rng.normal(size=leaf.shape), np.float32)
        if path[-1].key == "kernel":
            return noise / np.prod(leaf.shape[:-1]) ** 0.5
        return np.exp(0.3 * noise) if path[-1].key in ("scale", "var") else 0.3 * noise

    return jax.tree_util.tree_map_with_path(draw, model.variable_shapes())


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    import torch_tinyvit

    return torch_tinyvit


def make_pair(reference, model):
    """A torch model with random weights and statistics, and its variables."""
    theirs = reference.randomize(reference.TorchTinyViT(model))
    return theirs, reference.variables_of(theirs)


def to_torch(images):
    import torch

    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize(("name", "count"), [("tiny_vit_5m_224", 5_392_764),
                                             ("tiny_vit_21m_224", 21_198_568),
                                             ("tiny_vit_5m_32", 5_388_264),
                                             ("tiny_vit_5m_96", 5_391_064),
                                             ("tiny_vit_1m_32", 1_454_224)])
def test_parameter_counts(name, count):
    shapes = create_model(name, 1000).variable_shapes()
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == count


@pytest.mark.parametrize("size", [28, 32])
def test_shapes_and_dtypes(size):
    model = make_small(dtype="bfloat16")
    images = make_images(2, size, size + 6)
    variables = model.variable_shapes()
    logits = jax.eval_shape(model.apply, variables, images)
    maps = jax.eval_shape(functools.partial(model.apply, method="features"), variables, images)
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    sides = [(-(-size // s), -(-(size + 6) // s)) for s in (2, 4, 8, 16)]
    assert [m.shape for m in maps] == [
        (2, *side, C) for side, C in zip(sides, SMALL["embed_dims"], strict=True)]
    assert {m.dtype for m in maps} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_no_classes_gives_pooled_features():
    model = make_small().copy(num_classes=0)
    shapes = model.variable_shapes()
    assert "head" not in shapes["params"]
    out = jax.eval_shape(lambda v: model.apply(v, make_images(2, 28, 28)), shapes)
    assert out.shape == (2, 32)


@pytest.mark.parametrize(("name", "size", "strides", "windows"), [
    ("tiny_vit_21m_224", 224, None, (7, 7, 14, 7)),
    ("tiny_vit_21m_224", 384, (), (12, 12, 24, 12)),
    ("tiny_vit_21m_224", 512, None, (16, 16, 32, 16)),
    ("tiny_vit_21m_512", 224, None, (7, 7, 14, 7)),
    ("tiny_vit_5m_224", 256, None, (8, 8, 16, 8)),
    ("tiny_vit_5m_224", 32, (1, 1), (4, 4, 8, 4)),
    ("tiny_vit_5m_224", 16, None, (1, 1, 1, 1)),
    ("tiny_vit_5m_32", 32, None, (8, 8, 8, 4)), ("tiny_vit_5m_32", 64, (), (16, 16, 16, 8)),
    ("tiny_vit_5m_32", 64, (2, 1), (8, 8, 8, 4)), ("tiny_vit_5m_96", 192, None, (16, 16, 24, 12)),
    ("tiny_vit_1m_32", 96, (2, 2), (12, 12, 6, 3)), ("tiny_vit_1m_32", 32, None, (8, 8, 4, 2)),
])
def test_windows_follow_image_size(name, size, strides, windows):
    assert create_model(name, 10, size, stem_strides=strides).window_sizes == windows


@pytest.mark.parametrize(("changes", "words"), [
    ({"depths": (1, 2, 1)}, "four whole numbers"),
    ({"embed_dims": (8, 16, 24, 0)}, "embed_dims"),
    ({"embed_dims": (9, 16, 24, 32)}, "even"),
    ({"num_heads": (1, 5, 3, 4)}, "stage 1 has embed_dims 16 and num_heads 5"),
    ({"window_sizes": ()}, "the model tiny_vit has no window_sizes"),
    ({"stem_strides": (3, 1)}, "stem_strides"),
    ({"drop_path": 1.0}, "drop_path"),
    ({"mlp_ratio": 0}, "mlp_ratio"),
    ({"dtype": "float16"}, "float32 or bfloat16"),
])
def test_settings_that_cannot_work(changes, words):
    with pytest.raises(ValueError, match=words):
        make_small(**changes)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"tiny_vit_5m.*tiny_vit_5m_224, .*tiny_vit"):
        create_model("tiny_vit_5m")


def test_drop_path_rates_grow_evenly_over_all_blocks():
    model = make_small(depths=(1, 1, 2, 1), drop_path=0.6)
    stages = model.bind({}).layers
    rates = [rate for stage in stages for rate in stage.drop_path]
    np.testing.assert_allclose(rates, [0, 0.15, 0.3, 0.45, 0.6])


def test_drop_path_follows_its_key_and_frozen_statistics_stay():
    model = make_small(drop_path=0.6, freeze_norm=True)
    variables, images = random_variables(model), make_images(4, 28, 28)

    @jax.jit
    def train(key):
        return model.apply(variables, images, train=True, rngs={"drop_path": key},
                           mutable=["batch_stats"])

    logits, kept = train(jax.random.key(0))
    np.testing.assert_array_equal(logits, train(jax.random.key(0))[0])
    assert not np.allclose(logits, train(jax.random.key(1))[0])
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], variables["batch_stats"])


def test_bfloat16_is_close():
    images, variables = make_images(8, 28, 28), random_variables(make_small())
    exact = jax.jit(make_small().apply)(variables, images)
    half = jax.jit(make_small(dtype="bfloat16").apply)(variables, images)
    assert float(jnp.abs(half - exact).max()) < 0.02 * float(exact.max() - exact.min())


@pytest.mark.torch
@pytest.mark.parametrize("size", [(28, 28), (20, 37)], ids=["square", "padded, not square"])
def test_small_model_equals_torch(reference, size):
    model = make_small()
    theirs, variables = make_pair(reference, model)
    images = make_images(2, *size)
    logits = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(logits, theirs(to_torch(images)).detach(), atol=1e-4)
    maps = jax.jit(functools.partial(model.apply, method="features"))(variables, images)
    for ours, expected in zip(maps, theirs.features(to_torch(images)), strict=True):
        np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), expected.detach(), atol=1e-4)


@pytest.mark.torch
def test_training_step_equals_torch(reference):
    """Loss gradients of every weight, and BatchNorm's statistics after the step."""
    model = make_small()
    theirs, variables = make_pair(reference, model)
    images = make_images(8, 28, 28)

    def loss(params):
        logits, changed = model.apply({**variables, "params": params}, images, train=True,
                                      mutable=["batch_stats"])
        return jnp.sum(jax.nn.log_softmax(logits)[:, 0]), changed

    ours, changed = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    theirs.train()
    theirs(to_torch(images)).log_softmax(-1)[:, 0].sum().backward()
    stats = reference.variables_of(theirs)["batch_stats"]
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    expected = reference.variables_of(theirs)["params"]

    def close(a, b):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()))

    jax.tree.map(close, ours, expected)
    jax.tree.map(close, changed["batch_stats"], stats)


@pytest.mark.torch
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if "5m" in name else pytest.mark.slow)
    for name in VARIANTS if name.startswith("tiny_vit_")])
def test_variant_equals_torch(reference, name):
    import torch

    model = create_model(name)
    theirs, variables = make_pair(reference, model)
    images = make_images(1, model.image_size, model.image_size)
    with torch.no_grad():
        expected = theirs(to_torch(images))
    logits = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
