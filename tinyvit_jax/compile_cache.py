"""Entries of JAX's compilation cache that a kill cut off, which would warn at every start.

JAX 0.10 writes an entry under its final name, and never again where there is one: a process that
is killed meanwhile leaves one that no start can read. Entries are zstd frames (RFC 8878, section
3.1.1), whose parts tell their length, so that it takes no decompression to find those cut off.
"""

import os
import time
from pathlib import Path
from typing import BinaryIO

_ENDING = "-cache"
_MAGIC = b"\x28\xb5\x2f\xfd"
_AT_WORK = 5.0  # seconds: a younger entry may still be growing


def remove_cut_entries(folder: Path) -> int:
    """Removes the entries that end too early.

    Args:
        folder: of the cache; it need not be there.

    Returns:
        How many were removed.
    """
    removed = 0
    for path in folder.glob(f"*{_ENDING}"):
        try:
            with path.open("rb") as f:
                found = os.fstat(f.fileno())
                cut = time.time() - found.st_mtime > _AT_WORK and _is_cut(f, found.st_size)
        except FileNotFoundError:  # another process removed it
            continue
        if cut:
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _is_cut(file: BinaryIO, size: int) -> bool:
    """Whether a file of so many bytes is the beginning of a zstd frame, and not all of it."""
    head = file.read(5)
    if head[:4] != _MAGIC:
        return head == _MAGIC[:len(head)]  # an entry of another compression is not ours to judge
    if len(head) < 5:
        return True
    descriptor = head[4]
    single = descriptor >> 5 & 1  # no window descriptor
    place = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3] + (single, 2, 4, 8)[descriptor >> 6]
    last = False
    while not last:
        file.seek(place)
        block = int.from_bytes(file.read(3), "little")
        if place + 3 > size:
            return True
        last, repeated = bool(block & 1), block >> 1 & 3 == 1
        place += 3 + (1 if repeated else block >> 3)
    return place + 4 * (descriptor >> 2 & 1) > size
