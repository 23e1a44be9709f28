"""Each layer against its plain form and against PyTorch, to 1e-5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvit_jax.models import layers, tinyvit

ATOL = 1e-5


def normal(*shape, seed=0, scale=1.0):
    return np.asarray(np.random.default_rng(seed).normal(size=shape) * scale, np.float32)


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    import torch_tinyvit

    return torch_tinyvit


def nchw(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def test_project_is_the_same_on_every_backend(monkeypatch):
    x, kernel = normal(2, 3, 4, 5), normal(5, 6, seed=1)
    flat = layers.project(x, kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    np.testing.assert_allclose(flat, layers.project(x, kernel), atol=ATOL)


def test_heads_projected_apart_equal_those_of_one_product():
    B, N, h, d = 2, 5, 3, 4
    arguments = normal(B, N, h * d), normal(h * d, 3 * h * d, seed=1), normal(3 * h * d, seed=2)

    def run(form):
        parts, pull = jax.vjp(lambda *args: form(*args, h), *arguments)
        return *parts, *pull([normal(*part.shape, seed=3 + i) for i, part in enumerate(parts)])

    one, three = (run(form) for form in (layers.project_heads_reference,
                                         layers.project_heads_apart))
    for a, b in zip(one, three, strict=True):
        np.testing.assert_allclose(a, b, atol=ATOL)


@pytest.mark.parametrize(("backend", "tokens", "form"), [
    ("cpu", 49, "project_heads_reference"), ("cpu", 4096, "project_heads_apart"),
    ("tpu", 49, "project_heads_apart")])
def test_form_of_the_heads_follows_backend_and_tokens(monkeypatch, backend, tokens, form):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(layers, form, lambda *_: form)
    assert layers.project_heads(np.zeros((2, tokens, 64)), None, None, 1) == form


def test_gelu_is_exact():
    import math

    x = np.linspace(-6, 6, 101, dtype=np.float32)
    exact = [v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()]
    np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), exact, atol=1e-6)


def test_gelu_keeps_one_map_for_the_gradient_on_cpu(monkeypatch):
    x = normal(3, 5)

    def count_kept_maps():
        return sum(np.size(a) == x.size for a in jax.tree.leaves(jax.vjp(layers.gelu, x)[1]))

    grad = jax.vmap(jax.vmap(jax.grad(layers.gelu)))
    kept, recomputed = count_kept_maps(), grad(x)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert kept == 1 < count_kept_maps()
    np.testing.assert_allclose(recomputed, jax.jit(grad)(x), atol=1e-6)


def test_bias_index_is_the_absolute_offset():
    index = layers.bias_index(3)
    assert index.shape == (9, 9)
    assert index[0].tolist() == list(range(9))  # from the corner
    assert index[5, 6] == 1 * 3 + 2  # (1, 2) to (2, 0)
    assert (index == index.T).all()


def test_windows_round_trip():
    x = np.arange(2 * 6 * 4 * 3).reshape(2, 6, 4, 3)
    cut = layers.to_windows(x, 2)
    np.testing.assert_array_equal(cut[1].reshape(2, 2, 3), x[0, :2, 2:])  # row by row
    np.testing.assert_array_equal(layers.from_windows(cut, 2, 6, 4), x)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    layer = layers.DropPath(0.25)
    out = layer.apply({}, x, True, rngs={"drop_path": jax.random.key(0)})
    assert (out == out[:, :1, :1]).all()
    np.testing.assert_allclose(np.unique(out), [0, 4 / 3], atol=1e-6)
    assert abs(float(out.mean()) - 1) < 0.03
    assert (layer.apply({}, x, False) == x).all()


def test_initial_weights_follow_the_original():
    kernel = layers.conv_init(jax.random.key(0), (3, 3, 20, 400))
    assert abs(kernel).max() <= 1 / np.sqrt(180)
    np.testing.assert_allclose(kernel.std(), 1 / np.sqrt(3 * 180), rtol=0.02)
    np.testing.assert_allclose(layers.linear_init(jax.random.key(0), (300, 300)).std(), 0.02,
                               rtol=0.02)


def test_a_new_block_starts_as_the_identity_before_its_gelu():
    x = normal(2, 4, 4, 6)
    block = tinyvit.MBConv(24)
    variables = block.init(jax.random.key(0), x, False)
    np.testing.assert_array_equal(block.apply(variables, x, False), layers.gelu(x))


@pytest.mark.parametrize("convolutional", [True, False])
def test_remat_equals_plain(convolutional):
    x = normal(2, 4, 4, 8)

    def grads(remat):
        stage = tinyvit.Stage(2, 4, 16, (0.4,), convolutional=convolutional, remat=remat)

        def loss(params):
            (_, y), _ = stage.apply({**variables, "params": params}, x, True,
                                    mutable=["batch_stats"], rngs={"drop_path": jax.random.key(1)})
            return jnp.sum(y * y)

        variables = jax.jit(stage.init, static_argnums=2)(jax.random.key(0), x, False)
        return jax.jit(jax.grad(loss))(variables["params"])

    close = functools.partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(close, grads(remat=False), grads(remat=True))


def batch_norm(frozen=False):
    layer = layers.BatchNorm(frozen=frozen)
    params = {"scale": normal(4, seed=1), "bias": normal(4, seed=2)}
    stats = {"mean": normal(4, seed=3), "var": np.exp(normal(4, seed=4))}
    return layer, {"params": params, "batch_stats": stats}


def test_frozen_batch_norm_uses_and_keeps_stored_statistics():
    layer, variables = batch_norm(frozen=True)
    x = normal(3, 5, 5, 4)
    out, changed = layer.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_array_equal(out, layer.apply(variables, x, False))
    jax.tree.map(np.testing.assert_array_equal, changed["batch_stats"], variables["batch_stats"])


@pytest.mark.torch
def test_batch_norm_trains_as_torch(reference):
    import torch

    layer, variables = batch_norm()
    norm = torch.nn.BatchNorm2d(4)
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    flat = variables["params"] | variables["batch_stats"]
    norm.load_state_dict({k: torch.tensor(flat[v]) for k, v in names.items()}, strict=False)
    x = normal(2, 3, 2, 4, scale=2) + 1  # 12 values a channel: biased and unbiased differ
    cotangent = normal(2, 3, 2, 4, seed=5)

    def run(params, x):
        return layer.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])

    out, pull, changed = jax.vjp(run, variables["params"], x, has_aux=True)
    grads, x_grad = pull(cotangent)
    theirs = nchw(x).requires_grad_()
    expected = norm(theirs)
    expected.backward(nchw(cotangent))
    np.testing.assert_allclose(out, nhwc(expected), atol=ATOL)
    np.testing.assert_allclose(x_grad, nhwc(theirs.grad), atol=ATOL)
    np.testing.assert_allclose(grads["scale"], norm.weight.grad, atol=ATOL)
    np.testing.assert_allclose(grads["bias"], norm.bias.grad, atol=ATOL)
    np.testing.assert_allclose(changed["batch_stats"]["mean"], norm.running_mean, atol=ATOL)
    np.testing.assert_allclose(changed["batch_stats"]["var"], norm.running_var, atol=ATOL)


@pytest.mark.torch
@pytest.mark.parametrize("shape", [(1, 4, 4, 12), (2, 8, 4, 12), (2, 5, 7, 12), (1, 2, 3, 12)],
                         ids=["one window", "whole windows", "padded", "smaller than a window"])
def test_block_equals_torch(reference, shape):
    theirs = reference.randomize(reference.Block(12, heads=3, window=4))
    x = normal(*shape)
    ours = tinyvit.Block(num_heads=3, window=4, hidden=48)
    out = jax.jit(ours.apply, static_argnums=2)(reference.variables_of(theirs), x, False)
    np.testing.assert_allclose(out, nhwc(theirs(nchw(x))), atol=ATOL)


@pytest.mark.torch
def test_attention_equals_torch(reference):
    theirs = reference.randomize(reference.Attention(12, heads=2, window=3))
    x = normal(4, 9, 12)
    out = layers.Attention(num_heads=2, window=3).apply(reference.variables_of(theirs), x)
    import torch

    np.testing.assert_allclose(out, theirs(torch.from_numpy(x)).detach(), atol=ATOL)


@pytest.mark.torch
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize("name", ["stem", "narrow stem", "mbconv", "downsample"])
def test_convolutional_parts_equal_torch(reference, name, size):
    theirs, ours, channels = {
        "stem": lambda: (reference.Stem(8, (2, 2)), tinyvit.PatchEmbed(8), 3),
        "narrow stem": lambda: (reference.Stem(8, (2, 1)), tinyvit.PatchEmbed(8, (2, 1)), 3),
        "mbconv": lambda: (reference.MBConv(6, 24), tinyvit.MBConv(24), 6),
        "downsample": lambda: (reference.Downsample(6, 10), tinyvit.PatchMerging(10), 6),
    }[name]()
    theirs = reference.randomize(theirs)
    x = normal(2, *size, channels)
    out = jax.jit(ours.apply, static_argnums=2)(reference.variables_of(theirs), x, False)
    np.testing.assert_allclose(out, nhwc(theirs(nchw(x))), atol=ATOL)
