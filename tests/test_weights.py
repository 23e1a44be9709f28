import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

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


def test_a_head_without_a_shared_name_starts_at_zero(trained, tmp_path):
    weights.save_trained(trained, tmp_path / "run")
    found = weights.load_weights(tmp_path / "run", make_model(), "new", ("a", "b", "c"))
    assert not found["params"]["head"]["kernel"].any()
    np.testing.assert_array_equal(found["params"]["norm_head"]["scale"],
                                  trained.variables["params"]["norm_head"]["scale"])


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
