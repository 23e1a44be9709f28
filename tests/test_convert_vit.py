"""Plain vision transformers' weights to and from PyTorch files: names, tokens, positions, heads."""

import functools

import jax
import numpy as np
import pytest
import tiny
from tiny_clip import make_images, random_variables, to_torch
from tiny_plain import KINDS, make_small

from tinyvit_jax import weights
from tinyvit_jax.convert import clip, files, resize, tree
from tinyvit_jax.convert import vit as convert
from tinyvit_jax.convert.files import WeightsError
from tinyvit_jax.models import create_model


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    import torch_vit

    return torch_vit


@functools.cache
def small_variables(kind):
    return random_variables(make_small(kind))


def small_state(kind):
    return convert.to_torch(small_variables(kind))


@pytest.mark.torch
@pytest.mark.parametrize("name", [
    "vit_small_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_dinov2",
    "mae_vit_base_patch16_224", "vit_mini_patch4_32"])
def test_names_and_shapes_are_the_originals(reference, name):
    import torch

    model = create_model(name)
    layout = "torch" if name == "vit_mini_patch4_32" else "timm"
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in reference.make(model).state_dict().items()}
    found = {convert.torch_key(path, layout): convert._torch_shape(path, leaf.shape, layout)
             for path, leaf in tree.flatten(model.variable_shapes()).items()}
    assert found == wanted


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["distilled", "post"])
def test_a_model_of_ours_loads_strictly_in_torch(reference, kind):
    import torch

    model, variables = make_small(kind), small_variables(kind)
    state = weights.convert_to(model, variables)
    module = reference.make(model).eval()
    module.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=True)
    images = make_images(2, 16, 16)
    with torch.no_grad():
        expected = module(to_torch(images))
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), expected, atol=1e-5)
    own, other = ("torch", "timm") if kind == "post" else ("timm", "microsoft")
    assert weights.convert_to(model, variables, own).keys() == state.keys()
    with pytest.raises(WeightsError, match=f"layout of {own} only, and {other} was asked for"):
        weights.convert_to(model, variables, other)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_prefixes_and_shape(kind):
    model, state = make_small(kind), small_state(kind)
    wrapped = {"model": {f"module.{key}": value for key, value in state.items()}}
    assert convert.owns(wrapped)
    assert weights.find_family(wrapped) == "vit"
    assert convert.count_classes(wrapped) == 3
    jax.tree.map(np.testing.assert_array_equal, convert.from_torch(wrapped, model),
                 small_variables(kind))
    shape = convert.infer_shape(wrapped, num_heads=4)._asdict()
    again = create_model("vit", **shape)
    assert again == model.copy(positions="learned", layer_scale=shape["layer_scale"])


@pytest.mark.torch
@pytest.mark.parametrize(("first", "old", "new"), [(1, 4, 6), (2, 6, 4), (1, 14, 24)])
def test_positions_are_resized_as_torch_does(first, old, new):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(first + old**2, 5)).astype(np.float32)
    ours = convert.fit_positions(table, first + new**2, first, first == 2)
    np.testing.assert_array_equal(ours[:first], table[:first])
    grid = torch.tensor(table[first:].T.reshape(1, 5, old, old))
    expected = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic")[0].flatten(1).T
    np.testing.assert_allclose(ours[first:], expected, atol=1e-5)
    assert clip.resize_positions is resize.resize_positions


def test_tokens_without_a_position_get_zeros(caplog):
    """DeiT III has none for its class token, G2SD none for its distillation token."""
    table = np.random.default_rng(0).normal(size=(17, 5)).astype(np.float32)
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        bare = convert.fit_positions(table[1:], 17, 1, False)
        last = convert.fit_positions(table, 18, 2, True)
    np.testing.assert_array_equal(bare, np.concatenate([np.zeros((1, 5)), table[1:]]))
    np.testing.assert_array_equal(last, np.insert(table, 1, 0, axis=0))
    assert "1 of the 2 tokens before the patches' have no position" in caplog.text
    assert convert.fit_positions(table, 17, 1, False) is table
    assert convert.fit_positions(table[:13], 17, 1, False) is None


