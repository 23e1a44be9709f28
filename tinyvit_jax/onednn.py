"""Matrix products on a CPU by oneDNN, the library that PyTorch uses: where a run asks for it.

XLA brings it on Linux and leaves it out unless told; on an Intel processor with AVX-512 an update
takes a sixth less time with it, a forward pass up to a tenth less (docs/performance.md). To XLA it
is an experiment, so nobody gets it who did not ask: programs with it are compiled anew at every
start, as XLA cannot write them to the compilation cache.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Of its ways of taking products this one: each alone, and not with what is added to it, where XLA
# of jax 0.10 ends the process over some shapes.
_OPTIONS: dict[str, Any] = {
    "xla_cpu_use_onednn": True,
    "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
_UNWRITTEN = r"Error writing persistent compilation cache entry.*onednn"

_told: dict[str, Any] = {}  # options of the programs from now on
# XLA ends the process when a program that uses oneDNN is forgotten while it runs: none ever is.
_kept: list[Any] = []


def turn_on(wanted: bool = True) -> bool:
    """From now on the programs that `jit` makes in this process use oneDNN, or do not.

    Args:
        wanted: False = they do not.

    Returns:
        Whether they do: it needs a CPU as JAX's device and an XLA that has it.
    """
    _told.clear()
    if wanted and _is_at_hand():
        _told.update(_OPTIONS)
        warnings.filterwarnings("ignore", _UNWRITTEN, UserWarning)
    return bool(_told)


def jit(function: Callable, **settings: Any) -> Any:
    """jax.jit, for a program that is no part of another one; with oneDNN where it is turned on."""
    if not _told:
        return jax.jit(function, **settings)
    program = jax.jit(function, compiler_options=dict(_told), **settings)
    _kept.append(program)
    return program


def _is_at_hand() -> bool:
    """Whether this XLA knows the options, and gives a product to oneDNN."""
    if jax.default_backend() != "cpu":
        return False
    x = jnp.zeros((64, 64))
    try:
        compiled = jax.jit(jnp.dot).lower(x, x).compile(compiler_options=_OPTIONS)
    except jax.errors.JaxRuntimeError:
        return False
    return "onednn" in (compiled.as_text() or "")
