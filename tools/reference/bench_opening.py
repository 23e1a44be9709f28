"""Measures how long a whole store takes to open, against the original's dict of keys.

Each opening is one of a fresh process. Of the store's shards only the names count, so the files are
empty; of the original's epoch only the keys do.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from reference import original_logits
from reference.bench_store import Settings, image_names, make_store
from reference.synthetic_teachers import Teacher
from tinyvit_jax.store.store import open_store

_OPENINGS = 3


def measure_opening(settings: Settings, folder: Path, say: Callable[[str], None]
                    ) -> list[dict[str, Any]]:
    """Opens a store of all passes, and the original's keys of one epoch, in fresh processes.

    Args:
        settings: images, passes, keys, K and classes.
        folder: gets the files, which are empty where only their names count.
        say: takes a line of progress.

    Returns:
        A row for each: what, keys or views, seconds and CPU seconds (busy), and how many bytes the
        memory of the process grew, for good and at its highest; None where the system has no /proc.
        Medians.
    """
    say(f"makes the files of {settings.passes} passes over {settings.images:,} images")
    nobody = np.zeros((0, settings.top_k))
    teacher = Teacher("none", settings.classes, nobody, nobody, nobody, nobody, 0.0)
    whole = folder / "store"
    store = make_store(whole, teacher, settings.images, passes=settings.passes)
    shards = store.shards()
    for shard in shards:
        path = whole / shard.name
        if not shard.start:
            path.parent.mkdir()
        for suffix in (".array_record", ".json"):
            path.with_name(path.name + suffix).touch()
    epoch = original_logits.epoch_folder(folder / "original", settings.top_k, 0)
    epoch.mkdir(parents=True)
    names = image_names(np.arange(settings.keys), settings.classes)
    (epoch / "rank0-keys.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    (epoch / "rank0-values.bin").write_bytes(bytes(original_logits.item_bytes(settings.top_k)))
    probes = {"store": f"probe_store({str(whole)!r})",
              "original": f"probe_original({str(epoch)!r}, {settings.top_k}, {names[0]!r})"}
    runs: dict[str, list[dict]] = {what: [] for what in probes}
    say("opens them")
    for _ in range(_OPENINGS):
        for what, call in probes.items():
            runs[what].append(_probe(call))
    rows = [{"what": what, **{name: _median([run[name] for run in found])
                              for name in ("seconds", "busy", "stays", "peak")}}
            for what, found in runs.items()]
    rows[0] |= {"views": settings.images * settings.passes, "shards": len(shards),
                "manifest_bytes": (whole / "manifest.json").stat().st_size}
    rows[1] |= {"keys": settings.keys}
    return rows


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _probe(call: str) -> dict[str, Any]:
    """What one of the two functions below prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"from reference import bench_opening; bench_opening.{call}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def probe_store(path: str) -> None:
    """Opens a store and looks for missing shards, as training does at its start; prints a dict."""
    before, began, busy = _memory()[0], time.perf_counter(), time.process_time()
    store = open_store(path)
    absent = len(store.missing())
    _print_growth(before, time.perf_counter() - began, time.process_time() - busy)
    if absent:
        raise RuntimeError(f"{absent} shards of {path} are missing")


def probe_original(folder: str, top_k: int, key: str) -> None:
    """Reads a first view of an epoch, which loads every key of its rank; prints a dict."""
    before, began, busy = _memory()[0], time.perf_counter(), time.process_time()
    reader = original_logits.Reader(Path(folder), top_k)
    reader.read(key)
    _print_growth(before, time.perf_counter() - began, time.process_time() - busy)
    reader.close()


def _memory() -> tuple[int | None, int | None]:
    """Bytes of memory that this process has, and has had at the most."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return None, None


def _print_growth(before: int | None, seconds: float, busy: float) -> None:
    stays, peak = (None if before is None or now is None else now - before for now in _memory())
    print(json.dumps({"seconds": seconds, "busy": busy, "stays": stays, "peak": peak}))
