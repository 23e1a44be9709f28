"""The choice between a layer's plain form and a CPU's."""

import jax
import jax.numpy as jnp
import pytest

from tinyvit_jax.models import forms


def test_only_plain_forms_and_back(monkeypatch):
    assert forms.for_cpu()
    with forms.only_plain():
        assert not forms.for_cpu()
    assert forms.for_cpu()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not forms.for_cpu()


def test_what_jit_keeps_is_not_taken_for_another_form():
    seen = []
    double = jax.jit(lambda x: (seen.append(forms.for_cpu()), 2 * x)[1])
    before, fresh = jnp.zeros(()), jnp.zeros(1)
    double(before)
    with forms.only_plain():
        jax.make_jaxpr(double)(before)
        jax.make_jaxpr(double)(fresh)
    double(fresh)
    assert seen == [True, False, False, True]


def test_an_error_ends_it():
    with pytest.raises(ValueError), forms.only_plain():
        raise ValueError
    assert forms.for_cpu()
