"""ResNet, RegNetY and ConvNeXt V2: layers, small models against PyTorch, settings, training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_convnets import (
    LAYOUTS,
    SHAPES,
    make_images,
    make_small,
    make_torch,
    random_variables,
    state_of,
    to_torch,
)

from tinyvit_jax import weights
from tinyvit_jax.models import (
    VARIANTS,
    convnext,
    cost,
    create_model,
    describe_shape,
    family_of,
    grouped,
    resnet,
)


@pytest.mark.parametrize(("name", "parameters", "macs"), [
    ("resnet18", 11_689_512, 1.8), ("resnet50", 25_557_032, 4.1),
    ("regnety_160", 83_590_140, 16.0), ("convnextv2_tiny", 28_635_496, 4.5),
    ("convnextv2_atto", 3_708_400, 0.6)])
def test_cost_is_that_of_the_papers(name, parameters, macs):
    model = create_model(name)
    assert cost.count_parameters(model) == parameters
    assert round(cost.count_macs(model) / 1e9, 1) == macs


def test_the_multiply_adds_of_resnet50_by_hand():
    """4.089 G are its convolutions' and its classifier's; two more a number are BatchNorm's."""
    def bottleneck(side, after, inside, inner, first):
        macs = side**2 * inside * inner + after**2 * (9 * inner**2 + 4 * inner**2)
        numbers = side**2 * inner + after**2 * 5 * inner
        if first:
            macs, numbers = macs + after**2 * inside * 4 * inner, numbers + after**2 * 4 * inner
        return np.array([macs, numbers])

    total, inside, side = np.array([112**2 * 49 * 3 * 64, 112**2 * 64]), 64, 56
    for inner, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(depth):
            after = side // 2 if i == 0 and inner > 64 else side
            total += bottleneck(side, after, inside, inner, i == 0)
            inside, side = 4 * inner, after
    macs, numbers = total
    macs += 2048 * 1000
    assert round(macs / 1e9, 3) == 4.089
    assert cost.count_macs(create_model("resnet50")) == macs + 2 * numbers


def test_every_variant_is_made_again_from_its_shape():
    for name in VARIANTS:
        if family_of(name) in ("resnet", "regnety", "convnextv2") and VARIANTS[name]["depths"]:
            model = create_model(name, 5)
            assert create_model(family_of(name), **describe_shape(model)) == model


@pytest.mark.torch
@pytest.mark.parametrize("kind", SHAPES)
def test_small_model_equals_torch(kind):
    """Logits at two sizes, and the gradients of one, in evaluation and in training mode."""
    torch = pytest.importorskip("torch")
    layout = LAYOUTS[kind][0]
    module, model = make_torch(kind, layout), make_small(kind)
    state = state_of(module)
    variables = weights.convert_from(state, model)
    for size in (41, 32):
        images = make_images(2, size, size)
        with torch.no_grad():
            expected = module(to_torch(images))
        np.testing.assert_allclose(jax.jit(model.apply)(variables, images), expected, atol=1e-5)
    cotangent = make_images(2, 1, 1, seed=1).reshape(2, 3)

    def loss(params, images, train):
        out, new = model.apply({**variables, "params": params}, images, train=train,
                               mutable=["batch_stats"])
        return jnp.sum(out * cotangent), new["batch_stats"]

    for train in (False, True):
        module.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
        seen = to_torch(images).requires_grad_()
        module.train(train).zero_grad()
        (module(seen) * torch.from_numpy(cotangent)).sum().backward()
        (grads, image_grad), stats = jax.jit(functools.partial(
            jax.grad(loss, (0, 1), has_aux=True), train=train))(variables["params"], images)
        found = weights.convert_to(model, {"params": grads, "batch_stats": stats}, layout)
        for key, value in module.named_parameters():
            check(found[key], value.grad.numpy(), key)
        check(np.moveaxis(image_grad, -1, 1), seen.grad.numpy(), "images")
        for key, value in state_of(module).items():
            if "running" in key:
                check(found[key], value, key)
                assert train == (not np.array_equal(value, state[key]))


def check(found, expected, name):
    """Equal to 2e-5 of the largest value: a gradient sums over thousands of pixels."""
    assert found.shape == expected.shape, name
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, np.abs(expected).max()),
                               err_msg=name)


