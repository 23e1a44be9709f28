"""Which form of a layer runs: the backend's fastest, or the plain one to count operations in."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_only_plain = contextvars.ContextVar("only_plain", default=False)


def for_cpu() -> bool:
    """Whether the forms that are fastest on a CPU are to be used."""
    return jax.default_backend() == "cpu" and not _only_plain.get()


@contextlib.contextmanager
def only_plain() -> Iterator[None]:
    """What is traced in here has the plain forms, on every backend."""
    token = _only_plain.set(True)
    try:
        with jax.disable_jit():  # its cache knows nothing of forms
            yield
    finally:
        _only_plain.reset(token)
