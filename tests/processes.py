"""Real processes of the project for tests: started, watched, killed with SIGKILL, and read."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# A teacher of a user's own: how red, green and blue an image is. The store's manifest holds the
# hash of this file, so what differs between two captures comes by the environment. A slow disk is
# played by sleeping around what makes files durable: a kill then lands there as often as elsewhere.
TEACHER = """
import os
import time


def slowed(function):
    def call(*arguments, **options):
        time.sleep(float(os.environ["DISK_SECONDS"]))
        return function(*arguments, **options)
    return call


if "DISK_SECONDS" in os.environ:
    os.fsync, os.replace, os.unlink = map(slowed, (os.fsync, os.replace, os.unlink))


def bright(images):
    time.sleep(float(os.environ.get("TEACHER_SECONDS", 0)))
    return images.reshape(len(images), -1, 3).mean(1) / 10
"""


class Running(NamedTuple):
    """A process and the file that takes all it says."""

    process: subprocess.Popen
    log: Path
    since: float

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self.since


def write_teacher(folder: Path) -> str:
    """Writes the teacher's module; the name for --config.teacher.name, `folder` on PYTHONPATH."""
    (folder / "own_teacher.py").write_text(TEACHER)
    return "own_teacher:bright"


def free_port() -> int:
    """A port of this machine that nobody listened on just now."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(words: Sequence[object], log: Path, path: Path | None = None, **environment: object
          ) -> Running:
    """Starts this python in the root of the repository.

    Args:
        words: what follows `python` on the command line.
        log: file that stdout and stderr are appended to.
        path: folder of a user's modules for PYTHONPATH, beside the repository and its tests.
        environment: variables beside those of this process.

    Returns:
        The process, in a group of its own.
    """
    places = ":".join(str(p) for p in (path, ROOT, ROOT / "tests") if p is not None)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": places, **{k: str(v) for k, v in environment.items()}})
    return Running(process, log, time.perf_counter())


def copy_cache(folder: Path) -> dict[str, str]:
    """A compilation cache for processes that are to be killed, as `start` takes its environment.

    JAX writes an entry in place: a kill can leave half of one, which costs later readers a warning
    and the compilation. The suite's own cache must not get such entries.
    """
    if not folder.exists():
        shutil.copytree(os.environ["JAX_COMPILATION_CACHE_DIR"], folder)
    return {"JAX_COMPILATION_CACHE_DIR": str(folder)}


def kill(running: Running) -> None:
    """SIGKILL to a process and all that it started; returns when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()


def kill_when(running: Running, moment: Callable[[float], bool], seconds: float = 600) -> bool:
    """Kills a process at its moment.

    Args:
        running: the process.
        moment: fn(age in seconds) -> whether it is time; asked about every millisecond.
        seconds: age at which the wait is given up as an error.

    Returns:
        Whether it was killed; False: it ended by itself before.
    """
    try:
        while running.process.poll() is None and not moment(running.age):
            if running.age > seconds:
                raise TimeoutError(f"its moment did not come:\n{tail(running)}")
            time.sleep(0.001)
    finally:
        kill(running)
    return running.process.returncode == -signal.SIGKILL


def finish(*processes: Running, seconds: float = 600) -> list[str]:
    """Waits for processes that must succeed, and gives what each one's log holds.

    Where one fails, or all take longer than `seconds`, the others are killed.
    """
    end = time.perf_counter() + seconds
    try:
        while any(r.process.poll() is None for r in processes):
            if time.perf_counter() > end or any(r.process.poll() for r in processes):
                break
            time.sleep(0.01)
    finally:
        codes = [r.process.poll() for r in processes]
        for r in processes:
            kill(r)
    assert codes == [0] * len(processes), f"{codes}\n" + "\n---\n".join(map(tail, processes))
    return [r.log.read_text() for r in processes]


def tail(running: Running, size: int = 3000) -> str:
    """The end of what a process said."""
    return running.log.read_text()[-size:]


def tree(folder: Path, without: Sequence[str] = ()) -> dict[str, bytes]:
    """Every file below a folder by its relative path, but those of the names `without`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name not in without}