@pytest.mark.parametrize("kind", SHAPES)
def test_maps_types_and_heads(kind):
    model = make_small(kind, dtype="bfloat16", remat=True, freeze_norm=True)
    shapes = model.variable_shapes()
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    for side in (32, 64):
        images = make_images(2, side, side)
        maps = jax.eval_shape(functools.partial(model.apply, method="features"), shapes, images)
        first = 1 if kind == "padded" else 4
        assert [m.shape for m in maps] == [
            (2, side // s, side // s, dim)
            for s, dim in zip((first, 2 * first), model.embed_dims, strict=True)]
        assert {m.dtype for m in maps} == {jnp.dtype(jnp.bfloat16)}
        logits = jax.eval_shape(model.apply, shapes, images)
        assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)
    headless = make_small(kind, 0)
    assert "head" not in headless.variable_shapes()["params"]
    features = jax.eval_shape(headless.apply, headless.variable_shapes(), images)
    assert features.shape == (2, model.embed_dims[-1])


@pytest.mark.parametrize("kind", ["basic", "convnextv2"])
def test_options_of_training(kind):
    """remat changes nothing, frozen statistics stay, drop path drops, bfloat16 is near."""
    images, variables = make_images(4, 32, 32), random_variables(make_small(kind))

    @functools.cache
    def run(train=True, key=0, **changes):
        out, new = jax.jit(functools.partial(
            make_small(kind, **changes).apply, train=train, mutable=["batch_stats"]))(
                variables, images, rngs={"drop_path": jax.random.key(key)})
        return np.asarray(out), new["batch_stats"]

    plain, stats = run()
    np.testing.assert_allclose(run(remat=True)[0], plain, atol=1e-6)
    frozen, kept = run(freeze_norm=True)
    jax.tree.map(np.testing.assert_array_equal, kept, variables["batch_stats"])
    np.testing.assert_allclose(frozen, run(train=False)[0], atol=1e-6)
    assert bool(jax.tree.leaves(stats)) == (kind != "convnextv2")
    dropped = [run(drop_path=0.9, freeze_norm=True, key=key)[0] for key in (0, 1)]
    assert np.abs(dropped[0] - dropped[1]).max() > 1e-3
    np.testing.assert_array_equal(run(train=False, drop_path=0.9)[0], run(train=False)[0])
    half = run(train=False, dtype="bfloat16")[0] - run(train=False)[0]
    assert 0 < np.abs(half).max() < 0.05 * np.ptp(plain)


def test_residual_branches_start_as_nothing():
    for kind in ("basic", "regnety"):
        start = jax.jit(make_small(kind).init)(jax.random.key(0), make_images(1, 32, 32))
        block = start["params"]["stages_0"]["blocks_0"]
        last = block["conv2" if kind == "basic" else "conv3"]
        assert not last["bn"]["scale"].any()
        # He's fan out: what a 3x3 kernel of so many outputs starts with.
        kernel = block["conv2"]["c"]["kernel"]
        assert float(kernel.std()) == pytest.approx((2 / (9 * kernel.shape[-1])) ** 0.5, rel=0.15)
    grn = jax.jit(make_small("convnextv2").init)(jax.random.key(0), make_images(1, 32, 32))[
        "params"]["stages_0"]["blocks_0"]["mlp"]["grn"]
    assert not grn["scale"].any()
    assert not grn["bias"].any()


def test_padded_shortcuts_are_option_a():
    x = make_images(1, 2, 2)
    padded = resnet.pad_channels(x, 7)
    np.testing.assert_array_equal(padded[..., 2:5], x)
    assert not padded[..., :2].any()
    assert not padded[..., 5:].any()


