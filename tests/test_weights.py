import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tinyvit_jax import config as configs
from tinyvit_jax import weights
from tinyvit_jax.convert import files, shape, tinyvit

SHAPE = {"embed_dims": (8, 8, 16, 24), "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 3),
         "window_sizes": (4, 4, 3, 2)}


def make_model(classes=3, **changes):
    return weights.models.create_model("tiny_vit", classes, 32, **{**SHAPE, **changes})


@pytest.fixture(scope="module")
def trained():
    model = make_model()
    shapes = model.variable_shapes()
    generator = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: generator.normal(size=s.shape).astype(np.float32), shapes)
    return weights.Trained(model, variables, tiny.CLASSES, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0),
                           "square", 0.9)


def test_a_saved_model_comes_back_whole(trained, tmp_path):
    weights.save_trained(trained, tmp_path / "run")
    again = weights.open_trained(tmp_path / "run")
    assert again.model.depths == SHAPE["depths"]
    assert (again.class_names, again.mean, again.std, again.crop, again.crop_ratio) == trained[2:]
    jax.tree.map(np.testing.assert_array_equal, again.variables, trained.variables)
    with pytest.raises(weights.WeightsError, match="already holds checkpoints"):
        weights.save_trained(trained, tmp_path / "run")


@pytest.mark.parametrize("layout", ["microsoft", "timm"])
def test_a_file_alone_tells_its_shape(trained, tmp_path, layout):
    path = tmp_path / "w.safetensors"
    files.write_state(path, tinyvit.to_torch(trained.variables, layout))
    found = shape.infer_shape(files.read_state(path))
    assert found.num_classes == 3
    assert found.embed_dims == SHAPE["embed_dims"]
    assert found.depths == SHAPE["depths"]
    assert found.num_heads[1:] == SHAPE["num_heads"][1:]
    assert found.window_sizes[1:] == SHAPE["window_sizes"][1:]
    again = weights.open_trained(path, image_size=32, class_names=tiny.CLASSES)
    jax.tree.map(np.testing.assert_array_equal, again.variables, trained.variables)
    with pytest.raises(weights.WeightsError, match="3 classes, and 2 names"):
        weights.open_trained(path, class_names=("a", "b"))


def test_a_stage_without_blocks_is_named(trained):
    state = tinyvit.to_torch(trained.variables)
    cut = {k: v for k, v in state.items() if not k.startswith("layers.2.blocks")}
    with pytest.raises(weights.WeightsError, match="1, 2, 0, 1 blocks"):
        shape.infer_shape(cut)


def test_another_model_is_refused_with_every_array(trained, tmp_path):
    weights.save_trained(trained, tmp_path / "run")
    with pytest.raises(weights.WeightsError, match=r"run are of another model: .*layers\.2\."):
        weights.load_weights(tmp_path / "run", make_model(embed_dims=(8, 8, 32, 24)))


def test_a_run_serves_other_windows(trained, tmp_path):
    weights.save_trained(trained, tmp_path / "run")
    found = weights.load_weights(tmp_path / "run", make_model(window_sizes=(4, 6, 5, 3)))
    tables = [found["params"][f"layers_{s}"]["blocks_0"]["attn"]["attention_biases"].shape
              for s in (1, 2, 3)]
    assert tables == [(1, 36), (2, 25), (3, 9)]


def test_a_new_head_goes_by_class_names(trained, tmp_path, caplog):
    weights.save_trained(trained, tmp_path / "run")
    with pytest.raises(weights.WeightsError, match=r"head\.bias is \(3,\), expected \(5,\)"):
        weights.load_weights(tmp_path / "run", make_model(classes=5))
    names = ("stripes", "new", "blobs", "other", "checks")
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        found = weights.load_weights(tmp_path / "run", make_model(classes=5), "new", names)
    own, old = found["params"]["head"]["kernel"], trained.variables["params"]["head"]["kernel"]
    np.testing.assert_array_equal(own[:, [2, 4, 0]], old)
    np.testing.assert_allclose(own[:, 1], old.mean(-1), rtol=1e-6)
    np.testing.assert_array_equal(own[:, 1], own[:, 3])
    assert "3 of 5 classes by name" in caplog.text


