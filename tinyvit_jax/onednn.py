"""Matrix products by oneDNN, the library that PyTorch uses, on the CPUs where it is faster.

XLA brings it on Linux and leaves it out unless told; on Intel's processors with AVX-512 a forward
pass takes a tenth less time with it, and an update an eighth (docs/performance.md). XLA cannot keep
programs with it in its compilation cache: models that are evaluated, asked as teachers and measured
are compiled in seconds and always use it; updates, which take longer, where `train.onednn` says so.
XLA_FLAGS that speak of oneDNN are left to decide.
"""

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# Of its ways of taking products this one: alone, and not with what is added to them, where XLA of
# jax 0.10 ends the process over shapes that oneDNN does not take.
_OPTIONS: dict[str, Any] = {
    "xla_cpu_use_onednn": True,
    "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
_CPU_INFO = Path("/proc/cpuinfo")
_MEASURED = ("GenuineIntel", "avx512f")


def jit(function: Callable, use: bool = True, **settings: Any) -> Any:
    """jax.jit with products by oneDNN; for outermost programs only, as jax.jit has it.

    Args:
        function: to compile.
        use: False = it is jax.jit.
        settings: of jax.jit.
    """
    options = dict(find_options()) if use else None
    return jax.jit(function, compiler_options=options, **settings)


@functools.cache
def find_options() -> tuple[tuple[str, Any], ...]:
    """What to tell XLA's compiler, as pairs: nothing where it has no oneDNN or is as fast."""
    warnings.filterwarnings(
        "ignore", r"Error writing persistent compilation cache entry.*onednn", UserWarning)
    if (jax.default_backend() != "cpu" or "onednn" in os.environ.get("XLA_FLAGS", "")
            or not is_measured(_CPU_INFO) or not _is_at_hand()):
        return ()
    return tuple(_OPTIONS.items())


def is_measured(path: Path) -> bool:
    """Whether the processor is of the kind that oneDNN was found to be faster on.

    Args:
        path: of Linux's description of the processors; there need not be one.
    """
    try:
        words = path.read_text(encoding="utf-8").split()
    except OSError:
        return False
    return all(word in words for word in _MEASURED)


def _is_at_hand() -> bool:
    """Whether this XLA knows the options, and gives a product to oneDNN."""
    x = jnp.zeros((64, 64))
    try:
        compiled = jax.jit(jnp.dot).lower(x, x).compile(compiler_options=_OPTIONS)
    except jax.errors.JaxRuntimeError:
        return False
    return "onednn" in (compiled.as_text() or "")
