"""The plain vision transformer: layers, whole models, doors for other objectives, faults."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_clip import make_images, random_variables, state_of, to_torch
from tiny_plain import KINDS, make_small

from tinyvit_jax import config as configs
from tinyvit_jax import models, optim
from tinyvit_jax.convert import tree
from tinyvit_jax.convert import vit as convert
from tinyvit_jax.models import cost, create_model, vit, vit_blocks


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    import torch_vit

    return torch_vit


@functools.cache
def small_variables(kind):
    return random_variables(make_small(kind))


def run(model, variables, *arguments, method=None, **settings):
    return jax.jit(functools.partial(model.apply, method=method, **settings))(variables, *arguments)


# As DeiT, MAE and G2SD's paper count them (table 4: 5.72, 5.91, 22.05, 22.44 and 86.57 M).
@pytest.mark.parametrize(("name", "count"), [
    ("vit_tiny_patch16_224", 5_717_416), ("deit_tiny_distilled_patch16_224", 5_910_800),
    ("deit_small_patch16_224", 22_050_664), ("deit_small_distilled_patch16_224", 22_436_432),
    ("mae_vit_base_patch16_224", 86_567_656), ("deit_base_distilled_patch16_224", 87_338_192),
    ("vit_small_patch14_224", 22_004_584),
    ("vit_small_patch14_dinov2", 22_441_192)])
def test_parameter_counts(name, count):
    assert cost.count_parameters(create_model(name)) == count


def test_the_small_one_of_the_slides():
    model = create_model("vit_mini_patch4_32", 10)
    layer = (3 * 128 * 129) + 128 * 129 + 512 * 129 + 128 * 513 + 4 * 128
    assert cost.count_parameters(model) == (
        128 * 49 + 128 + 65 * 128 + 6 * layer + 2 * 128 + 10 * 129) == 1_205_898
    assert (model.num_heads, model.dropout, model.norm_order) == ((8,), 0.1, "post")
    assert create_model("vit_mini_patch4_32", dropout=0.0).dropout == 0.0


def test_cost_is_that_of_deits_table():
    assert round(cost.count_macs(create_model("deit_tiny_patch16_224")) / 1e9, 1) == 1.3


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_dtypes_and_training(kind):
    model = make_small(kind, dtype="bfloat16", remat=True, freeze_norm=True, dropout=0.1,
                       drop_path=0.1)
    images, variables = make_images(2, 16, 16), model.variable_shapes()
    for train in (False, True):
        logits, kept = jax.eval_shape(functools.partial(
            model.apply, train=train, mutable=["batch_stats"]), variables, images,
            rngs={"drop_path": jax.random.key(0)})
        assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)
        assert kept == {"batch_stats": {}}
    maps = jax.eval_shape(functools.partial(model.apply, method="features"), variables, images)
    assert [(m.shape, m.dtype) for m in maps] == [((2, 4, 4, 32), jnp.float32)]
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    headless = make_small(kind, 0)
    assert not {"head", "head_dist"} & set(headless.variable_shapes()["params"])
    assert jax.eval_shape(headless.apply, headless.variable_shapes(), images).shape == (2, 32)


# What timm 1.0.31's own classes give for the same weights and images.
TIMM = {"class": [[-0.172705, -0.318702, 0.406526], [-0.693496, -0.850561, -0.20426]],
        "distilled": [[-1.354187, 0.815513, 0.586892], [-1.660794, 0.982238, 0.324866]],
        "mean": [[0.656343, 0.179197, 0.080982], [0.231268, 0.257234, 0.180501]],
        "scaled": [[-0.690608, 0.439287, 1.480304], [-0.313828, -0.366371, 0.73392]]}


@pytest.mark.parametrize("kind", TIMM)
def test_logits_are_timms(kind):
    logits = run(make_small(kind), small_variables(kind), make_images(2, 16, 16))
    np.testing.assert_allclose(logits, TIMM[kind], atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_small_models_equal_torch(reference, kind):
    import torch

    model, images = make_small(kind), make_images(2, 16, 16)
    theirs = reference.randomize(reference.make(model))
    variables = convert.from_torch(state_of(theirs), model)
    with torch.no_grad():
        expected = theirs(to_torch(images)).numpy()
    found = run(model, variables, images)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    half = run(make_small(kind, dtype="bfloat16"), variables, images)
    assert 0 < float(jnp.abs(half - found).max()) < 0.03 * float(found.max() - found.min())
    if kind in ("post", "mean"):
        return
    with torch.no_grad():
        own = theirs.tokens(to_torch(images))[:, theirs.first:]
    maps = run(model, variables, images, method="features")
    np.testing.assert_allclose(maps[0].reshape(2, 16, 32), own, atol=1e-4)


@pytest.mark.torch
def test_the_slides_model_equals_torch_at_its_full_size(reference):
    import torch

    model, images = create_model("vit_mini_patch4_32", 10), make_images(2, 32, 32)
    theirs = reference.randomize(reference.make(model))
    assert sum(p.numel() for p in theirs.parameters()) == cost.count_parameters(model)
    with torch.no_grad():
        expected = theirs(to_torch(images)).numpy()
    found = run(model, convert.from_torch(state_of(theirs), model), images)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.torch
def test_the_post_norm_block_and_its_gradient_are_torchs():
    torch = pytest.importorskip("torch")
    width, heads, hidden, rng = 64, 4, 96, np.random.default_rng(0)
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(width, heads, hidden, 0.0, "gelu", batch_first=True)
    for value in layer.parameters():
        value.data += 0.1 * torch.randn(value.shape)
    assert layer.norm1.eps == vit_blocks.EPSILON["post"]  # too small to show in the values
    x = rng.normal(size=(2, 10, width)).astype(np.float32)
    weight = rng.normal(size=x.shape).astype(np.float32)
    block = vit_blocks.PostNormBlock(heads, hidden)
    shapes = tree.flatten(jax.eval_shape(functools.partial(block.init, train=True),
                                         jax.random.key(0), x))
    state = state_of(layer)

    def to_ours(arrays):
        flat = {}
        for path in shapes:
            key = convert.torch_key(path, "torch")
            flat[path] = tree.transpose_to_ours(arrays[key], path)
        return tree.nest(flat, {})

    t = torch.tensor(x, requires_grad=True)
    expected = layer(t)
    (expected * torch.tensor(weight)).sum().backward()

    def loss(variables, x):
        out, _ = block.apply(variables, x, True)
        return (out * weight).sum(), out

    (grads, x_grad), out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(to_ours(state), x)
    np.testing.assert_allclose(out, expected.detach(), atol=1e-5)
    np.testing.assert_allclose(x_grad, t.grad, atol=1e-5, rtol=1e-5)
    theirs = to_ours({key: value.grad.numpy() for key, value in layer.named_parameters()})
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5), grads, theirs)


def test_dropout_and_drop_path():
    """What torch's layer drops in training: attention, the hidden layer, both branches."""
    x = jnp.ones((4, 5, 8))
    drop = functools.partial(vit_blocks.tokens.Dropout(0.25).apply, {})
    kept = drop(jnp.ones((100, 100)), True, rngs={"drop_path": jax.random.key(0)})
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.75)}
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.03)
    np.testing.assert_array_equal(drop(x, False), x)
    for kind in ("post", "class"):
        model, images = make_small(kind, depths=(1,), dropout=0.2), make_images(2, 16, 16)
        variables = random_variables(model)
        train = functools.partial(run, model, variables, images, train=True)
        first = train(rngs={"drop_path": jax.random.key(0)})
        np.testing.assert_array_equal(first, train(rngs={"drop_path": jax.random.key(0)}))
        assert np.abs(first - train(rngs={"drop_path": jax.random.key(1)})).max() > 1e-3
        still = run(model, variables, images)
        without = make_small(kind, depths=(1,))
        np.testing.assert_array_equal(still, run(without, variables, images, train=True))
    deep = make_small(depths=(5,), drop_path=0.4).bind(small_variables("class"))
    np.testing.assert_allclose([block.drop_path for block in deep.blocks], [0, 0.1, 0.2, 0.3, 0.4])


