"""Where the files of a store lie: a folder, or a bucket that looks like one.

Names are relative paths with "/". A file is there whole or not at all, on every kind of place.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tinyvit_jax.store import files, remote

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Place(Protocol):
    """What a store needs of the place that holds it."""

    @property
    def url(self) -> str:
        """How the user wrote it, for messages."""
        ...

    def list(self) -> dict[str, int]:
        """The name of every whole file below the place -> its bytes."""
        ...

    def names(self) -> set[str]:
        """The name of every whole file below the place: `list`, where sizes cost more."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a small file; FileNotFoundError where there is none."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file, whole or not at all; replaces one of that name."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Writes a small file where none of that name is; False, and nothing done, where one is.

        Of any number of processes that try at once on any machines, one gets True.
        """
        ...

    def remove(self, name: str) -> None:
        """Removes a file; one that is not there is no error."""
        ...

    def fetch(self, name: str) -> Path:
        """A local file with the content; FileNotFoundError where there is none."""
        ...

    def publish(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path to write a large file to; without an error it then appears under its name.

        After an error nothing of it stays.
        """
        ...

    def free(self) -> int | None:
        """Free bytes; None where the place does not say."""
        ...


class Folder:
    """A folder of this machine, or one that machines share (NFS, Lustre).

    Args:
        path: made where there is none, by the first write.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def url(self) -> str:
        """The path."""
        return str(self.path)

    def list(self) -> dict[str, int]:
        """The name of every whole file below the folder -> its bytes."""
        found: dict[str, int] = {}
        for name, entry in self._scan():
            with contextlib.suppress(FileNotFoundError):  # removed just now
                found[name] = entry.stat().st_size
        return found

    def names(self) -> set[str]:
        """The name of every whole file below the folder; asks for none of their sizes."""
        return {name for name, _ in self._scan()}

    def _scan(self) -> Iterator[tuple[str, os.DirEntry]]:
        """The name and the entry of every whole file."""
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                entries = os.scandir(self.path / folder)
            except FileNotFoundError:  # the place itself, not made yet; or removed just now
                continue
            with entries:
                for entry in entries:
                    if entry.is_dir():
                        folders.append(f"{folder}{entry.name}/")
                    elif not entry.name.endswith(".tmp"):
                        yield folder + entry.name, entry

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all."""
        with self.publish(name) as temporary:
            temporary.write_bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file where none of that name is; says whether it did.

        A link either makes the name or fails, and what it names is whole by then. Where the file
        system has no links (FAT, some mounts of buckets), a crash can leave an empty file.
        """
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = files.temporary_path(target)
        try:
            temporary.write_bytes(data)
            files.sync(temporary)
            try:
                os.link(temporary, target)
            except FileExistsError:  # on NFS it may be ours, where the answer was lost
                return temporary.stat().st_nlink == 2
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _create_alone(target, data)
            files.sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def fetch(self, name: str) -> Path:
        """The file itself."""
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(2, "no such file", str(path))
        return path

    @contextlib.contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """A temporary path beside the file: synced to the disk, then renamed."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = files.temporary_path(target)
        try:
            yield temporary
            files.sync(temporary)
            os.replace(temporary, target)
            files.sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def free(self) -> int:
        """Free bytes of the disk that holds or will hold the folder."""
        place = self.path.absolute()
        while not place.exists():
            place = place.parent
        status = os.statvfs(place)
        return status.f_bavail * status.f_frsize


def open_place(url: str | Path, cache: str = "", cache_bytes: int = 0) -> Place:
    """The place that a path or a URL names; touches neither disk nor network.

    Args:
        url: a folder, file://FOLDER, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.
        cache: local folder for the files of a bucket; "" = ~/.cache/tinyvit_jax.
        cache_bytes: about how large the cache may grow; 0 = without limit.

    Raises:
        ValueError: it is neither a path nor a URL that is known here.
    """
    kind, mark, rest = str(url).partition(":/")
    if not mark or "/" in kind:
        return Folder(url)
    if not rest.startswith("/"):
        raise ValueError(f"{url} is neither a folder nor a URL. A URL has two slashes, as "
                         f"{kind}://{rest}; as a Path it loses one: give it as a string.")
    if kind == "file":
        return Folder(rest[1:])
    if kind not in remote.KINDS:
        raise ValueError(f"Expected a folder or one of "
                         f"{', '.join(f'{known}://' for known in remote.KINDS)}, found {url}")
    return remote.Remote(str(url), cache, cache_bytes)


def _create_alone(target: Path, data: bytes) -> bool:
    """Makes a file without links; False where it is there."""
    try:
        with open(target, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True
