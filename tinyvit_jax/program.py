"""A compiled program of a run: built ahead of time, its memory known before it runs.

JAX compiles a function when it is first called, and again whenever a shape changes. A `Program` is
compiled in the background from shapes alone, while weights are loaded and batches prepared, and
tells of every time that it is compiled again.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import jax
import jax.monitoring

from tinyvit_jax import log
from tinyvit_jax.memory import Memory, measure_memory


@contextlib.contextmanager
def compiling() -> Iterator[Executor]:
    """A thread that compiles one program after another; an error does not wait for it."""
    compiler = ThreadPoolExecutor(1, "compile")
    try:
        yield compiler
    finally:
        compiler.shutdown(wait=False, cancel_futures=True)


class Program:
    """A jitted function, compiled in the background for arguments of given shapes.

    Args:
        function: from `jax.jit`; calling it later with such arguments finds what was compiled.
        shapes: of its arguments: trees of jax.ShapeDtypeStruct with shardings.
        compiler: runs the compilation; one thread keeps programs in their order.
        title: what the program is, for messages.
    """

    def __init__(self, function: Any, shapes: Sequence[Any], compiler: Executor, title: str):
        self.function, self.shapes, self.title = function, shapes, title
        self.recompiled = 0
        count_compilations()  # from now on
        self._compiled = compiler.submit(self._compile)

    def _compile(self) -> tuple[Memory, float]:
        began = time.perf_counter()
        memory = measure_memory(self.function.lower(*self.shapes).compile())
        return memory, time.perf_counter() - began

    def wait(self) -> tuple[Memory, float]:
        """Waits until it is compiled: its memory, and the seconds that compiling took."""
        return self._compiled.result()

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function; says so where that compiled it again."""
        before, began = count_compilations(), time.perf_counter()
        result = self.function(*arguments)
        if count_compilations() > before:
            self.recompiled += 1
            log.logger.warning("%s: compiled again, %.1f s: %s", self.title,
                               time.perf_counter() - began, _compare(self.shapes, arguments))
        return result


def run_once(function: Any, *arguments: Any) -> Any:
    """Compiles a function as fast as that goes, not for speed, and calls it.

    On a CPU optimising a program takes several times as long as to run it once without.
    """
    lowered = jax.jit(function).lower(*arguments)
    if jax.default_backend() != "cpu":
        return lowered.compile()(*arguments)
    try:
        compiled = lowered.compile(compiler_options=_UNOPTIMISED | _OLD_EMITTERS)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        compiled = lowered.compile(compiler_options=_UNOPTIMISED)  # jax 0.12 offers no choice
    return compiled(*arguments)


def _compare(expected: Any, found: Any) -> str:
    """Which arrays differ in shape, type or place from what was expected."""
    def describe(tree: Any) -> dict[str, str]:
        arrays = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(path[1:], simple=True, separator="/"):
                f"{x.dtype}{list(x.shape)} {x.sharding}" for path, x in arrays}

    before, now = describe(tuple(expected)), describe(tuple(found))
    differing = [f"{k} was {before.get(k)}, is {now.get(k)}" for k in now
                 if now[k] != before.get(k)]
    return "; ".join(differing[:4]) or "no array has another shape"


_UNOPTIMISED: dict[str, Any] = {"xla_backend_optimization_level": 0}
_OLD_EMITTERS: dict[str, Any] = {"xla_cpu_use_fusion_emitters": False}  # compile in half the time
_built: dict[int, int] = {}  # thread -> programs built there


@functools.cache
def _listen() -> None:
    """Makes JAX tell of every program that it builds; once, as it never forgets a listener."""
    def hear(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            here = threading.get_ident()
            _built[here] = _built.get(here, 0) + 1

    jax.monitoring.register_event_duration_secs_listener(hear)


def count_compilations() -> int:
    """Programs that this thread has built, compiled or read from the cache, since first asked."""
    _listen()
    return _built.get(threading.get_ident(), 0)


def describe_arrays(arrays: Any, sharding: Any) -> Any:
    """The shapes of a tree of arrays (or of their shapes), to be placed by a sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)
