"""A store in a bucket: gs:// and s3://, through fsspec.

An object appears whole, so what is written needs no other name first. ArrayRecord reads a file in
small pieces and knows no s3://: a shard is downloaded when it is first asked for, into a cache that
the processes of a machine share.
"""

import contextlib
import hashlib
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tinyvit_jax.store import files

logger = logging.getLogger("tinyvit_jax")

# URL scheme -> the extra of setup.cfg that brings its package; memory:// is this process alone.
KINDS = {"gs": "gcs", "s3": "s3", "memory": ""}
_WAITS = (0.5, 2.0)  # seconds before the second and the third try
_IN_USE_SECONDS = 60.0  # a copy that was asked for so lately may not be open yet
_SCAN_PART = 50  # the cache is counted when this part of its limit was added since
_COPY = re.compile(r"(.+)\.([0-9a-f]{16})\.([0-9a-f]{8})")  # NAME.VERSION.CRC32

T = TypeVar("T")


class Remote:
    """A folder of a bucket, with a cache on this machine.

    A copy is named by the version of its object and by its CRC32, so an object that was replaced is
    fetched anew, and so is a copy that was damaged. Transient failures are tried three times.

    Args:
        url: KIND://BUCKET/FOLDER.
        cache: local folder; "" = ~/.cache/tinyvit_jax.
        cache_bytes: the copies that were not asked for longest go beyond this size; 0 = no limit.
            Those of the last minute stay, as they may not be open yet. A copy that goes while a
            process has it open stays readable for that process.
    """

    def __init__(self, url: str, cache: str = "", cache_bytes: int = 0):
        self.url = url.rstrip("/")
        self._given, self._limit = cache, cache_bytes
        self._cache = Path(cache or "~/.cache/tinyvit_jax").expanduser() / "stores"
        self._folder = self._cache / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self._opened: tuple[int, Any] = (0, None)  # process; file system and folder
        self._uncounted = cache_bytes  # bytes added since the cache was counted

    def __reduce__(self):
        return Remote, (self.url, self._given, self._limit)

    def list(self) -> dict[str, int]:
        """The name of every object below the folder -> its bytes; one recursive listing."""
        fs, root = self._locate("")
        try:
            found = self._try("", lambda: fs.find(root, detail=True))
        except FileNotFoundError:
            return {}
        return {path[len(root):].lstrip("/"): int(info["size"]) for path, info in found.items()
                if info["type"] == "file"}

    def names(self) -> set[str]:
        """The name of every object below the folder."""
        return set(self.list())

    def read(self, name: str) -> bytes:
        """The content of an object."""
        fs, path = self._locate(name)
        return self._try(name, lambda: fs.cat_file(path))

    def write(self, name: str, data: bytes) -> None:
        """Writes an object; replaces one of that name."""
        fs, path = self._locate(name)
        self._try(name, lambda: fs.pipe_file(path, data))

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object where none of that name is; says whether it did.

        Google's and Amazon's servers let one of several succeed (ifGenerationMatch, If-None-Match).
        A server that ignores the condition is asked before whether the object is there: of two
        that ask at the same moment, both get True.
        """
        fs, path = self._locate(name)
        unsure = False  # whether an earlier try failed, and may yet have written

        def make() -> bool:
            nonlocal unsure
            try:
                if not fs.exists(path):
                    fs.pipe_file(path, data, mode="create")
                    return True
            except FileExistsError:
                pass
            except Exception:
                unsure = True
                raise
            return unsure and fs.cat_file(path) == data

        return self._try(name, make)

    def remove(self, name: str) -> None:
        """Removes an object, if it is there."""
        fs, path = self._locate(name)
        with contextlib.suppress(FileNotFoundError):
            self._try(name, lambda: fs.rm_file(path))

    def fetch(self, name: str) -> Path:
        """A local copy of an object's newest version."""
        fs, path = self._locate(name)
        info = self._try(name, lambda: fs.info(path))
        if info["type"] != "file":
            raise FileNotFoundError(2, "no such file", f"{self.url}/{name}")
        version = hashlib.sha256(str(sorted(info.items(), key=str)).encode()).hexdigest()[:16]
        target = self._folder / name
        for copy in _copies(target):
            with contextlib.suppress(FileNotFoundError):
                if _is_sound(copy, version):
                    os.utime(copy)
                    return copy
        return self._download(name, target, version, int(info["size"]))

    def _download(self, name: str, target: Path, version: str, size: int) -> Path:
        """Brings an object into the cache, and removes its older versions."""
        fs, path = self._locate(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = files.temporary_path(target)
        try:
            self._try(name, lambda: fs.get_file(path, str(temporary)))
            data = temporary.read_bytes()
            if len(data) != size:
                raise OSError(f"{self.url}/{name} changed while it was read: {len(data)} bytes "
                              f"came, {size} were announced. Run again.")
            copy = target.with_name(f"{target.name}.{version}.{zlib.crc32(data):08x}")
            os.replace(temporary, copy)
        except OSError as error:
            if files.is_full(error):
                raise OSError(f"No space left for a copy of {self.url}/{name} in {self._cache}. "
                              f"Point --config.store.cache at another disk, or set "
                              f"--config.store.cache_gb to what this one can spare.") from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        for other in _copies(target):
            if other != copy:
                other.unlink(missing_ok=True)
        self._trim(size)
        return copy

    def _trim(self, added: int) -> None:
        """Removes the copies that were not asked for longest, where the cache is too large.

        Counting takes a moment in a large cache, so it waits until enough was added.
        """
        if not self._limit:
            return
        self._uncounted += added
        if self._uncounted < self._limit / _SCAN_PART:
            return
        self._uncounted = 0
        found, total = [], 0
        for file in self._cache.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if _COPY.fullmatch(file.name):
                    status = file.stat()
                    found.append((status.st_mtime, status.st_size, file))
                    total += status.st_size
        for used, size, file in sorted(found):
            if total <= self._limit or time.time() - used < _IN_USE_SECONDS:
                break
            file.unlink(missing_ok=True)
            total -= size

    @contextlib.contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """A local file that is then uploaded."""
        fs, path = self._locate(name)
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = files.temporary_path(self._folder / Path(name).name)
        try:
            yield temporary
            self._try(name, lambda: fs.put_file(str(temporary), path))
            size = self._try(name, lambda: fs.info(path))["size"]
            if size != temporary.stat().st_size:
                raise OSError(f"{self.url}/{name} has {size} bytes after {temporary.stat().st_size}"
                              f" were sent. Run again.")
        finally:
            temporary.unlink(missing_ok=True)

    def free(self) -> None:
        """A bucket does not say."""

    def _locate(self, name: str) -> tuple[Any, str]:
        """The file system, and the name of an object as it has it; "" is the folder itself."""
        fs, root = self._open()
        return fs, f"{root}/{name}" if name else root

    def _open(self) -> tuple[Any, str]:
        """The fsspec file system and the folder in it.

        One for all threads of a process, and none across a fork.
        """
        if self._opened[0] != os.getpid():
            import fsspec.core

            try:
                # What another process writes must be seen at once: no listings are kept.
                opened = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
            except ImportError as error:
                extra = KINDS[self.url.partition(":")[0]]
                raise OSError(f"{self.url} needs a package that is not installed ({error}): "
                              f"pip install 'tinyvit_jax[{extra}]'") from error
            files.remove_leftovers(self._folder)
            self._opened = os.getpid(), opened
        return self._opened[1]

    def _try(self, name: str, act: Callable[[], T], waits: tuple[float, ...] = _WAITS) -> T:
        """Does something, and again after each wait; the error that is left names the URL."""
        try:
            return act()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each package has classes of its own
            if isinstance(error, OSError) and files.is_full(error):
                raise
            if not waits:
                raise OSError(f"{self.url}/{name}: {type(error).__name__}: {error} (after "
                              f"{len(_WAITS) + 1} tries)") from error
            logger.info("%s/%s: %s; trying again", self.url, name, error)
        time.sleep(waits[0])
        return self._try(name, act, waits[1:])


def _copies(target: Path) -> list[Path]:
    """The copies of an object, of any version."""
    return [file for file in target.parent.glob(f"{target.name}.*")
            if (match := _COPY.fullmatch(file.name)) and match[1] == target.name]


def _is_sound(copy: Path, version: str) -> bool:
    """Whether a copy is of a version and has the bytes that were downloaded."""
    found, crc = copy.name.split(".")[-2:]
    return found == version and f"{zlib.crc32(copy.read_bytes()):08x}" == crc
