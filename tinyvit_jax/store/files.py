"""Files that are there whole or not at all: written beside their place, synced, renamed."""

import contextlib
import errno
import os
import re
import socket
import time
from pathlib import Path

_STALE_SECONDS = 86_400.0  # a temporary file of another machine, untouched for so long, is dead


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old one or the new one."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Asks the disk to keep a file, or the names in a folder, through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_path(path: Path) -> Path:
    """A name beside `path` that no other writer uses and that tells who writes."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


def remove_leftovers(path: Path) -> None:
    """Removes temporary files whose writers are dead."""
    for file in [*path.glob(".*.tmp"), *path.glob("pass-*/.*.tmp")]:
        host, pid = file.name.split(".")[-4:-2]
        with contextlib.suppress(FileNotFoundError):  # its writer was alive and is done
            dead = (not _is_running(int(pid)) if host == _host()
                    else time.time() - file.stat().st_mtime > _STALE_SECONDS)
            if dead:
                file.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's process
        return True
    return True


def is_full(error: BaseException) -> bool:
    """Whether a disk or a quota is used up, from Python or from ArrayRecord's C++."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(os.strerror(n) in str(error) for n in (errno.ENOSPC, errno.EDQUOT))
