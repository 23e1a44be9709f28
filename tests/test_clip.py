"""CLIP's image tower with a classifier: layers, whole model, and a capture from images."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_clip import (
    make_config,
    make_images,
    make_small,
    random_variables,
    state_of,
    to_torch,
    write_file,
)

from tinyvit_jax import matching, mix, recipe, teachers, train, weights
from tinyvit_jax import mesh as meshes
from tinyvit_jax.convert import clip as convert
from tinyvit_jax.convert import files, tree
from tinyvit_jax.data import pipeline
from tinyvit_jax.models import FAMILIES, VARIANTS, clip, create_model, describe_shape, family_of
from tinyvit_jax.store import store as stores

ROOT = Path(__file__).parents[1]
NAME = "clip_vit_large14_224"


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    import torch_clip

    return torch_clip


@pytest.fixture(scope="module")
def theirs(reference):
    """A small torch model with random weights."""
    return reference.randomize(reference.TorchClip(make_small()))



@pytest.mark.parametrize(("classes", "count"), [(21841, 320_761_937), (0, 303_966_208)])
def test_parameter_counts(classes, count):
    """OpenAI's ViT-L/14 image tower has 303,966,208; a head of 21,841 classes adds the rest."""
    shapes = create_model(NAME, classes).variable_shapes()
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == count
    assert shapes["batch_stats"] == {}


def test_shapes_dtypes_and_training():
    model = make_small(dtype="bfloat16", remat=True, freeze_norm=True)
    images, variables = make_images(2, 16, 16), model.variable_shapes()
    for train_too in (False, True):
        logits, kept = jax.eval_shape(functools.partial(
            model.apply, train=train_too, mutable=["batch_stats"]), variables, images,
            rngs={"drop_path": jax.random.key(0)})
        assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)
        assert kept == {"batch_stats": {}}
    maps = jax.eval_shape(functools.partial(model.apply, method="features"), variables, images)
    assert [m.shape for m in maps] == [(2, 4, 4, 64)]
    headless = make_small(0)
    assert "head" not in headless.variable_shapes()["params"]
    assert jax.eval_shape(headless.apply, headless.variable_shapes(), images).shape == (2, 24)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_random_weights_start_as_clips():
    tower = clip.ImageTower(4, 4, 64, 0, 1, 24)  # no blocks: what is its own
    drawn = jax.jit(tower.init)(jax.random.key(0), make_images(1, 16, 16))["params"]
    for name in ("class_embedding", "positional_embedding", "proj"):
        assert float(drawn[name].std()) == pytest.approx(64**-0.5, rel=0.25), name


def test_another_image_size_than_the_positions():
    model = make_small()
    for method in (None, "features"):
        with pytest.raises(ValueError, match=r"20 x 16 pixels.*positions are for 16 x 16"):
            jax.eval_shape(functools.partial(model.apply, method=method),
                           model.variable_shapes(), make_images(1, 20, 16))


@pytest.mark.parametrize(("changes", "words"), [
    ({"window_sizes": (7,)}, r"no such setting as window_sizes=\(7,\)"),
    ({"stem_strides": (2, 1)}, "stem_strides"), ({"drop_path": 0.1}, "drop_path=0.1"),
    ({"mlp_ratio": 4.0}, "mlp_ratio"), ({"patch_size": 0}, "clip_vit has no patch_size"),
    ({"depths": ()}, "has no depths"), ({"depths": (2, 2)}, "one whole number above 0"),
    ({"num_heads": (3,)}, "embed_dims 64 and num_heads 3"),
    ({"image_size": 18}, "multiple of patch_size=4"), ({"dtype": "float16"}, "bfloat16"),
    ({"num_classes": -1}, "num_classes=-1"),
])
def test_settings_that_cannot_work(changes, words):
    with pytest.raises(ValueError, match=words):
        make_small(**changes)


def test_a_setting_of_the_other_family_is_refused():
    with pytest.raises(ValueError, match="no such setting as patch_size=14, embed_dim=8"):
        create_model("tiny_vit_5m_224", patch_size=14, embed_dim=8)