@pytest.mark.torch
def test_weights_serve_another_image_size(reference, caplog):
    import torch

    model = make_small("distilled", image_size=24)
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        variables = convert.from_torch(small_state("distilled"), model)
    assert "resized the positions of 18 tokens to 38 (bicubic)" in caplog.text
    larger = reference.make(model).eval()
    larger.load_state_dict({k: torch.tensor(v) for k, v in small_state("distilled").items()})
    images = make_images(2, 24, 24)
    with torch.no_grad():
        expected = larger(to_torch(images))
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "wanted", "message"), [
    ("class", "distilled", r"the model has a distillation token, and the weights have none "
     r"\(dist_token\)\. Make the model with token_layout=class"),
    ("distilled", "class", r"the weights have a distillation token \(dist_token\), and the model "
     "has none. Make the model with token_layout=distilled"),
    ("class", "post", "norm_order=pre.*and the model has norm_order=post"),
    ("post", "class", "norm_order=post.*and the model has norm_order=pre"),
    ("class", "mean", r'pool=token \(norm\.\*\), and the model by pool=mean.*head="new"'),
    ("mean", "class", r"pool=mean \(fc_norm\.\*\), and the model by pool=token"),
])
def test_another_layout_is_one_error(kind, wanted, message):
    with pytest.raises(WeightsError, match=message) as caught:
        convert.from_torch(small_state(kind), make_small(wanted))
    assert "missing" not in str(caught.value)


def test_no_class_token():
    state = {k: v for k, v in small_state("class").items() if k != "cls_token"}
    with pytest.raises(WeightsError, match=r"weights have no class token \(cls_token\)"):
        convert.from_torch(state, make_small())
    with pytest.raises(WeightsError, match="cls_token is missing; expected 3 axes"):
        convert.infer_shape(state, 4)


def test_all_that_does_not_fit_is_listed():
    state = small_state("class")
    del state["blocks.1.attn.proj.bias"]
    state |= {"conv1x1.0.weight": np.zeros(3), "norm.bias": np.zeros(5)}
    with pytest.raises(WeightsError, match="3 keys") as caught:
        convert.from_torch(state, make_small())
    for words in ("missing: blocks.1.attn.proj.bias (32,)", "unused: conv1x1.0.weight (3,)",
                  "mis-shaped: norm.bias is (5,), expected (32,)"):
        assert words in str(caught.value)
    with pytest.raises(WeightsError, match=r"no key is blocks\.0\.attn\.qkv"):
        convert.from_torch({"x": np.zeros(3)}, make_small())


def test_a_masked_autoencoder(caplog):
    """The decoder is left out; for fine-tuning with a mean, so is the last norm."""
    state = {k: v for k, v in small_state("fixed").items() if not k.startswith("head")}
    around = {"mask_token": np.zeros((1, 1, 8)), "decoder_blocks.0.norm1.weight": np.zeros(8),
              "decoder_pred.weight": np.zeros((48, 8)), "decoder_pos_embed": np.zeros((1, 17, 8))}
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        encoder = convert.from_torch({"model": state | around}, make_small("fixed", 0))
    assert "left out 4 arrays of pretraining (decoder_blocks, decoder_pos_embed" in caplog.text
    for name, part in encoder["params"].items():
        jax.tree.map(np.testing.assert_array_equal, part, small_variables("fixed")["params"][name])
    fine = create_model("vit", 5, 16, patch_size=4, embed_dims=(32,), depths=(2,), num_heads=(4,),
                        pool="mean")
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        started = convert.from_torch(state, fine, "new")["params"]
    assert "left out the weights' last norm" in caplog.text
    assert started["fc_norm"]["scale"].tolist() == [1.0] * 32
    assert not started["fc_norm"]["bias"].any()
    assert not started["head"]["kernel"].any()
    np.testing.assert_array_equal(started["pos_embed"],
                                  small_variables("fixed")["params"]["pos_embed"])


