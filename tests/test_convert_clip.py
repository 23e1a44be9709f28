"""CLIP's weights to and from PyTorch files: names, faults, other sizes and heads."""

import functools

import jax
import numpy as np
import pytest
import tiny
from tiny_clip import make_images, make_small, random_variables, state_of, to_torch

from tinyvit_jax import weights
from tinyvit_jax.convert import clip as convert
from tinyvit_jax.convert import files, tree
from tinyvit_jax.convert.files import WeightsError
from tinyvit_jax.models import create_model

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



@pytest.mark.torch
def test_names_and_shapes_are_the_released_files(reference):
    import torch

    model = create_model(NAME, 21841)
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in reference.TorchClip(model).state_dict().items()}
    found = {convert.torch_key(path): tree.torch_shape(leaf.shape, path)
             for path, leaf in tree.flatten(model.variable_shapes()).items()}
    assert found == wanted
    assert found["visual.transformer.resblocks.23.attn.in_proj_weight"] == (3072, 1024)


@pytest.mark.torch
def test_a_model_of_ours_loads_strictly_in_torch(reference):
    import torch

    model = make_small()
    variables = random_variables(model)
    state = convert.to_torch(variables)
    module = reference.TorchClip(model).eval()
    module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()}, strict=True)
    images = make_images(2, 16, 16)
    logits = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(logits, module(to_torch(images)).detach(), atol=1e-4)
    again = convert.from_torch(state, model)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    with pytest.raises(WeightsError, match="layout of microsoft only"):
        weights.convert_to(model, variables, "timm")


def test_halves_prefixes_and_wrappers():
    model = make_small()
    variables = random_variables(model)
    state = convert.to_torch(variables)
    halves = {"model": {f"module.{k}": v.astype(np.float16) for k, v in state.items()}}
    loaded = convert.from_torch(halves, model)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), loaded,
                 variables)
    assert convert.count_classes(halves) == weights.count_classes(halves) == 3


def test_every_fault_is_listed():
    model = make_small()
    state = convert.to_torch(random_variables(model))
    del state["visual.ln_pre.bias"]
    state["visual.proj"] = np.zeros((64, 8), np.float32)
    state["visual.odd"] = state["neck.weight"] = np.zeros(3, np.float32)
    state["head.bias"] = np.zeros(4, np.float32)
    with pytest.raises(WeightsError) as caught:
        convert.from_torch(state, model)
    for part in ("5 keys", "missing: visual.ln_pre.bias (64,)", "unused: neck.weight (3,)",
                 "mis-shaped: visual.proj is (64, 8), expected (64, 24)", "unused: visual.odd",
                 "mis-shaped: head.bias is (4,), expected (3,)", 'head="new"'):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="expected strict or new"):
        convert.from_torch(state, model, head="any")


def test_the_other_family_is_refused():
    with pytest.raises(WeightsError, match=r"not CLIP's weights: .*layers\.0"):
        weights.convert_from({"layers.0": np.zeros(1, np.float32)}, make_small())
    with pytest.raises(WeightsError, match=r"not TinyViT's weights: .*visual\."):
        weights.convert_from(convert.to_torch(random_variables(make_small())),
                             create_model("tiny_vit_5m_224"))


def openai_state(model):
    """A whole CLIP as OpenAI's files hold one: text tower and constants, and no classifier."""
    state = convert.to_torch(random_variables(model.copy(num_classes=0)))
    others = ("positional_embedding", "text_projection", "token_embedding.weight",
              "transformer.resblocks.0.ln_1.weight", "ln_final.weight", "ln_final.bias")
    state |= {key: np.zeros((4, 8), np.float16) for key in others}
    return state | {key: np.zeros((), np.float32)
                    for key in ("logit_scale", "input_resolution", "context_length", "vocab_size")}


def test_a_whole_clip_gives_its_image_tower(caplog):
    model = make_small(0)
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        loaded = convert.from_torch(openai_state(model), model)
    assert "left out 10 arrays" in caplog.text
    assert "token_embedding, transformer" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, loaded, random_variables(model))


