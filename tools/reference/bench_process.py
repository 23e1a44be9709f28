"""Contenders of a race in processes of their own, so that none works in what another left behind.

What two frameworks leave in one heap changes how fast either allocates, and threads of the one that
rests may still spin beside the one that runs. A process that waits does neither.
"""

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from reference.bench_timing import speed

Turn = Callable[[], int]


class Contender:
    """A turn that another process takes when it is told to; made by `start`."""

    def __init__(self, name: str, connection: Connection) -> None:
        self._name = name
        self._connection = connection

    def wait(self) -> float:
        """Waits until it can take turns; returns the seconds of compiling that it reports."""
        return self._receive()

    def speed(self) -> tuple[float, float]:
        """Takes a turn; returns what `bench_timing.speed` measured there."""
        self._connection.send(True)
        return self._receive()

    def _receive(self) -> Any:
        try:
            done, value = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"the process of the contender '{self._name}' ended before its "
                               f"turn: memory may have run out") from None
        if not done:
            raise RuntimeError(f"the contender '{self._name}' failed:\n{value}")
        return value


@contextlib.contextmanager
def start(name: str, make: Callable[..., tuple[Turn, float]], *args: Any) -> Iterator[Contender]:
    """Runs a contender in a fresh process, which ends with the block.

    Args:
        name: for messages.
        make: a function of a module, called in the process with `args`; returns the turn, which
            counts what it did, and the seconds that compiling took.
        args: what pickle can carry.
    """
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(there, make, args), daemon=True)
    process.start()
    there.close()
    try:
        yield Contender(name, here)
    finally:
        here.close()
        process.join(timeout=5)
        process.kill()
        process.join()


def _serve(connection: Connection, make: Callable[..., tuple[Turn, float]], args: tuple[Any, ...]
           ) -> None:
    """The process: makes its turn, then takes one for each message, until there is no other end."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            turn, first = make(*args)
            connection.send((True, first))
            while connection.recv():
                connection.send((True, speed(turn)))
        except (EOFError, BrokenPipeError):
            raise
        except Exception:
            connection.send((False, traceback.format_exc()))
