import functools

import jax
import numpy as np
import pytest

import tinyvit_jax
from tinyvit_jax import inference, models


@pytest.fixture(scope="module")
def model_and_variables():
    model = models.create_model("tiny_vit", 5, 32, embed_dims=(8, 8, 12, 16), depths=(1, 1, 1, 1),
                                num_heads=(1, 1, 2, 2), window_sizes=(4, 4, 2, 1))
    images = np.zeros((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    generator = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda x: np.abs(generator.normal(size=x.shape, scale=0.3)).astype(np.float32), shapes)


def draw(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 32, 32, 3)).astype(np.float32)


def test_it_is_the_model_for_every_number_of_images(model_and_variables):
    model, variables = model_and_variables
    infer = tinyvit_jax.compile_inference(model, variables)
    apply = jax.jit(functools.partial(model.apply, train=False))
    for count in (1, 3):
        logits = infer(draw(count))
        expected = np.asarray(apply(variables, draw(count)))
        assert logits.shape == (count, 5)
        assert logits.dtype == np.float32
        assert expected.std() > 0
        np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_the_weights_are_in_the_program_and_stay_what_they_were(model_and_variables):
    model, variables = model_and_variables
    on_device = jax.tree.map(jax.numpy.array, variables)
    infer = inference.compile_inference(model, on_device)
    memory = infer.lower(draw(2)).compile().memory_analysis()
    assert memory.argument_size_in_bytes == draw(2).nbytes
    before = np.asarray(infer(draw(2)))
    jax.tree.map(lambda x: x.delete(), on_device)  # as a training loop does that donates them
    np.testing.assert_array_equal(infer(draw(2)), before)
    alone = inference.compile_inference(model, variables)  # and of a shape that is compiled now
    np.testing.assert_array_equal(infer(draw(4)), alone(draw(4)))
    other = jax.tree.map(lambda x: x * 0.5, variables)
    assert np.abs(inference.compile_inference(model, other)(draw(2)) - before).max() > 0


def test_it_takes_onednn_where_it_is_on(model_and_variables, given_to_onednn):
    inference.compile_inference(*model_and_variables)
    assert given_to_onednn == {"infer"}