def test_new_heads(caplog):
    model = make_small("distilled", 5)
    with pytest.raises(WeightsError, match=r'mis-shaped: head\.bias.*head="new"|head="new".*mis'):
        convert.from_torch(small_state("distilled"), model)
    started = convert.from_torch(small_state("distilled"), model, "new")["params"]
    assert not started["head"]["kernel"].any()
    assert not started["head_dist"]["kernel"].any()
    headless = convert.from_torch(small_state("distilled"), make_small("distilled", 0))["params"]
    assert not {"head", "head_dist"} & set(headless)


def trained(kind="distilled", **changes):
    model = make_small(kind, **changes)
    return weights.Trained(model, random_variables(model), tiny.CLASSES, (0.1, 0.2, 0.3),
                           (1.0, 2.0, 3.0), "center", 0.9)


@pytest.mark.torch
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_file_tells_its_heads(reference, ending, tmp_path, caplog):
    torch = pytest.importorskip("torch")
    path, own = tmp_path / f"w.{ending}", trained()
    assert weights.write_file(path, own) == len(small_state("distilled"))
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        opened = weights.open_trained(path, class_names=tiny.CLASSES)
    assert opened.model == own.model
    assert "no key tells" not in caplog.text
    jax.tree.map(np.testing.assert_array_equal, opened.variables, own.variables)
    if ending == "pth":  # the notes stand beside the tensors, which load as ever
        content = torch.load(path, weights_only=True)
        assert content["tinyvit_jax"] == {"num_heads": "4"}
        reference.make(own.model).load_state_dict(content["model"], strict=True)
    with caplog.at_level("WARNING", logger="tinyvit_jax"):
        weights.load_weights(path, make_small("distilled", num_heads=(2,)))
    assert "are of a model with 4 heads, and are used with 2" in caplog.text
    assert weights.open_trained(path, num_heads=(2,)).model.num_heads == (2,)


def test_heads_that_no_key_tells(tmp_path, caplog):
    wide = make_small(embed_dims=(128,), num_heads=(2,))
    state = convert.to_torch(random_variables(wide))
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        assert convert.infer_shape(state).num_heads == (2,)
    assert "taken to have 2 heads (one for each 64 channels), which no key tells" in caplog.text
    with pytest.raises(WeightsError, match=r"32 channels.*no multiple of 64.*model\.num_heads"):
        convert.infer_shape(small_state("class"))
    assert convert.infer_shape(small_state("post")).num_heads == (8,)
    files.write_state(tmp_path / "w.safetensors", state, {"num_heads": "many"})
    assert weights.open_trained(tmp_path / "w.safetensors").model.num_heads == (2,)


@pytest.mark.parametrize("kind", ["distilled", "post"])
def test_a_folder_of_ours(kind, tmp_path, caplog):
    own = trained(kind)
    weights.save_trained(own, tmp_path / "run")
    again = weights.open_trained(tmp_path / "run")
    assert again.model == own.model
    assert again[2:] == own[2:]
    jax.tree.map(np.testing.assert_array_equal, again.variables, own.variables)
    larger = weights.open_trained(tmp_path / "run", image_size=24)
    assert larger.model == own.model.copy(image_size=24)
    with pytest.raises(ValueError, match="image_size=26 cannot work: expected a multiple of"):
        weights.open_trained(tmp_path / "run", image_size=26)
    names = ("stripes", "new", "blobs")
    found = weights.load_weights(tmp_path / "run", make_small(kind), "new", names)["params"]
    for head in {"head", "head_dist"} & set(found):
        np.testing.assert_array_equal(found[head]["kernel"][:, [0, 2]],
                                      own.variables["params"][head]["kernel"][:, [2, 0]])
    with caplog.at_level("WARNING", logger="tinyvit_jax"):
        weights.load_weights(tmp_path / "run", make_small(kind, num_heads=(2,)))
    assert "with 4 heads, and are used with 2" in caplog.text
