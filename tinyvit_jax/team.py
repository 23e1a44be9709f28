"""The processes that jax.distributed joined, where they do more than the same compiled program."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


class TeamError(RuntimeError):
    """Another process of the team failed; the message says which."""


class Team:
    """Processes that go on together and stop together; one alone is a team too.

    One that failed by itself would leave the others waiting in a collective that it never enters.
    So what a process does of its own goes through `attempt`, which keeps an error, and `agree` lets
    all know of it before the next thing that needs all. In a process alone errors just rise.
    """

    def __init__(self) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        self.first = self.index == 0
        self._error: BaseException | None = None

    def attempt(self, work: Callable[[], T]) -> T | None:
        """Does work of this process's own; None where it failed, which the next `agree` raises."""
        if self.count == 1:
            return work()
        try:
            return work()
        except Exception as error:
            self._error = self._error or error
            return None

    def agree(self, value: int = 0) -> int:
        """Waits for all and gives the first one's value.

        Raises:
            TeamError: another process failed. In that one its own error rises.
        """
        error = self._error  # a signal that comes later than this waits for the next time
        if self.count == 1:
            if error is not None:  # a signal that rose where a library swallowed it
                raise error
            return value
        mine = np.array([error is not None, value], np.int32)
        failed, values = multihost_utils.process_allgather(mine).T
        if error is not None:
            raise error
        if failed.any():
            raise TeamError(f"Process {np.argmax(failed)} of {self.count} stopped, and this one "
                            f"with it: what that one printed says why. Run the same command again.")
        return int(values[0])

    def together(self, work: Callable[[], T]) -> T:
        """Does the same in every process, or in none."""
        done = self.attempt(work)
        self.agree()
        return cast(T, done)

    def in_turn(self, work: Callable[[], T]) -> T:
        """Does the same in every process, in the first one before the others."""
        if not self.first:
            self.agree()
        done = self.attempt(work)
        if self.first:
            self.agree()
        self.agree()
        return cast(T, done)

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Makes SIGTERM an exception, as Ctrl-C is one; of several processes all stop at `agree`.

        A second signal does not wait for the others.
        """
        def stop(number: int, _: object) -> None:
            again = self._error is not None
            self._error = KeyboardInterrupt() if number == signal.SIGINT else (
                SystemExit(128 + number))
            if self.count == 1 or again:
                raise self._error

        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
