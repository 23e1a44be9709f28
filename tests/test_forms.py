"""The choice between a layer's plain form and a CPU's."""

import jax
import jax.numpy as jnp

from tinyvit_jax.models import forms


def test_only_plain_forms_and_back(monkeypatch):
    assert forms.for_cpu()
    with forms.only_plain():
        assert not forms.for_cpu()
    assert forms.for_cpu()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not forms.for_cpu()


def test_what_jit_keeps_is_not_taken_for_a_plain_form():
    seen = []
    double = jax.jit(lambda x: (seen.append(forms.for_cpu()), 2 * x)[1])
    double(jnp.zeros(()))
    with forms.only_plain():
        jax.make_jaxpr(double)(jnp.zeros(()))
    double(jnp.zeros((1,)))
    assert seen == [True, False, True]
