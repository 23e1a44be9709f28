"""Where the files of a store lie: a folder, or a bucket that looks like one.

Names are relative paths with "/". A file is there whole or not at all, on every kind of place.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tinyvit_jax.store import files


class Place(Protocol):
    """What a store needs of the place that holds it."""

    @property
    def url(self) -> str:
        """How the user wrote it, for messages."""
        ...

    def list(self) -> dict[str, int]:
        """The name of every whole file below the place -> its bytes."""
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
        folders = [self.path] if self.path.is_dir() else []
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir():
                        folders.append(Path(entry.path))
                    elif not entry.name.endswith(".tmp"):
                        with contextlib.suppress(FileNotFoundError):  # removed just now
                            found[os.path.relpath(entry.path, self.path)] = entry.stat().st_size
        return found

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all."""
        with self.publish(name) as temporary:
            temporary.write_bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file where none of that name is; says whether it did.

        A link either makes the name or fails, on NFS too, and what it names is whole by then.
        """
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = files.temporary_path(target)
        try:
            temporary.write_bytes(data)
            os.link(temporary, target)
        except FileExistsError:
            return False
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
