import jax
import pytest

from tinyvit_jax import models
from tinyvit_jax.models import cost


@pytest.mark.parametrize(("name", "parameters", "macs"), [
    ("tiny_vit_5m_224", 5.4, 1.3), ("tiny_vit_11m_224", 11.0, 2.0),
    ("tiny_vit_21m_224", 21.2, 4.3), ("tiny_vit_21m_384", 21.2, 13.8),
    ("tiny_vit_21m_512", 21.3, 27.0)])
def test_cost_is_that_of_the_papers_table(name, parameters, macs):
    """Table 1 and section 4.3 of the paper; parameters to the digit that it gives."""
    model = models.create_model(name)
    assert round(cost.count_parameters(model) / 1e6, 1) == parameters
    assert round(cost.count_macs(model) / 1e9, 1) == macs


def small(**changes):
    return models.create_model("tiny_vit", 10, 32, embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1),
                               num_heads=(1, 1, 2, 2), window_sizes=(4, 4, 2, 1), **changes)


def by_hand(size):
    """Multiply-adds of `small`, written out; norms 2 (BatchNorm) and 5 (LayerNorm) a number."""
    def conv(side, kernel_size, c_in, c_out):
        return side**2 * (kernel_size * c_in * c_out + 2 * c_out)

    def block(side, window, c):
        n = window**2
        padded = side + -side % window  # a map is filled up to whole windows
        tokens, windows = padded**2, (padded // window) ** 2
        attention = tokens * (5 * c + c * 3 * c + c * c) + windows * 2 * n * n * c
        return attention + conv(side, 9, 1, c) + side**2 * (5 * c + 8 * c * c)

    def down(side, c_in, c_out):
        return (conv(side, 1, c_in, c_out) + conv(side // 2, 9, 1, c_out)
                + conv(side // 2, 1, c_out, c_out))

    a, b, c, d = size // 4, size // 8, size // 16, size // 32
    stem = conv(size // 2, 9, 3, 4) + conv(a, 9, 4, 8)
    mbconv = conv(a, 1, 8, 32) + conv(a, 9, 1, 32) + conv(a, 1, 32, 8)
    return (stem + mbconv + down(a, 8, 8) + block(b, 4, 8) + down(b, 8, 16) + block(c, 2, 16)
            + down(c, 16, 16) + block(d, 1, 16) + 5 * 16 + 16 * 10)


@pytest.mark.parametrize("size", [32, 96])
def test_every_layer_counts(size):
    assert cost.count_macs(small(), size) == by_hand(size)


def test_the_backends_form_is_no_matter(monkeypatch):
    here = cost.count_macs(small())
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert cost.count_macs(small()) == here
    assert cost.count_macs(small(remat=True)) == here
