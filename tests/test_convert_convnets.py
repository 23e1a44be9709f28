"""Weights of ResNet, RegNetY and ConvNeXt V2 to and from PyTorch files: names, shapes, faults."""

import hashlib

import jax
import numpy as np
import pytest
import tiny
from tiny_convnets import (
    PAIRS,
    SHAPES,
    make_images,
    make_small,
    make_torch,
    random_variables,
    state_of,
    to_torch,
    torch_class,
)

from tinyvit_jax import mesh as meshes
from tinyvit_jax import mix, models, teachers, weights
from tinyvit_jax.convert import convnets, convnext, files, regnet, resnet
from tinyvit_jax.convert.files import WeightsError

# Arrays in the state dicts of timm's classes (version 1.0.31), their parameters, and the beginning
# of the sha256 over the lines "key shape", sorted.
TIMM = [
    ("resnet18", 122, 11689512, "5191d63ec3989592"),
    ("resnet34", 218, 21797672, "f8de2a1812ef85e4"),
    ("resnet26", 176, 15995176, "8b0617f7587b6ed7"),
    ("resnet50", 320, 25557032, "a87e91cd6bd1f939"),
    ("resnet101", 626, 44549160, "dbc3ca74fffafc72"),
    ("resnet152", 932, 60192808, "7d486dbdc941506e"),
    ("regnety_002", 318, 3162996, "c05a79f0edf25b2b"),
    ("regnety_004", 384, 4344144, "b2c4b174d43b1a9a"),
    ("regnety_006", 362, 6055160, "7b736fe995ac8bad"),
    ("regnety_008", 340, 6263168, "964c2d29fe5c9a0d"),
    ("regnety_016", 626, 11202430, "e0d0db38ce550e0f"),
    ("regnety_032", 494, 19436338, "20393c0d1d50b89d"),
    ("regnety_040", 516, 20646656, "e510ee9a8fe59251"),
    ("regnety_064", 582, 30583252, "ca14a20d17570590"),
    ("regnety_080", 406, 39180068, "73351c1ff51c5ad4"),
    ("regnety_120", 450, 51822544, "24b5268627f0446c"),
    ("regnety_160", 428, 83590140, "ddebc69426771b6b"),
    ("regnety_320", 472, 145046770, "5f587631794c40cd"),
    ("convnextv2_atto", 140, 3708400, "3dc2d8b83c6c3555"),
    ("convnextv2_femto", 140, 5233240, "bcff1bbd6d8143d7"),
    ("convnextv2_pico", 140, 9066280, "818f8b5a64c137fe"),
    ("convnextv2_nano", 160, 15623800, "b31d177ed055e12a"),
    ("convnextv2_tiny", 200, 28635496, "72cba9b73324bc00"),
    ("convnextv2_small", 380, 50318440, "f979864544a42ae5"),
    ("convnextv2_base", 380, 88717800, "bfbcc95160c7fe90"),
    ("convnextv2_large", 380, 197956840, "eab823ecc600514f"),
    ("convnextv2_huge", 380, 660289640, "35ae9e1515f38fb1"),
]


def empty_variables(model):
    """Variables of the right shapes that take no memory."""
    return jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), model.variable_shapes())


def digest(state):
    lines = "\n".join(f"{key} {state[key].shape}" for key in sorted(state))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


@pytest.mark.parametrize(("name", "arrays", "parameters", "expected"), TIMM,
                         ids=[row[0] for row in TIMM])
def test_names_and_shapes_are_timms(name, arrays, parameters, expected):
    model = models.create_model(name)
    variables = empty_variables(model)
    state = weights.convert_to(model, variables, "timm")
    assert (len(state), digest(state)) == (arrays, expected)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == parameters


def test_every_timm_variant_is_held():
    named = {row[0] for row in TIMM}
    assert named == {name for name in models.VARIANTS if models.family_of(name) in (
        "resnet", "regnety", "convnextv2") and models.VARIANTS[name]["depths"]
        and not name.endswith("_cifar")}


@pytest.mark.parametrize(("name", "layers"), [("resnet20_cifar", 269722),
                                              ("resnet56_cifar", 853018)])
