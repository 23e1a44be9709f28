import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinyvit_jax import config as configs
from tinyvit_jax import models, optim


def section(**changes):
    c = configs.default().optim
    c.update(changes)
    return c


def reference_rate(c, batch, steps, per_epoch, step):
    """The original's rule, step by step, in plain Python."""
    scale = batch / 512
    t, warmup = max(step - 1, 0), int(c.warmup_epochs * per_epoch)
    if t < warmup:
        return scale * (c.warmup_learning_rate
                        + t * (c.learning_rate - c.warmup_learning_rate) / warmup)
    span = c.learning_rate - c.min_learning_rate
    return scale * (c.min_learning_rate + 0.5 * span * (1 + np.cos(np.pi * t / steps)))


@pytest.mark.parametrize("step", [0, 1, 2, 99, 100, 101, 102, 500, 1999, 2000])
def test_schedule(step):
    c = section(warmup_epochs=5.0)
    schedule = optim.make_schedule(c, 1024, steps=2000, steps_per_epoch=20.0)
    expected = reference_rate(c, 1024, 2000, 20.0, step)
    assert float(schedule(jnp.asarray(step))) == pytest.approx(expected, rel=2e-5)


def test_first_two_updates_run_at_the_warmup_rate():
    schedule = optim.make_schedule(section(), 512, 100, 2.0)
    assert float(schedule(0)) == float(schedule(1)) == pytest.approx(5e-7)


def params():
    leaf = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    block = {"attn": {"qkv": leaf, "attention_biases": jnp.ones((2, 9))},
             "norm": {"scale": jnp.ones(3)}}
    return {"patch_embed": {"seq_0": {"c": leaf}},
            "layers_0": {"blocks_0": {"conv1": {"c": leaf}}, "downsample": {"conv1": {"c": leaf}}},
            "layers_1": {"blocks_0": block, "blocks_1": block}, "norm_head": leaf, "head": leaf}


def test_decay_mask():
    mask = optim.decay_mask(params())
    assert mask["head"] == {"kernel": True, "bias": False}
    block = mask["layers_1"]["blocks_0"]
    assert block["attn"]["qkv"] == {"kernel": True, "bias": False}
    assert not block["attn"]["attention_biases"]
    assert not block["norm"]["scale"]


def test_layer_scales():
    scale = optim.layer_scales(params(), 0.5, depths=(1, 2))
    assert scale["patch_embed"]["seq_0"]["c"]["kernel"] == 0.25
    assert scale["layers_0"]["blocks_0"]["conv1"]["c"]["kernel"] == 0.25
    assert scale["layers_0"]["downsample"]["conv1"]["c"]["kernel"] == 0.25
    assert scale["layers_1"]["blocks_0"]["norm"]["scale"] == 0.5
    assert scale["layers_1"]["blocks_1"]["norm"]["scale"] == 1.0
    assert scale["norm_head"]["bias"] == scale["head"]["kernel"] == 1.0


def test_layer_scales_where_a_stage_begins_with_its_way_down():
    leaf = {"kernel": jnp.ones((2, 3))}
    tree = {"stem": leaf, "stages_0": {"blocks_0": leaf},
            "stages_1": {"downsample": leaf, "blocks_0": leaf, "blocks_1": leaf}, "head": leaf}
    scale = optim.layer_scales(tree, 0.5, depths=(1, 2))
    assert scale["stem"] == scale["stages_0"]["blocks_0"] == {"kernel": 0.25}
    assert scale["stages_1"]["downsample"] == scale["stages_1"]["blocks_0"] == {"kernel": 0.5}
    assert scale["stages_1"]["blocks_1"] == scale["head"] == {"kernel": 1.0}


@pytest.mark.parametrize(("warmup", "first"), [(1.0, 1.0), (0.0, 0.25)])
def test_the_first_update_lacks_the_factors_of_a_warmup(warmup, first):
    c = section(layer_decay=0.5, warmup_epochs=warmup)
    factors = optim.make_factors(c, params(), (1, 2))
    for step, expected in ((0, first), (1, 0.25), (9, 0.25)):
        assert float(factors(jnp.asarray(step))["patch_embed"]["seq_0"]["c"]["bias"]) == expected
    held = optim.make_factors(c, params(), (1, 2), "head")(jnp.asarray(0))
    assert held["patch_embed"]["seq_0"]["c"]["bias"] == 0.0
    assert float(held["head"]["bias"]) == 1.0
    assert optim.make_factors(section(), params(), (1, 2)) is None


def test_a_warmup_is_one_update_at_least():
    schedule = optim.make_schedule(section(warmup_epochs=1.0), 512, 20, 0.9)
    assert float(schedule(0)) == pytest.approx(5e-7)
    assert float(schedule(2)) > 4e-4


def test_layer_scales_of_a_clip():
    model = models.create_model("clip_vit", 3, 8, patch_size=4, embed_dims=(8,), depths=(3,),
                                num_heads=(1,), embed_dim=4)
    visual = optim.layer_scales(model.variable_shapes()["params"], 0.5, (3,))["visual"]
    blocks = visual["transformer"]
    assert [blocks[f"resblocks_{i}"]["ln_1"]["bias"] for i in range(3)] == [0.25, 0.5, 1.0]
    for name in ("class_embedding", "positional_embedding"):
        assert visual[name] == visual["conv1"]["kernel"] == visual["ln_pre"]["bias"] == 0.25
    assert visual["proj"] == visual["ln_post"]["bias"] == 1.0


@pytest.mark.torch
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_updates_follow_torch_adamw(clip):
    torch = pytest.importorskip("torch")
    g = np.random.default_rng(0)
    start = {"kernel": g.normal(size=(4, 3)).astype(np.float32),
             "bias": g.normal(size=3).astype(np.float32)}
    c = section(learning_rate=0.01, weight_decay=0.1, clip_norm=clip)
    tree = {"head": jax.tree.map(jnp.asarray, start)}
    tx, packing = optim.make_optimizer(c), optim.pack_by_decay(tree)
    vectors = packing.pack(tree)
    state = tx.init(vectors)
    own = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    adam = torch.optim.AdamW([{"params": [own["kernel"]], "weight_decay": 0.1},
                              {"params": [own["bias"]], "weight_decay": 0.0}], lr=0.01, eps=1e-8)
    for _ in range(10):
        grads = {k: g.normal(size=v.shape).astype(np.float32) for k, v in start.items()}
        updates, state = tx.update(packing.pack({"head": grads}), state, vectors)
        vectors = optax.apply_updates(vectors, jax.tree.map(lambda u: -0.01 * u, updates))
        for k, p in own.items():
            p.grad = torch.tensor(grads[k])
        if clip:
            torch.nn.utils.clip_grad_norm_(own.values(), clip)
        adam.step()
    after = packing.unpack(vectors)["head"]
    for k, p in own.items():
        np.testing.assert_allclose(after[k], p.detach().numpy(), atol=2e-6)