def test_a_silent_channel_has_a_gradient():
    """The square root of a response of 0 has none; the layer's is that of its bias and of x."""
    x = np.array(make_images(2, 3, 3))
    x[..., 1] = 0
    layer, params = convnext.GlobalResponseNorm(), {
        "scale": jnp.array([0.5, 2.0, 1.0]), "bias": jnp.array([0.1, 0.2, 0.3])}
    out = layer.apply({"params": params}, x)
    np.testing.assert_allclose(out[..., 1], 0.2, atol=1e-7)
    norms = np.sqrt((x.astype(np.float64)**2).sum((1, 2), keepdims=True))
    relative = norms / (norms.mean(-1, keepdims=True) + 1e-6)
    expected = x * (1 + np.array([0.5, 2, 1]) * relative) + np.array([0.1, 0.2, 0.3])
    np.testing.assert_allclose(out, expected, atol=1e-5)
    grads = jax.grad(lambda p, x: jnp.sum(jnp.square(layer.apply({"params": p}, x))), (0, 1))(
        params, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_patches_beyond_the_map_are_left_out():
    model, images = convnext.PatchConv(5, 2), make_images(1, 7, 5)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    out = jax.jit(model.apply)(variables, images)
    kernel = variables["params"]["kernel"]
    expected = jax.lax.conv_general_dilated(images, kernel, (2, 2), "VALID",
                                            dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(out, expected, atol=1e-6)


def equal_with_gradients(form, reference, x, kernel):
    def run(f):
        out, pull = jax.vjp(f, x, kernel)
        return out, *pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    for found, expected in zip(jax.jit(run, static_argnums=0)(form),
                               jax.jit(run, static_argnums=0)(reference), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, float(
            jnp.abs(expected).max())))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("groups", "outputs"), [(1, 4), (2, 6), (6, 6), (3, 12)])
def test_grouped_convolution_by_products(groups, outputs, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 6, 6)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 6 // groups, outputs)).astype(np.float32)
    equal_with_gradients(lambda x, k: grouped.grouped_conv_by_products(x, k, stride, groups),
                         lambda x, k: grouped.grouped_conv_reference(x, k, stride, groups),
                         x, kernel)


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_form_of_a_grouped_convolution_follows_backend(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for form in ("grouped_conv_by_products", "grouped_conv_reference"):
        monkeypatch.setattr(grouped, form, lambda *_, form=form: form)
    expected = "grouped_conv_by_products" if backend == "cpu" else "grouped_conv_reference"
    assert grouped.grouped_conv(None, None, 1, 2) == expected


@pytest.mark.parametrize(("kind", "changes", "words"), [
    ("basic", {"depths": ()}, "resnet has no depths of its own.*resnet18"),
    ("basic", {"embed_dims": (8,)}, "one of each for every stage"),
    ("basic", {"depths": (1, -1)}, "whole numbers above 0"),
    ("basic", {"block": "bottle"}, "expected one of basic, bottleneck, padded"),
    ("basic", {"stem_strides": (2, 1)}, r"stem_strides=\(2, 1\)"),
    ("basic", {"drop_path": 1.0}, r"rate in \[0, 1\)"),
    ("basic", {"num_heads": (2,)}, "no such setting as num_heads"),
    ("bottleneck", {"embed_dims": (16, 30)}, "multiple of 4"),
    ("padded", {"embed_dims": (8, 11)}, "grow by even numbers"),
    ("padded", {"embed_dims": (8, 6)}, "never shrink"),
    ("regnety", {"group_width": 0}, "regnety has no group_width.*regnety_160"),
    ("regnety", {"group_width": 5}, "divides each width"),
    ("convnextv2", {"patch_size": -4}, "patch_size=-4"),
    ("convnextv2", {"image_size": 7}, "images of 7 pixels.*expected 8 or more"),
])
def test_settings_that_cannot_work(kind, changes, words):
    with pytest.raises(ValueError, match=words):
        make_small(kind, **changes)


def test_images_that_leave_no_map():
    model = make_small("convnextv2")
    with pytest.raises(ValueError, match="images of 6 pixels cannot pass a ConvNeXt V2 of 2"):
        jax.eval_shape(model.apply, model.variable_shapes(), make_images(1, 9, 6))


def test_the_narrowest_stage_is_one_group():
    """As timm does: no group is wider than its stage."""
    model = make_small("regnety", group_width=24)
    kernel = model.variable_shapes()["params"]["stages_0"]["blocks_0"]["conv2"]["c"]["kernel"]
    assert kernel.shape == (3, 3, 8, 8)
    assert model.variable_shapes()["params"]["stem"]["bn"]["bias"].shape == (32,)
