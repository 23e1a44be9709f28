"""How much of a device's memory a training run needs, and what to do where that is too much."""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections

from tinyvit_jax.config import mixes


class OutOfMemory(RuntimeError):
    """A run that does not fit on its devices; the message says which settings would make it fit."""


class Memory(NamedTuple):
    """What a program holds on each device while it runs, in bytes: the compiler's own figures."""

    arguments: int
    outputs: int  # beyond those that take an argument's place
    temporaries: int
    program: int  # its instructions

    @property
    def peak(self) -> int:
        """All of it together."""
        return sum(self)


def measure_memory(compiled: jax.stages.Compiled) -> Memory:
    """The memory of a compiled program."""
    found: Any = compiled.memory_analysis()
    return Memory(found.argument_size_in_bytes,
                  found.output_size_in_bytes - found.alias_size_in_bytes,
                  found.temp_size_in_bytes, found.generated_code_size_in_bytes)


def count_bytes(shapes: Any) -> int:
    """The bytes of a tree of arrays, or of their shapes, on each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
               for x in jax.tree.leaves(shapes))


def find_limit() -> int | None:
    """The bytes that a program may use on each device, as far as the device tells."""
    found = [(d.memory_stats() or {}).get("bytes_limit") for d in jax.local_devices()]
    return min((limit for limit in found if limit), default=None)


def find_room() -> int:
    """The bytes for what both the host and every device hold: the memory of the one with less."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(host, find_limit() or host)


def describe(memory: Memory, ahead: int, limit: int | None) -> str:
    """The memory of a training step as one line.

    Args:
        memory: of its program.
        ahead: bytes of the batches that wait on each device for their turn.
        limit: from `find_limit`.
    """
    of = f" of {limit / 1e9:.1f}" if limit else ""
    return (f"peak memory {(memory.peak + ahead) / 1e9:.2f}{of} GB on each device: temporaries "
            f"{memory.temporaries / 1e9:.2f}, state and batch {memory.arguments / 1e9:.2f}, "
            f"batches ahead {ahead / 1e9:.2f} (by the compiler's figures)")


def check_fits(config: ml_collections.ConfigDict, memory: Memory, ahead: int, limit: int | None
               ) -> None:
    """Raises OutOfMemory where a training step does not fit on a device.

    Args:
        config: of the run.
        memory: of its program.
        ahead: bytes of the batches that wait on each device for their turn.
        limit: from `find_limit`.
    """
    if limit and memory.peak + ahead > limit:
        raise OutOfMemory(
            f"An update needs {(memory.peak + ahead) / 1e9:.1f} GB on each device by the "
            f"compiler's figures, and a device has {limit / 1e9:.1f} GB. "
            f"{_advise(config, _suggest_accumulate(config, memory, ahead, limit))}")


def _suggest_accumulate(config: ml_collections.ConfigDict, memory: Memory, ahead: int, limit: int
                        ) -> int | None:
    """The fewest micro-batches that fit if temporaries shrink in proportion; None = none do."""
    parts, rows = config.train.accumulate, config.train.batch_size // jax.device_count()
    fixed = memory.peak - memory.temporaries + ahead
    for more in range(parts + 1, rows + 1):
        even = rows % (more * (2 if mixes(config) else 1)) == 0
        if even and fixed + memory.temporaries * parts / more <= limit:
            return more
    return None


def _advise(config: ml_collections.ConfigDict, accumulate: int | None = None) -> str:
    """What makes an update smaller, as far as the config has not done it."""
    t, m = config.train, config.model
    views = t.batch_size // (t.accumulate * jax.device_count())
    parts = f"set --config.train.accumulate={accumulate}" if accumulate else (
        f"raise --config.train.accumulate above {t.accumulate}")
    ways = [f"{parts} (micro-batches of fewer than {views} views on each device)"]
    if config.data.resident:
        ways.insert(0, "set --config.data.resident=False (the images then stay with the host)")
    if not m.remat:
        ways.append("set --config.model.remat=True (recomputes activations: a third more work)")
    if m.dtype != "bfloat16":
        ways.append("set --config.model.dtype=bfloat16 (halves activations)")
    if config.objective.name == "live_teacher":
        ways += _advise_on_teacher(config.teacher)
    ways.append(f"lower --config.train.batch_size={t.batch_size}")
    return f"What helps: {'; '.join(ways)}."


def _advise_on_teacher(teacher: ml_collections.ConfigDict) -> list[str]:
    """What makes a live teacher smaller; a store would make it none."""
    ways = [f"lower --config.teacher.batch_size={teacher.batch_size} (views that the teacher takes "
            f"at once)"]
    if teacher.dtype != "bfloat16":
        ways.append("set --config.teacher.dtype=bfloat16")
    if jax.device_count() > 1 and not teacher.shard:
        ways.append("set --config.teacher.shard=True (cuts its weights over the devices)")
    return [*ways, "capture a store (--config.objective.name=stored_logits): then no teacher is "
            "needed in training"]


@contextlib.contextmanager
def explaining(config: ml_collections.ConfigDict) -> Iterator[None]:
    """Turns JAX's error of a device that ran out of memory into one that says what to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("RESOURCE_EXHAUSTED")[2].strip(": ").splitlines()
        raise OutOfMemory(
            f"A device ran out of memory: {' '.join(reason)[:200].rstrip('.')}. "
            f"{_advise(config)} In an evaluation: lower "
            f"--config.eval.batch_size={config.eval.batch_size}.") from error
