"""How many cores this process may use, which is fewer than the machine has in many a container."""

import math
import os
import sys
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def count_cores(processes: int = 1) -> int:
    """The cores that the scheduler, a container's CPU quota and Python's settings leave.

    Threads beyond them prepare nothing sooner; they only hold batches in memory.

    Args:
        processes: that share them, 1 or more.

    Returns:
        The share of each, 1 or more.
    """
    if sys.version_info >= (3, 13):  # honours PYTHON_CPU_COUNT besides the affinity
        allowed = os.process_cpu_count() or 1
    elif sys.platform == "linux":
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, read_quota(_QUOTA, allowed)) // processes)


def read_quota(path: Path, otherwise: int) -> int:
    """The cores that a file cpu.max of Linux's control groups (version 2) pays for, rounded up.

    Args:
        path: a file of one line, "QUOTA PERIOD" in microseconds, where QUOTA may be "max".
        otherwise: what to return where there is no such file or no quota in it.
    """
    try:
        quota, period = path.read_text().split()
    except OSError:
        return otherwise
    return otherwise if quota == "max" else math.ceil(int(quota) / int(period))
