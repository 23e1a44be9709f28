"""The pace of a training run: throughput, the wait for data, time left."""

import contextlib
import time
from collections.abc import Iterator

import jax

from tinyvit_jax import log

MOST_WAIT = 0.2  # share of the time that may go by waiting for data before something is said
_TELLING = 5.0  # seconds: what a shorter stretch says of the wait for data is chance


class Meter:
    """Averages metrics on the device and times the loop; reading it is the only host sync.

    Args:
        title: of the run, for what it says.
        batch_size: views in an update, over all processes.
        steps: updates in the run.
        seconds_before: of training, in earlier parts of a resumed run.
    """

    def __init__(self, title: str, batch_size: int, steps: int, seconds_before: float = 0.0):
        self.title, self.batch_size, self.steps = title, batch_size, steps
        self.before = seconds_before
        self.began = self.since = time.perf_counter()
        self.waited = 0.0
        self.pending: list[dict] = []
        self._counts: list[int] = []
        self._advised = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Times a wait for data, where it cost something: not while the devices were still at work.

        Where they ended meanwhile, all of the wait counts, though a part of it cost nothing.
        """
        began = time.perf_counter()
        yield
        if not self.pending or self.pending[-1]["loss"].is_ready():
            self.waited += time.perf_counter() - began

    def add(self, metrics: dict, updates: int = 1) -> None:
        """Keeps the metrics of an update, or the means of several, still on the device."""
        self.pending.append(metrics)
        self._counts.append(updates)

    def bound_queue(self, updates: int) -> None:
        """Waits until fewer than so many updates are left to do: each holds its batch in memory."""
        if len(self.pending) >= updates:
            jax.block_until_ready(self.pending[-updates]["loss"])

    def read(self, step: int) -> tuple[dict[str, float], float]:
        """The averages since the last reading, and the seconds left."""
        values = jax.device_get(self.pending)
        now = time.perf_counter()
        elapsed, count = max(now - self.since, 1e-9), sum(self._counts)
        line = {k: float(sum(n * v[k] for n, v in zip(self._counts, values, strict=True))) / count
                for k in values[0]}
        line |= {"skipped": float(values[-1]["skipped"]),
                 "learning_rate": float(values[-1]["learning_rate"]),
                 "images_per_second": count * self.batch_size / elapsed,
                 "data_wait": self.waited / elapsed, "seconds": self.seconds()}
        self._advise(line["data_wait"], elapsed)
        eta = (self.steps - step) * elapsed / count
        self.pending, self._counts, self.waited, self.since = [], [], 0.0, now
        return line, eta

    def _advise(self, wait: float, elapsed: float) -> None:
        """Says once what helps, where much of the time goes by waiting for data."""
        if wait > MOST_WAIT and elapsed >= _TELLING and not self._advised:
            self._advised = True
            log.logger.warning(
                "%s: %.0f %% of the time went by waiting for data (data_wait). If cores are idle, "
                "prepare batches in more of them: --config.data.workers=N for processes, "
                "--config.data.threads=N for threads in each. If none is, store the images smaller "
                "once: tools/pack_images.py --short_side=320.", self.title, 100 * wait)

    def forget_time(self) -> None:
        """Leaves what just happened (compiling, an evaluation) out of throughput and wait."""
        self.since, self.waited = time.perf_counter(), 0.0

    def seconds(self) -> float:
        """Seconds of training, earlier parts of a resumed run included."""
        return self.before + time.perf_counter() - self.began