def test_a_head_without_a_shared_name_starts_at_zero(trained, tmp_path, caplog):
    weights.save_trained(trained, tmp_path / "run")
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        found = weights.load_weights(tmp_path / "run", make_model(), "new", ("a", "b", "c"))
    assert "0 of 3 classes by name; 3 were not trained (a, b, c), so it starts at" in caplog.text
    assert not found["params"]["head"]["kernel"].any()
    np.testing.assert_array_equal(found["params"]["norm_head"]["scale"],
                                  trained.variables["params"]["norm_head"]["scale"])


@pytest.mark.parametrize("layout", ["microsoft", "timm"])
def test_a_files_head_goes_by_the_names_given_with_it(trained, tmp_path, caplog, layout):
    """And its bias tables by the windows: one logged line for each."""
    path = tmp_path / "w.safetensors"
    files.write_state(path, tinyvit.to_torch(trained.variables, layout))
    wanted = ("new", "stripes", "blobs", "other")
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        found = weights.load_weights(path, make_model(4, window_sizes=(4, 6, 3, 2)), "new", wanted,
                                     trained_names=tiny.CLASSES)
    assert [record.getMessage() for record in caplog.records] == [
        "resized 2 tables of attention biases to windows of 6, 3, 2 tokens (bicubic)",
        "The classifier has 2 of 4 classes by name; 2 were not trained (new, other) and take the "
        "others' mean."]
    old = trained.variables["params"]["head"]
    for leaf, rows in found["params"]["head"].items():
        np.testing.assert_array_equal(rows[..., [1, 2]], old[leaf][..., [2, 0]])
        np.testing.assert_allclose(rows[..., 0], old[leaf][..., [0, 2]].mean(-1), rtol=1e-5)
        np.testing.assert_array_equal(rows[..., 0], rows[..., 3])


def test_a_files_head_without_names_says_how_to_give_them(trained, tmp_path, caplog):
    path = tmp_path / "w.safetensors"
    files.write_state(path, tinyvit.to_torch(trained.variables))
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        found = weights.load_weights(path, make_model(5), "new", tuple("abcde"))
    assert not found["params"]["head"]["kernel"].any()
    assert len(caplog.records) == 1
    assert "had 3" in caplog.text
    assert "--config.model.class_names=FILE" in caplog.text
    with pytest.raises(weights.WeightsError, match=r"holds 2 names \(x, y \.\.\.\).*has 3 classes"):
        weights.load_weights(path, make_model(5), "new", tuple("abcde"), trained_names=("x", "y"))
    with pytest.raises(weights.WeightsError, match=r"class_names holds 1 names.*has 5 classes"):
        weights.load_weights(path, make_model(5), "new", ("a",), trained_names=tiny.CLASSES)


def test_the_hash_is_of_the_numbers(trained):
    first = weights.hash_weights(trained.variables)
    assert first == weights.hash_weights(jax.tree.map(jnp.asarray, trained.variables))
    changed = jax.tree.map(np.copy, trained.variables)
    changed["params"]["head"]["bias"][0] += 1e-6
    assert weights.hash_weights(changed) != first


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_run(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(weights.WeightsError, match=f"{name}.*(does not exist|is not the workdir)"):
        weights.open_trained(tmp_path / name)


def test_another_size_keeps_the_windows_share(trained, tmp_path):
    """From a run and from a file: the same tables, which are torch's resize of the trained ones."""
    weights.save_trained(trained, tmp_path / "run")
    resized = weights.load_run(tmp_path / "run", image_size=64)
    assert resized.model.image_size == 64
    assert resized.model.window_sizes == (8, 8, 6, 4)
    expected = weights.load_weights(tmp_path / "run", make_model(window_sizes=(8, 8, 6, 4)))
    jax.tree.map(np.testing.assert_array_equal, resized.variables, expected)
    assert weights.resize(resized, 0) is weights.resize(resized, 64) is resized


@pytest.mark.parametrize(("name", "size"), [("tiny_vit_5m_224", 224), ("tiny_vit_21m_384", 384),
                                            ("tiny_vit_21m_512", 512),
                                            ("tiny_vit_5m_32", 32), ("tiny_vit_5m_96", 96),
                                            ("tiny_vit_1m_32", 32)])
def test_a_variants_size_is_known_by_its_shape(name, size):
    model = weights.models.create_model(name, 7)
    assert weights.models.find_image_size(model) == size


@pytest.mark.parametrize(("name", "size", "asked", "windows"), [
    ("tiny_vit_5m_224", 224, 384, (12, 24, 12)), ("tiny_vit_21m_384", 384, 0, (12, 24, 12)),
    ("tiny_vit_21m_384", 384, 512, (16, 32, 16)), ("tiny_vit_21m_224", 224, 128, (4, 8, 4)),
    ("tiny_vit_5m_32", 32, 0, (8, 8, 4)), ("tiny_vit_5m_32", 32, 64, (16, 16, 8)),
    ("tiny_vit_5m_96", 96, 0, (8, 12, 6)), ("tiny_vit_1m_32", 32, 0, (8, 4, 2))])
@pytest.mark.parametrize("layout", ["microsoft", "timm"])
def test_a_file_of_a_variant_knows_its_size(name, size, asked, windows, layout, tmp_path,
                                            monkeypatch):
    model = weights.models.create_model(name, 7)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), model.variable_shapes())
    monkeypatch.setattr(files, "read_described",
                        lambda path: (tinyvit.to_torch(zeros, layout), {}))
    (tmp_path / "it.pth").touch()
    found = weights.open_trained(tmp_path / "it.pth", asked)
    assert found.model.image_size == (asked or size)
    assert found.model.window_sizes[1:] == windows
    assert found.model.stem_strides == model.stem_strides
    table = found.variables["params"]["layers_2"]["blocks_0"]["attn"]["attention_biases"]
    assert table.shape[1] == windows[1] ** 2