def test_resnets_for_cifar_have_the_papers_parameters(name, layers):
    """0.27 M and 0.85 M in table 6 of the paper, with ten classes."""
    shapes = models.create_model(name, 10).variable_shapes()["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == layers


@pytest.mark.torch
@pytest.mark.parametrize(("kind", "layout"), PAIRS)
def test_torch_takes_what_we_write_and_gives_the_same(kind, layout):
    torch = pytest.importorskip("torch")
    model = make_small(kind)
    variables, images = random_variables(model), make_images(2, 32, 32)
    state = weights.convert_to(model, variables, layout)
    module = torch_class(kind)(model, layout).eval()
    module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()}, strict=True)
    with torch.no_grad():
        expected = module(to_torch(images))
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), expected, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, weights.convert_from(state, model), variables)
    assert weights.find_family(state) == SHAPES[kind][0]


@pytest.mark.parametrize(("kind", "layout"), PAIRS)
def test_the_shape_is_read_off_a_file(kind, layout, tmp_path):
    model = make_small(kind)
    variables = random_variables(model)
    path = tmp_path / "w.safetensors"
    files.write_state(path, weights.convert_to(model, variables, layout))
    opened = weights.open_trained(path, 32, class_names=tiny.CLASSES)
    assert opened.model == model
    assert (opened.mean, opened.std, opened.crop_ratio) == (convnets.MEAN, convnets.STD, 0.875)
    jax.tree.map(np.testing.assert_array_equal, opened.variables, variables)
    native = 32 if kind == "padded" else 224
    assert weights.open_trained(path).model.image_size == native


@pytest.mark.parametrize("kind", ["bottleneck", "padded", "regnety", "convnextv2"])
def test_a_folder_of_ours_and_another_size(kind, tmp_path):
    model = make_small(kind)
    trained = weights.Trained(model, random_variables(model), tiny.CLASSES, convnets.MEAN,
                              convnets.STD, "center", 0.875)
    weights.save_trained(trained, tmp_path / "run")
    again = weights.open_trained(tmp_path / "run", image_size=48)
    assert again.model == make_small(kind, image_size=48)
    jax.tree.map(np.testing.assert_array_equal, again.variables, trained.variables)


def test_wrappers_prefixes_and_matrices_as_convolutions():
    for kind in ("basic", "convnextv2"):
        model = make_small(kind)
        variables = random_variables(model)
        state = weights.convert_to(model, variables)
        wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
        jax.tree.map(np.testing.assert_array_equal, weights.convert_from(wrapped, model), variables)
        assert weights.count_classes(wrapped) == 3
    assert state["stages.0.blocks.0.mlp.fc1.weight"].shape == (32, 8, 1, 1)
    flat = {k: v[..., 0, 0] if v.shape[2:] == (1, 1) else v for k, v in state.items()}
    assert flat["stages.0.blocks.0.mlp.fc1.weight"].shape == (32, 8)
    jax.tree.map(np.testing.assert_array_equal, weights.convert_from(flat, model), variables)


@pytest.mark.parametrize(("kind", "layout"), PAIRS)
def test_every_fault_is_listed(kind, layout):
    model = make_small(kind)
    state = weights.convert_to(model, random_variables(model), layout)
    head = next(key for key in state if key.endswith("weight") and state[key].shape[0] == 3)
    gone = next(key for key in state if key.endswith("bias") and state[key].shape != (3,))
    del state[gone]
    state[head] = np.zeros((7, 16), np.float32)
    state["neck.weight"] = np.zeros(3, np.float32)
    with pytest.raises(WeightsError) as caught:
        weights.convert_from(state, model)
    for part in (f"layout of {layout}) do not fit", "3 keys", f"missing: {gone}",
                 f"mis-shaped: {head} is (7, 16), expected", "unused: neck.weight (3,)",
                 'head="new"', "num_classes=0"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="expected strict or new"):
        weights.convert_from(state, model, "any")


def test_heads_that_are_new_or_not_wanted(caplog):
    for kind in ("basic", "regnety", "convnextv2"):
        state = weights.convert_to(make_small(kind), random_variables(make_small(kind)))
        with caplog.at_level("INFO", logger="tinyvit_jax"):
            loaded = weights.convert_from(state, make_small(kind, 7), "new")
        assert loaded["params"]["head"]["kernel"].shape[1] == 7
        assert not loaded["params"]["head"]["kernel"].any()
        assert "classifier of 7 classes starts at zero: the weights had 3." in caplog.text
        assert "head" not in weights.convert_from(state, make_small(kind, 0))["params"]


