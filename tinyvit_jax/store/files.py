"""Files that are there whole or not at all: written beside their place, synced, renamed."""

import contextlib
import errno
import os
import re
import socket
import time
import zlib
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.([A-Za-z0-9-]*)\.(\d+)\.[0-9a-f]{8}\.tmp")
_STALE_SECONDS = 86_400.0  # a temporary file of another machine, untouched for so long, is dead


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
    """This machine in a file's name: its own word, and what tells containers of one name apart."""
    own = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
    return f"{own}-{zlib.crc32(machine().encode()):08x}"


def machine() -> str:
    """What two processes share that see each other's pids: host, boot and namespace of pids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not on Linux: no namespaces either
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
                  os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def remove_leftovers(path: Path) -> None:
    """Removes temporary files whose writers are dead."""
    for file in [*path.glob(".*.tmp"), *path.glob("*/.*.tmp")]:
        ours = _TEMPORARY.fullmatch(file.name)
        if ours is None:
            continue
        with contextlib.suppress(FileNotFoundError):  # its writer was alive and is done
            dead = (not is_running(int(ours[2])) if ours[1] == _host()
                    else time.time() - file.stat().st_mtime > _STALE_SECONDS)
            if dead:
                file.unlink()


def is_running(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # someone else's process
        return True
    return True


def is_full(error: BaseException) -> bool:
    """Whether a disk or a quota is used up, from Python or from ArrayRecord's C++."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(os.strerror(n) in str(error) for n in (errno.ENOSPC, errno.EDQUOT))