WEIGHTS, TOKENS, HIDDEN = (2, 4, 17, 17), (2, 17, 32), (2, 17, 128)  # of attention, the MLP


@pytest.mark.parametrize(("kind", "sites"), [
    ("class", [(0.2, TOKENS), (0.2, TOKENS), (0.2, HIDDEN), (0.2, TOKENS)]),
    ("post", [(0.2, WEIGHTS), (0.2, TOKENS), (0.2, HIDDEN), (0.2, TOKENS)])])
def test_where_numbers_are_dropped(kind, sites):
    """ViT's appendix B.1: the embedded tokens and dense layers; torch's layer: attention too."""
    model, found = make_small(kind, depths=(1,), dropout=0.2), []

    def note(next_, args, kwargs, context):
        if isinstance(context.module, vit_blocks.tokens.Dropout):
            found.append((context.module.rate, args[0].shape, (*args, *kwargs.values())[1]))
        return next_(*args, **kwargs)

    variables = random_variables(model)
    with nn.intercept_methods(note):
        jax.eval_shape(functools.partial(model.apply, train=True), variables,
                       make_images(2, 16, 16), rngs={"drop_path": jax.random.key(0)})
    assert found == [(*site, True) for site in sites]


def test_two_heads_answer():
    model, images = make_small("distilled"), make_images(2, 16, 16)
    variables = small_variables("distilled")
    first, second = run(model, variables, images, method="answers")
    assert first.shape == second.shape == (2, 3)
    assert float(jnp.abs(first - second).max()) > 0.1
    np.testing.assert_allclose(run(model, variables, images), (first + second) / 2, atol=1e-6)
    with pytest.raises(ValueError, match=r"no distillation token.*token_layout=distilled"):
        run(make_small(), small_variables("class"), images, method="answers")