def test_heads_that_are_new_or_not_wanted(caplog):
    model, state = make_small(), openai_state(make_small())
    with pytest.raises(WeightsError, match=r'missing: head\.bias \(3,\)') as caught:
        convert.from_torch(state, model)
    assert "num_classes=0" in str(caught.value)
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        loaded = convert.from_torch(state, model, "new")
    assert not loaded["params"]["head"]["kernel"].any()
    assert "classifier of 3 classes starts at zero: the weights had none" in caplog.text
    whole = convert.to_torch(random_variables(model))
    trunk = convert.from_torch(whole, make_small(0))
    assert "head" not in trunk["params"]
    assert not convert.from_torch(whole, make_small(7), "new")["params"]["head"]["bias"].any()


@pytest.mark.torch
def test_positions_are_resized_as_torch_does(reference):
    import torch

    rng = np.random.default_rng(0)
    for old, new in ((4, 6), (6, 4), (16, 24)):
        table = rng.normal(size=(1 + old**2, 5)).astype(np.float32)
        ours = convert.resize_positions(table, 1 + new**2)
        np.testing.assert_array_equal(ours[0], table[0])
        expected = reference.resize_positions(torch.from_numpy(table), 1 + new**2)
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.torch
def test_weights_serve_another_image_size(reference, theirs, caplog):
    model = make_small(image_size=24)
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        variables = convert.from_torch(state_of(theirs), model)
    assert "resized the positions of 17 tokens to 37" in caplog.text
    larger = reference.TorchClip(model).eval()
    larger.load_state_dict(theirs.state_dict())
    images = make_images(2, 24, 24)
    logits = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(logits, larger(to_torch(images)).detach(), atol=1e-4)


def test_the_shape_is_read_off_a_file():
    state = convert.to_torch(random_variables(make_small()))
    found = convert.infer_shape({"model": state})
    assert found == convert.Shape(3, 16, 4, (64,), (2,), (1,), 24)
    assert convert.infer_shape(state, num_heads=4).num_heads == (4,)
    cut = {k: v for k, v in state.items() if k != "visual.proj"}
    with pytest.raises(WeightsError, match=r"visual\.proj is missing; expected 2 axes"):
        convert.infer_shape(cut)
    odd = {**state, "visual.positional_embedding": np.zeros((16, 64))}
    with pytest.raises(WeightsError, match="16 rows"):
        convert.infer_shape(odd)
    narrow = convert.to_torch(random_variables(make_small(embed_dims=(32,))))
    with pytest.raises(WeightsError, match=r"32 channels.*teacher\.num_heads"):
        convert.infer_shape(narrow)


def test_a_file_alone_and_a_folder_of_ours(tmp_path):
    variables = random_variables(make_small())
    path = tmp_path / "clip.safetensors"
    files.write_state(path, weights.convert_to("clip_vit", variables))
    opened = weights.open_trained(path, class_names=tiny.CLASSES)
    assert opened.model == make_small()
    assert (opened.mean, opened.std) == (convert.MEAN, convert.STD)
    jax.tree.map(np.testing.assert_array_equal, opened.variables, variables)
    with pytest.raises(ValueError, match="no such setting as stem_strides"):
        weights.open_trained(path, stem_strides=(2, 1))
    weights.save_trained(opened, tmp_path / "run")
    again = weights.open_trained(tmp_path / "run")
    assert again.model == opened.model
    assert again[2:] == opened[2:]
    jax.tree.map(np.testing.assert_array_equal, again.variables, variables)
    larger = weights.open_trained(tmp_path / "run", image_size=24)
    assert larger.model.image_size == 24
    names = ("stripes", "new", "blobs")
    head = weights.load_weights(tmp_path / "run", make_small(), "new", names)["params"]["head"]
    np.testing.assert_array_equal(head["kernel"][:, [0, 2]],
                                  variables["params"]["head"]["kernel"][:, [2, 0]])