def test_weights_of_others_are_refused():
    odd = {"layers.0": np.zeros(1, np.float32)}
    for kind, words in (("basic", "not a ResNet's weights"), ("regnety", "not a RegNetY's"),
                        ("convnextv2", "not a ConvNeXt V2's")):
        with pytest.raises(WeightsError, match=words + r".*layers\.0"):
            weights.convert_from(odd, make_small(kind))
        with pytest.raises(WeightsError, match="layout of timm"):
            weights.convert_to(make_small(kind), random_variables(make_small(kind)), "mae")
    first = weights.convert_to(make_small("convnextv2"), random_variables(make_small("convnextv2")))
    first = {key: value for key, value in first.items() if ".grn." not in key}
    with pytest.raises(WeightsError, match="the first ConvNeXt does not have"):
        weights.convert_from(first, make_small("convnextv2"))
    cut = weights.convert_to(make_small("basic"), random_variables(make_small("basic")))
    del cut["conv1.weight"]
    with pytest.raises(WeightsError, match=r"conv1\.weight is missing; expected 4 axes"):
        resnet.infer_shape(cut)


def test_layouts_are_all_offered():
    for converter in (resnet, regnet, convnext):
        assert set(converter.LAYOUTS) <= set(weights.LAYOUTS)


@pytest.mark.parametrize("kind", ["padded", "regnety", "convnextv2"])
def test_a_file_as_teacher(kind, tmp_path):
    model = make_small(kind)
    variables = random_variables(model)
    path = tmp_path / "teacher.safetensors"
    files.write_state(path, weights.convert_to(model, variables))
    c = tiny.make_config(tmp_path).teacher
    c.update({key: type(c[key])() for key in weights.list_shape_keys(c)})
    c.update({"name": SHAPES[kind][0], "weights": str(path), "image_size": 32, "epochs": 0})
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    mesh = meshes.make_mesh()
    teacher = teachers.make_teacher(c, tiny.CLASSES, 32, mesh)
    expected = jax.nn.log_softmax(jax.jit(model.apply)(
        variables, mix.normalize(pixels, convnets.MEAN, convnets.STD)))
    views = meshes.put_batch({"image": pixels}, mesh)["image"]
    np.testing.assert_allclose(teacher.log_probs(views), expected, atol=1e-5)
    c.name = "resnet18"
    with pytest.raises(teachers.TeacherError, match=r"embed_dims .*expected \(64, 128, 256, 512\)"):
        teachers.make_teacher(c, tiny.CLASSES, 32, meshes.make_mesh())


def test_a_student_takes_the_shape_of_a_file(tmp_path):
    """With no model named, blocks and groups come from the weights, which no key of ours sets."""
    for kind in ("padded", "regnety"):
        model = make_small(kind, image_size=48)
        path = tmp_path / f"{kind}.safetensors"
        files.write_state(path, weights.convert_to(model, random_variables(model)))
        c = tiny.make_config(tmp_path).model
        c.update({key: type(c[key])() for key in weights.list_shape_keys(c)})
        c.update({"name": "", "init_from": str(path), "image_size": 48})
        assert weights.make_model(c, 3) == model
        assert weights.make_model(weights.complete(c), 3) == model


@pytest.mark.torch
@pytest.mark.parametrize(("kind", "layout"), PAIRS)
def test_a_converted_file_is_compared_with_torch(kind, layout, tmp_path):
    torch = pytest.importorskip("torch")
    from reference import compare

    module = make_torch(kind, layout)
    path = tmp_path / "theirs.pth"
    torch.save({"model": module.state_dict()}, path)
    opened = weights.open_trained(path, 32)
    difference = compare.compare_file(str(path), opened.model, opened.variables, False)
    assert difference < 1e-5
    state = state_of(module)
    wrong = next(key for key in state if key.endswith("running_var") or ".grn." in key)
    state[wrong] = state[wrong] + 1
    other = weights.convert_from(state, opened.model)
    assert compare.compare_file(str(path), opened.model, other, False) > 1e-3
