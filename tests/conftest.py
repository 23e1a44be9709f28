"""Set-up of the whole suite: tests run on the CPU and leave nothing outside of tmp_path."""

import importlib.metadata
import logging
import os
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# The programs here are tiny and run a few times: compiling them well costs more than it saves.
# Without its newer emitters XLA compiles an update in a third of the time; an XLA that does not
# know the flag would end the process.
_FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)

# Many tests compile the same programs, some in processes of their own: compile each once.
_CACHE = tempfile.TemporaryDirectory(prefix="tinyvit_jax_tests_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)  # xdist's workers share the first
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


@pytest.fixture
def given_to_onednn(monkeypatch):
    """The names of the functions that are compiled where oneDNN would take their products."""
    import jax

    from tinyvit_jax import onednn

    names = set()

    def jit(function, **settings):
        names.add(getattr(function, "func", function).__name__)  # of a partial: what it calls
        return jax.jit(function, **settings)

    monkeypatch.setattr(onednn, "jit", jit)
    return names


@pytest.fixture(autouse=True)
def _heard():
    """Lets caplog hear the package, whatever a test before did to its logger."""
    logger = logging.getLogger("tinyvit_jax")
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = True
    yield
    logger.setLevel(before[0])
    logger.propagate = before[1]
