"""What a model costs: parameters and multiply-adds, as the tables of papers give them."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tinyvit_jax.models import forms, layers

# TinyViT's table (5.4 M parameters and 1.3 G MACs to 21 M and 27.0 G) agrees in every digit with
# these two added to the multiply-adds proper: what the counter fvcore adds for a norm.
_NORMS = {layers.BatchNorm: 2, nn.LayerNorm: 5}


def count_parameters(model: nn.Module) -> int:
    """Numbers that a model learns, head included; BatchNorm's statistics are none of them."""
    return sum(x.size for x in jax.tree.leaves(model.variable_shapes()["params"]))


def count_macs(model: nn.Module, image_size: int = 0) -> int:
    """Multiply-adds of one image: convolutions, matrix products, and norms by fvcore's rule.

    They are read off the program of the layers' plain forms, so what a padded window computes
    counts. Activations, softmax and sums are left out.

    Args:
        model: from models.create_model.
        image_size: pixels of the square image; 0 = the model's own.
    """
    size = image_size or model.image_size
    norms = 0

    def add_norms(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal norms
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            norms += _NORMS.get(type(context.module), 0) * getattr(out, "size", 0)
        return out

    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = model.variable_shapes()
    with nn.intercept_methods(add_norms), forms.only_plain():
        traced = jax.make_jaxpr(partial(model.apply, train=False))(variables, image)
    return _count(traced.jaxpr) + norms


def _count(jaxpr: Any) -> int:
    """Multiply-adds in a jaxpr and what it calls."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        out = equation.outvars[0].aval
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += out.size * int(np.prod([left[axis] for axis in contracted]))
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            channels = equation.params["dimension_numbers"].rhs_spec[0]
            total += out.size * kernel.size // kernel.shape[channels]
        for inner in _inner(equation.params.values()):
            total += _count(inner)
    return total


def _inner(params: Iterable[Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params:
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
