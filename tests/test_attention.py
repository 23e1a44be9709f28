"""Attention in its two forms: the same values, and the same gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvit_jax.models import attention

ATOL = 2e-5


def make_inputs(B=2, h=3, N=5, d=4, biased=True, scale=1.0):
    """Queries, keys, values and a bias, and a gradient of the result before heads are joined."""
    draw = np.random.default_rng(0).standard_normal
    q, k, v, grad = (np.float32(draw((B, h, N, d)) * scale) for _ in range(4))
    return (q, k, v, np.float32(draw((h, N, N))) if biased else None), grad


def run(form, arguments, grad):
    """The result, and the gradients of q, k, v and, where there is one, of the bias."""
    out, pull = jax.vjp(form, *arguments)
    return [out, *(part for part in pull(grad) if part is not None)]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("B", "h", "N", "d"), [(2, 3, 5, 4), (1, 1, 1, 2), (17, 2, 49, 32)])
def test_by_hand_equals_reference(B, h, N, d, biased):
    arguments, grad = make_inputs(B, h, N, d, biased)
    forms = [jax.jit(functools.partial(run, form))
             for form in (attention.attend_reference, attention.attend_by_hand)]
    expected, ours = (form(arguments, grad) for form in forms)
    assert len(ours) == len(expected) == 4 + biased
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=ATOL)
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (arguments[:3], grad))
    for a, b in zip(forms[1]((*half[0], arguments[3]), half[1]), expected, strict=True):
        assert a.dtype == (jnp.float32 if a.shape == (h, N, N) else jnp.bfloat16)
        np.testing.assert_allclose(np.float32(a), b, atol=0.03 * np.abs(b).max() + ATOL)


def test_by_hand_equals_float64():
    (q, k, v, bias), grad = make_inputs(N=7)
    wide = [np.float64(a) for a in (q, k, v, bias, grad)]

    def loss(q, k, v, bias):
        scores = np.einsum("bhnd,bhmd->bhnm", q, k) / np.sqrt(q.shape[-1]) + bias
        weights = np.exp(scores)
        weights /= weights.sum(-1, keepdims=True)
        return (np.einsum("bhnm,bhmd->bhnd", weights, v) * wide[4]).sum()

    _, *grads = run(attention.attend_by_hand, (q, k, v, bias), grad)
    for i, found in enumerate(grads):
        for at in ((0,) * found.ndim, tuple(n - 1 for n in found.shape)):
            values = []
            for step in (1e-5, -1e-5):
                moved = [a.copy() for a in wide[:4]]
                moved[i][at] += step
                values.append(loss(*moved))
            np.testing.assert_allclose(found[at], (values[0] - values[1]) / 2e-5, atol=1e-5)


def test_values_far_from_zero_cost_bfloat16_no_more_than_in_the_reference():
    """Both parts of the scores' gradients must read the same rounded gradient of the result."""
    (q, k, v, bias), grad = make_inputs(B=4, N=49, d=32)
    arguments = q, k, v + 30, bias
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (*arguments[:3], grad))
    exact = run(attention.attend_reference, arguments, grad)
    plain, ours = (run(form, (*half[:3], bias), half[3])
                   for form in (attention.attend_reference, attention.attend_by_hand))
    for i in (1, 2, 4):  # of q, k and the bias
        wrong, allowed = (np.abs(np.float32(a[i]) - exact[i]).mean() for a in (ours, plain))
        assert wrong < allowed


def test_large_scores_stay_finite():
    arguments, grad = make_inputs(scale=100.0)
    for part in run(attention.attend_by_hand, arguments, grad):
        assert np.isfinite(part).all()


@pytest.mark.parametrize(("backend", "drop", "form"), [
    ("cpu", None, "attend_by_hand"), ("cpu", lambda weights: weights, "attend_reference"),
    ("gpu", None, "attend_reference"), ("tpu", None, "attend_reference")])
def test_form_follows_backend_and_dropout(monkeypatch, backend, drop, form):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    arguments, _ = make_inputs()
    expected = attention.attend(*arguments, drop)
    assert expected.shape == (2, 5, 3 * 4)
    monkeypatch.setattr(attention, form, lambda q, k, v, *_: jnp.zeros_like(v))
    assert not attention.attend(*arguments, drop).any()


def test_what_is_dropped_is_not_read():
    (q, k, v, bias), _ = make_inputs()
    out = attention.attend(q, k, v, bias, lambda weights: weights.at[..., 0].set(0))
    np.testing.assert_allclose(
        out, attention.attend(q, k, np.concatenate([v[:, :, :1] * 0, v[:, :, 1:]], 2), bias),
        atol=ATOL)