def test_every_variant_has_a_family_and_a_shape():
    for name in VARIANTS:
        if name in FAMILIES:
            continue
        model = create_model(name, 5)
        if "dropout" in VARIANTS[name]:  # which is of training, and no part of a shape
            model = model.copy(dropout=0.0)
        assert family_of(name) == family_of(model)
        assert create_model(family_of(name), **describe_shape(model)) == model


@pytest.mark.torch
def test_each_layer_equals_torch(reference):
    """At the true width of a head and of ViT-B, 1e-5 each."""
    import torch

    torch.manual_seed(0)
    width, heads, rng = 768, 12, np.random.default_rng(0)
    x = rng.normal(size=(2, 10, width)).astype(np.float32)
    block = reference.randomize(reference.Block(width, heads))
    flat = {}
    for path, leaf in tree.flatten(jax.eval_shape(clip.Block(heads).init, jax.random.key(0), x)
                                   ).items():
        key = convert.torch_key(path)
        flat[path] = tree.transpose_to_ours(state_of(block)[key], path)
        assert flat[path].shape == leaf.shape, key
    params = tree.nest(flat, {})["params"]
    t = torch.from_numpy(x)

    def check(module, name, expected):
        ours = jax.jit(module.apply)({"params": params[name] if name else params}, x)
        np.testing.assert_allclose(ours, expected.detach(), atol=1e-5, rtol=1e-5)

    check(clip.Attention(heads), "attn", block.attn(t, t, t, need_weights=False)[0])
    check(clip.Mlp(4 * width), "mlp", block.mlp(t))
    check(clip._Norm(), "ln_1", block.ln_1(t))
    check(clip.Block(heads), "", block(t))
    np.testing.assert_allclose(clip.quick_gelu(10 * x), reference.QuickGELU()(10 * t), atol=1e-5)


@pytest.mark.torch
def test_small_model_equals_torch(theirs):
    model = make_small()
    variables, images = convert.from_torch(state_of(theirs), model), make_images(2, 16, 16)
    logits = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(logits, theirs(to_torch(images)).detach(), atol=1e-4)
    own = jax.jit(functools.partial(model.apply, method="features"))(variables, images)[0]
    expected = theirs.visual.tokens(to_torch(images))[:, 1:].detach()
    np.testing.assert_allclose(own.reshape(2, 16, 64), expected, atol=1e-4)
    half = jax.jit(make_small(dtype="bfloat16").apply)(variables, images)
    assert 0 < float(jnp.abs(half - logits).max()) < 0.02 * float(logits.max() - logits.min())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "clip.safetensors"
    files.write_state(path, convert.to_torch(random_variables(make_small())))
    return path


def test_a_clip_file_as_teacher(folder, clip_file, caplog):
    c = make_config(folder, clip_file)
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3)).astype(np.float32)
    mesh = meshes.make_mesh()
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        teacher = teachers.make_teacher(c.teacher, tiny.CLASSES, 16, mesh)
    assert "names none of its 3 classes" in caplog.text
    assert teacher.description["dtype"] == "float32"
    assert teacher.description["mean"] == list(convert.MEAN)
    expected = jax.nn.log_softmax(jax.jit(make_small().apply)(
        random_variables(make_small()), mix.normalize(pixels, convert.MEAN, convert.STD)))
    views = meshes.put_batch({"image": pixels}, mesh)["image"]
    np.testing.assert_allclose(teacher.log_probs(views), expected, atol=1e-5)
    c.teacher.dtype = "bfloat16"
    half = teachers.make_teacher(c.teacher, tiny.CLASSES, 16, mesh)
    assert half.description == {**teacher.description, "dtype": "bfloat16"}
    gap = np.abs(half.log_probs(views) - expected).max()
    assert 1e-5 < gap < 0.02 * float(expected.max() - expected.min())


