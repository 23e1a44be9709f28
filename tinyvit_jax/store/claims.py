"""Who works on what, of any number of processes that share nothing but a place for files.

A claim is a small file that says "I am at this": NAME.0001 in a place of its own, with its owner's
token, host, pid and a beat that rises while the owner lives. It saves work and guards nothing: what
is claimed is published whole and is the same whoever makes it, so two owners cost time alone.

No clocks of two machines are compared. An observer takes a claim for dead when its content stood
still for `lease` seconds of the observer's own clock, or at once when its owner's pid is of this
machine and does not run. It then makes the claim's next generation: of several that try, one wins.
The highest generation that is there owns the name.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence

from tinyvit_jax.store import files
from tinyvit_jax.store.manifest import StoreError
from tinyvit_jax.store.place import Place

logger = logging.getLogger("tinyvit_jax")


class Claims:
    """The claims of one process; a context: within it they beat, after it they are gone.

    Args:
        place: of the claims alone.
        lease: seconds without a beat after which others may take over.
        clock: seconds that only this process reads, and that never step back.
    """

    def __init__(self, place: Place, lease: float, clock: Callable[[], float] = time.monotonic):
        self.place, self.lease = place, lease
        self.token = os.urandom(8).hex()
        self._clock = clock
        self._mine: dict[str, int] = {}  # name -> generation
        self._seen: dict[str, tuple[bytes, float]] = {}  # file -> content, when it was first seen
        self._beat = 0
        self._lock = threading.RLock()  # a beat must not bring back a claim that is being removed
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Claims":
        """Starts the beat."""
        self._thread = threading.Thread(target=self._keep_beating, name="claims", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the beat and removes what is still claimed."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for name in list(self._mine):
            with contextlib.suppress(OSError):  # others take it over; the first error counts
                self.release(name)

    def take(self, names: Sequence[str]) -> str | None:
        """Claims one of the names: a free one, else one whose owner is dead.

        Args:
            names: those that still need work, in order. "/" in a name becomes "-".

        Returns:
            The first that is free, where nobody else is at work; else one from a part of the list
            that hangs on the token, so that many that start at once do not meet. None where others
            own all of them.

        Raises:
            StoreError: a claim cannot be written.
        """
        held = self._held()
        start = len(names) * zlib.crc32(self.token.encode()) >> 32
        spread = [*names[start:], *names[:start]]
        for name in spread if held else [*names[:1], *spread]:
            if _stem(name) not in held and self._create(name, 1):
                return name
        for name in spread:
            generation = held.get(_stem(name), 0)
            if generation and name not in self._mine:
                owner = self._dead_owner(_file(name, generation))
                if owner and self._create(name, generation + 1):
                    logger.info("%s: taken over from %s", name, owner)
                    return name
        return None

    def owns(self, name: str) -> bool:
        """Whether this process's claim of a name is still there and the highest."""
        generation = self._mine.get(name, 0)
        return (self._held().get(_stem(name)) == generation
                and self._is_mine(_file(name, generation)))

    def release(self, name: str) -> None:
        """Gives up a claim: removes it, and leaves those of others."""
        with self._lock:
            file = _file(name, self._mine[name])
            if self._is_mine(file):
                self.place.remove(file)
            del self._mine[name]

    def finish(self, name: str) -> None:
        """Ends a name whose work is published: removes every generation of its claim."""
        with self._lock:
            self._mine.pop(name, None)
            # The lowest first: the owner of one that was passed over must not find it the highest.
            for file in sorted(self.place.list()):
                if _parse(file)[0] == _stem(name):
                    self.place.remove(file)

    def sweep(self, names: Iterable[str]) -> None:
        """Removes the claims of names that need no work by processes of this machine that died.

        Args:
            names: those that still need work.
        """
        needed = {_stem(name) for name in names}
        for file in sorted(self.place.list()):
            stem, generation = _parse(file)
            if generation and stem not in needed and _has_exited(_fields(self._read(file))):
                self.place.remove(file)

    def _held(self) -> dict[str, int]:
        """The stem of every name that is claimed -> its highest generation."""
        held: dict[str, int] = {}
        for stem, generation in map(_parse, self.place.list()):
            if generation:
                held[stem] = max(held.get(stem, 0), generation)
        return held

    def _create(self, name: str, generation: int) -> bool:
        """Makes a generation of a claim; False where somebody else has made it."""
        file = _file(name, generation)
        with self._lock:
            self._mine[name] = generation  # before: an interrupt must find what is to be removed
            try:
                made = self.place.create(file, self._content())
            except OSError as error:
                del self._mine[name]
                raise StoreError(
                    f"The claim {file} cannot be written to {self.place.url}: "
                    f"{error.strerror or error}. Free some space or mend the folder, and run the "
                    f"same command again: what is complete is kept.") from error
            if not made:
                del self._mine[name]
            return made

    def _content(self) -> bytes:
        return json.dumps({"token": self.token, "host": socket.gethostname(), "pid": os.getpid(),
                           "machine": files.machine(), "lease": self.lease,
                           "beat": self._beat}).encode()

    def _read(self, file: str) -> bytes | None:
        """The content of a claim; None for one that was removed just now."""
        try:
            return self.place.read(file)
        except FileNotFoundError:
            return None

    def _is_mine(self, file: str) -> bool:
        return _fields(self._read(file)).get("token") == self.token

    def _dead_owner(self, file: str) -> str:
        """Who owned a claim that is dead, and how that is known; "" for one that may live."""
        content, now = self._read(file), self._clock()
        if content is None:
            return ""
        if self._seen.get(file, (None, 0.0))[0] != content:
            self._seen[file] = content, now
        fields = _fields(content)
        owner = f"pid {fields.get('pid')} on {fields.get('host')}"
        if _has_exited(fields):
            return f"{owner}, which does not run any more"
        silent = now - self._seen[file][1]
        own = fields.get("lease")  # what the owner beats four times in: it may be longer than ours
        lease = max(self.lease, own if isinstance(own, int | float) else 0)
        return f"{owner}, silent for {silent:.0f} s" if silent >= lease else ""

    def owners(self) -> list[str]:
        """Who else claims something, as "pid 12 on host"."""
        found = {}
        for stem, generation in self._held().items():
            fields = _fields(self._read(f"{stem}.{generation:04d}"))
            if fields.get("token", self.token) != self.token:
                found[fields["token"]] = f"pid {fields.get('pid')} on {fields.get('host')}"
        return sorted(found.values())

    def _keep_beating(self) -> None:
        """Rewrites what is claimed, four times a lease."""
        while not self._stop.wait(self.lease / 4):
            self._beat += 1
            for name in list(self._mine):
                with self._lock, contextlib.suppress(OSError):  # the next beat may come through
                    file = _file(name, self._mine.get(name, 0))
                    if self._is_mine(file):
                        self.place.write(file, self._content())


def _fields(content: bytes | None) -> dict:
    """What a claim says; {} where it holds something else, or is gone."""
    try:
        fields = json.loads(content or b"")
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _has_exited(fields: dict) -> bool:
    """Whether a claim's owner was a process of this machine that does not run any more."""
    pid = fields.get("pid")
    if fields.get("machine") != files.machine() or not isinstance(pid, int) or pid <= 0:
        return False
    return not files.is_running(pid)


def _stem(name: str) -> str:
    return name.replace("/", "-")


def _file(name: str, generation: int) -> str:
    return f"{_stem(name)}.{generation:04d}"


def _parse(file: str) -> tuple[str, int]:
    """The stem and the generation of a claim's file; generation 0 for a file that is none."""
    stem, _, generation = file.rpartition(".")
    return (stem, int(generation)) if generation.isdecimal() else (file, 0)