@pytest.mark.parametrize("kind", ["class", "distilled", "mean", "post"])
def test_encoding_some_patches_only(kind):
    """Attention knows no order: kept tokens in any order, and all of them as without a choice."""
    model, images = make_small(kind), make_images(2, 16, 16)
    variables, first = small_variables(kind), 2 if kind == "distilled" else 1
    whole = run(model, variables, images, method="encode").tokens
    assert whole.shape == (2, first + 16, 32)
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(16) for _ in range(2)]).astype(np.int32)
    shuffled = run(model, variables, images, keep=order, method="encode").tokens
    np.testing.assert_allclose(shuffled[:, :first], whole[:, :first], atol=1e-5)
    np.testing.assert_allclose(
        shuffled[:, first:], jnp.take_along_axis(whole[:, first:], order[..., None], 1), atol=1e-5)
    some = run(model, variables, images, keep=order[:, :4], method="encode").tokens
    assert some.shape == (2, first + 4, 32)
    # What was left out is not seen: other pixels there change nothing.
    painted = images.reshape(2, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, -1).copy()
    for row, left in zip(painted, order[:, 4:], strict=True):
        row[left] = 9.0
    painted = painted.reshape(2, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)
    np.testing.assert_array_equal(
        some, run(model, variables, painted, keep=order[:, :4], method="encode").tokens)
    if kind != "mean":
        logits = np.asarray(whole[:, 0]) @ variables["params"]["head"]["kernel"] + (
            variables["params"]["head"]["bias"])
        answers = run(model.copy(token_layout="class"), variables, images) if first == 1 else run(
            model, variables, images, method="answers")[0]
        np.testing.assert_allclose(logits, answers, atol=1e-5)