@pytest.mark.parametrize(("changes", "classes", "message"), [
    ({"name": NAME}, 3, r"not those of .*clip_vit_large14_224: embed_dims \(64,\), expected \(1024"
     r".*depths \(2,\), expected \(24"),
    ({"name": "tiny_vit"}, 3, "family clip_vit, expected tiny_vit"),
    ({"name": "", "depths": (3,)}, 3, r"depths \(2,\), expected \(3,\)"),
    ({}, 5, "has 3 classes, and the images have 5"),
])
def test_another_teacher_than_named(folder, clip_file, changes, classes, message):
    c = make_config(folder, clip_file)
    c.teacher.update(changes)
    with pytest.raises(teachers.TeacherError, match=message):
        teachers.make_teacher(c.teacher, tuple("abcde"[:classes]), 16, meshes.make_mesh())


def learn(config, data, store, updates=4):
    """The losses of a few updates on one stored batch; a CLIP as student compiles soonest."""
    views = recipe.make_views(config, data)
    matching.check_store(store, config, data, views.spec)
    batch = pipeline.Views(data.train, views.spec, data.order, store).read(np.arange(8))
    mesh, model = meshes.make_mesh(), make_small(depths=(1,))

    state = train.init_state(config, model)
    step = train.make_train_step(config, model, lambda step: 1e-3, mesh)
    losses = []
    for _ in range(updates):
        state, metrics = step(state, meshes.put_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    assert state.batch_stats == {}
    return losses


_CAPTURE = """
import sys
from pathlib import Path
import jax, numpy as np, tiny_clip
from tinyvit_jax import mesh, recipe, train
from tinyvit_jax.store import store as stores
folder, file, workdir = map(Path, sys.argv[1:])
shards, write = {}, stores.Store.write_shard

def record(self, shard, blocks, still_mine):
    blocks = list(blocks)
    shards[shard] = [(index, prob) for _, index, prob in blocks]
    return write(self, shard, blocks, still_mine)

stores.Store.write_shard = record
c = tiny_clip.make_config(folder, file)
data = train.open_data(c)
recipe.fill_store(c, workdir / "store", data, mesh.make_mesh())
rows = [row for shard in sorted(shards) for row in shards[shard]]
np.savez(workdir / "given.npz", index=np.concatenate([i for i, _ in rows]),
         prob=np.concatenate([p for _, p in rows]))
print(len(jax.devices()))
"""


@pytest.mark.torch
def test_from_a_torch_file_over_two_devices_to_a_student(theirs, folder, tmp_path):
    """What the teacher gives for every view is torch's softmax of the same normalised pixels."""
    import torch

    file = write_file(tmp_path / "clip.pth", theirs, epoch=3)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tools" / "reference")))
    done = subprocess.run(
        [sys.executable, "-c", _CAPTURE, folder, file, tmp_path], text=True,
        capture_output=True, env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "2"

    config = make_config(folder, file)
    data = train.open_data(config)
    store = stores.open_store(tmp_path / "store")
    assert store.manifest.teacher["name"] == "clip_vit"
    assert store.manifest.teacher["dtype"] == "float32"
    total = data.order.views_per_pass * store.manifest.passes
    batch = recipe.make_views(config, data).read(np.arange(total))
    shown = {k: batch[k] for k in ("image", "lam", "box")}
    images = mix.normalize(mix.view_pixels(shown), convert.MEAN, convert.STD)
    with torch.no_grad():
        expected, classes = theirs(to_torch(np.asarray(images))).softmax(-1).topk(2)
    given = np.load(tmp_path / "given.npz")
    np.testing.assert_array_equal(given["index"], classes)
    np.testing.assert_allclose(given["prob"], expected, atol=1e-5)
    assert expected[:, 0].std() > 0.01  # a teacher that tells views apart
    losses = learn(config, data, store)
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.torch
def test_full_size_equals_torch(reference, tmp_path):
    """ViT-L/14 with 21,841 classes from a file of halves, as a release may be. About 6 GB."""
    import torch

    module = reference.randomize(reference.TorchClip(create_model(NAME, 21841))).half()
    file = write_file(tmp_path / "clip.pth", module)
    module = module.float()
    images = make_images(2, 224, 224)
    with torch.no_grad():
        expected = module(to_torch(images)).numpy()
    del module
    opened = weights.open_trained(file)
    assert opened.model == create_model(NAME, 21841)
    logits = jax.jit(opened.model.apply)(opened.variables, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