def test_normalisation_goes_with_the_weights(trained, tmp_path):
    weights.save_trained(trained, tmp_path / "run")
    assert weights.find_normalisation(tmp_path / "run") == (trained.mean, trained.std)
    files.write_state(tmp_path / "w.safetensors", tinyvit.to_torch(trained.variables))
    assert weights.find_normalisation(tmp_path / "w.safetensors") == (
        weights.IMAGENET_MEAN, weights.IMAGENET_STD)


def test_a_head_of_as_many_unnamed_classes_is_kept(trained, tmp_path, caplog):
    """From a file and from a workdir that was converted without names alike."""
    files.write_state(tmp_path / "w.safetensors", tinyvit.to_torch(trained.variables))
    weights.save_trained(trained._replace(class_names=("class 0", "class 1", "class 2")),
                         tmp_path / "run")
    for path in (tmp_path / "w.safetensors", tmp_path / "run"):
        caplog.clear()
        with caplog.at_level("INFO"):
            found = weights.load_weights(path, make_model(), "new", ("x", "y", "z"))
        np.testing.assert_array_equal(found["params"]["head"]["kernel"],
                                      trained.variables["params"]["head"]["kernel"])
        assert "The classifier is kept: the weights name none of their 3 classes" in caplog.text
        named = weights.load_weights(path, make_model(), "new", ("z", "x", "y"),
                                     trained_names=("x", "y", "z"))
        np.testing.assert_array_equal(named["params"]["head"]["bias"],
                                      trained.variables["params"]["head"]["bias"][[2, 0, 1]])


def test_other_shapes_tell_no_size(trained):
    assert weights.models.find_image_size(trained.model) == 0
    small = weights.models.create_model("tiny_vit_5m_224", 7, 64, stem_strides=(1, 1),
                                        window_sizes=(7, 7, 14, 7))
    assert weights.models.find_image_size(small) == 0


def test_a_section_without_a_name_takes_the_weights_shape(trained, tmp_path):
    weights.save_trained(trained, tmp_path / "run")
    section = configs.default().model
    section.update({"name": "", "init_from": str(tmp_path / "run"), "image_size": 64})
    whole = weights.complete(section)
    assert (whole.name, whole.image_size, whole.num_classes) == ("tiny_vit", 64, 0)
    assert {key: whole[key] for key in SHAPE} == SHAPE | {"window_sizes": (8, 8, 6, 4)}
    section.window_sizes = (5, 5, 5, 5)
    assert weights.complete(section).window_sizes == (5, 5, 5, 5)
    assert weights.make_model(section, 9).num_classes == 9
    assert section.name == ""
    named = configs.default().model
    assert weights.complete(named) is named
    section.init_from = ""
    with pytest.raises(weights.WeightsError, match=r"--config\.model\.init_from=''"):
        weights.complete(section)