@pytest.mark.torch
def test_what_single_blocks_saw(reference):
    import torch

    model, images = make_small(), make_images(2, 16, 16)
    theirs = reference.randomize(reference.make(model))
    variables = convert.from_torch(state_of(theirs), model)
    found = run(model, variables, images, layers=(0, 1), method="encode").layers
    assert sorted(found) == [0, 1]
    with torch.no_grad():
        x = torch.cat([theirs.cls_token.expand(2, -1, -1), theirs.patch_embed(to_torch(images))], 1)
        x = x + theirs.pos_embed
        for i, block in enumerate(theirs.blocks):
            qkv = block.attn.qkv(block.norm1(x)).view(2, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
            x = block(x)
            np.testing.assert_allclose(found[i].tokens, x, atol=1e-5)
            for own, expected in zip(found[i][1:], qkv, strict=True):
                np.testing.assert_allclose(own, expected, atol=1e-5)


@pytest.mark.parametrize(("settings", "message"), [
    ({"layers": (2,)}, "blocks are 0 to 1, and there is no 2"),
    ({"keep": np.zeros((3, 4), np.int32)}, r"keep of shape \(3, 4\).*\[2, M\]"),
    ({"keep": np.zeros((2, 4), np.float32)}, "type float32"),
])
def test_what_cannot_be_encoded(settings, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(make_small().apply, method="encode", **settings),
                       small_variables("class"), make_images(2, 16, 16))


def test_fixed_positions_are_maes():
    """Golden: width 8, a grid of 3, the patch in row 0 and column 1."""
    np.testing.assert_allclose(vit.sincos_positions(8, 3)[1],
                               [.841471, .0099998, .540302, .99995, 0, 0, 1, 1], atol=1e-6)
    np.testing.assert_allclose(vit.sincos_positions(8, 3)[3, 4:], vit.sincos_positions(8, 3)[1, :4])
    model = make_small("fixed", depths=(1,))
    drawn = jax.jit(model.init)(jax.random.key(0), make_images(1, 16, 16))["params"]
    np.testing.assert_array_equal(drawn["pos_embed"][0, 0], np.zeros(32))
    np.testing.assert_allclose(drawn["pos_embed"][0, 1:], vit.sincos_positions(32, 4), atol=1e-6)


def test_fixed_positions_do_not_learn():
    images = make_images(2, 16, 16)
    for kind, moves in (("fixed", False), ("class", True)):
        model = make_small(kind, depths=(1,))
        params = random_variables(model)["params"]
        grads = jax.jit(jax.grad(lambda p, m=model: m.apply({"params": p}, images).sum()))(params)
        assert bool(jnp.abs(grads["pos_embed"]).max() > 0) == moves
        assert float(jnp.abs(grads["cls_token"]).max()) > 0
        tx, packing = optim.make_optimizer(configs.default().optim), optim.pack_by_decay(params)
        vectors = packing.pack(params)
        updates, _ = tx.update(packing.pack(grads), tx.init(vectors), vectors)
        after = packing.unpack(optax.apply_updates(vectors, updates))
        assert bool(jnp.abs(after["pos_embed"] - params["pos_embed"]).max() > 0) == moves


def test_decay_and_layer_scales():
    params = make_small("distilled", depths=(3,)).variable_shapes()["params"]
    mask = optim.decay_mask(params)
    for name in ("cls_token", "dist_token", "pos_embed"):
        assert not mask[name]
    assert mask["patch_embed"]["proj"] == mask["head"] == {"kernel": True, "bias": False}
    scale = optim.layer_scales(params, 0.5, (3,))
    front = [scale["cls_token"], scale["pos_embed"], scale["patch_embed"]["proj"]["kernel"]]
    assert front == [0.5**4] * 3
    assert [scale[f"blocks_{i}"]["norm1"]["bias"] for i in range(3)] == [1 / 8, 1 / 4, 1 / 2]
    assert scale["dist_token"] == scale["norm"]["bias"] == scale["head_dist"]["bias"] == 1.0
    held = optim.make_factors(configs.default().optim, params, (3,), "head")(jnp.asarray(1))
    assert held["head"]["bias"] == held["head_dist"]["bias"] == 1.0
    assert held["norm"]["bias"] == held["cls_token"] == 0.0


@pytest.mark.parametrize(("changes", "words"), [
    ({"patch_size": 0}, "vit has no patch_size"), ({"depths": (2, 2)}, "one whole number above 0"),
    ({"num_heads": (3,)}, "embed_dims 32 and num_heads 3"),
    ({"image_size": 18}, "multiple of patch_size=4, such as 16 or 20"),
    ({"image_size": 3}, "images of 3 pixels are smaller than one patch of 4"),
    ({"pool": "max"}, "pool=max cannot work: expected token or mean"),
    ({"positions": "rotary"}, "learned or sincos"), ({"norm_order": "both"}, "pre or post"),
    ({"token_layout": "none"}, "class or distilled"), ({"dropout": 1.0}, "dropout=1.0"),
    ({"drop_path": -0.1}, "drop_path=-0.1"), ({"mlp_dims": (8, 8)}, "mlp_dims"),
    ({"layer_scale": -1.0}, "layer_scale=-1.0"), ({"window_sizes": (7,)}, "window_sizes"),
    ({"token_layout": "distilled", "pool": "mean"}, "cannot work together"),
    ({"norm_order": "post", "layer_scale": 0.1}, "torch's layer has none"),
    ({"positions": "sincos", "embed_dims": (30,), "num_heads": (1,)}, "multiple of 4"),
])
def test_settings_that_cannot_work(changes, words):
    with pytest.raises(ValueError, match=words):
        make_small(**changes)


def test_another_image_size_than_the_positions():
    for method in (None, "features", "encode"):
        with pytest.raises(ValueError, match=r"20 x 16 pixels.*positions are for 16 x 16"):
            jax.eval_shape(functools.partial(make_small().apply, method=method),
                           small_variables("class"), make_images(1, 20, 16))


def test_names():
    assert models.family_of("deit_tiny_patch16_224") == models.family_of(make_small()) == "vit"
    for name, variant in vit.VARIANTS.items():
        if name != "vit":
            assert create_model(name).image_size == variant["image_size"]
