"""A model whose weights stay as they are, as one function of its images."""

from collections.abc import Callable
from typing import Any

import jax

from tinyvit_jax import onednn


def compile_inference(model: Any, variables: dict) -> Callable[[jax.Array], jax.Array]:
    """`jax.jit(model.apply)` with the weights built into the program.

    XLA then computes once, when it compiles, what hangs on weights alone (attention biases of each
    pair of tokens, factors of BatchNorm), and a call hands over one array and not some hundreds.
    That is for few images at a time on a CPU (docs/performance.md). Every program holds a copy of
    the weights, and so does its entry in the compilation cache, where there is one.

    Args:
        model: from `create_model`.
        variables: from `load_weights`.

    Returns:
        fn(images [B, H, W, 3], normalised) -> float32 logits [B, classes]. It compiles at the
        first call with a shape, and again for each other one.
    """
    # As plain arrays: a training loop may donate the memory of JAX's own.
    weights = jax.device_get(variables)

    def infer(images: jax.Array) -> jax.Array:
        return model.apply(weights, images, train=False)

    return onednn.jit(infer)
