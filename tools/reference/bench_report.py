"""What tools/benchmark.py prints: the machine, and Markdown tables that read well as text."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from reference.bench_store import BATCH, CHUNK, LOADED, SHARD, WHOLE

_READING = f"""\
Views a second on one core: median and quartiles of turns of about {CHUNK:,} views, taken in
rotation; the ratios are of the same rounds. What a CPU second gives (median) differs from that only
where others use the core too. Ours: `Store.read`, which checks that the views are those asked for,
to index int32 [n, K] and prob float32 [n, K] in descending order; each turn opens its file anew and
finds no decoded block. In training order the reading is that of the batches, one after the other.
"Random blocks" are whole blocks. Original: for each view its key from a list, the
epoch number, the key in a dict, seek and read, the seed, and copies of K int16 and K float16; in
the order of the file, which is that of training on as many GPUs as captured. Not in it: stacking
(but where named: to int64 and float32, batches of {BATCH}), the random context, the dense target.
"Keys and all" reads the keys of a rank of {SHARD:,} views and each view once, as one
worker does; of several workers each reads all keys."""
_WRITING = f"""\
Views a second on one core: median and quartiles of shards of {SHARD:,} views (the last is shorter),
by turns. Ours: `Store.write_shard` from ready arrays, to the renamed and synced file and its CRC.
Original: float16 and int16 from the same arrays, item by item through a queue to a process, on the
same core or on another one, to the moved files; it syncs nothing."""
_BYTES = """\
All files of a view's: ours with sidecars, padding and what says which view it is, without the
manifest (see opening); the original's with its keys. KL: nats from the dense target of the teacher
(top K, and the rest spread evenly) to the stored one, mean of the views where it is finite, and in
brackets the share where a class is given nothing or less. Gradient: length of its error against its
own, by the logits, for a student that knows nothing (1/C) and for one that is close (the teacher's
logits and normal noise)."""
_OPENING = """\
Fresh processes, median of three. Ours: `open_store` and the search for missing shards, for the
whole store, files empty. Original: the dict of one epoch's keys, which each worker makes anew each
epoch."""


def describe_machine(packages: tuple[str, ...] = ("numpy", "array_record", "zstandard")
                     ) -> dict[str, Any]:
    """What the figures hang on: the machine, and the versions of Python and these packages."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    return {"system": platform.platform(), "cpu": cpu, "cores": os.cpu_count(),
            "pinned": hasattr(os, "sched_setaffinity"),
            "versions": versions}


def read_load() -> float | None:
    """How many processes wanted a core in the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def format_machine(machine: dict[str, Any]) -> str:
    """A line from `describe_machine`, and from "load" before and after."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = " to ".join("?" if x is None else f"{x:.1f}" for x in machine["load"])
    return (f"{machine['cpu']}, {machine['cores']} cores, load {load}; {machine['system']}; "
            f"{versions}")


def format_store(result: dict[str, Any]) -> str:
    """The tables of tools/benchmark.py store.

    Args:
        result: settings, machine, bytes, write, read and open.
    """
    settings = result["settings"]
    shape = f"K = {settings['top_k']} of {settings['classes']:,} classes"
    return "\n\n".join([
        f"# The store and the original's files\n\n{format_machine(result['machine'])}",
        f"## Reading: {settings['views']:,} views, {shape}\n\n" + format_race(
            result["read"], {LOADED: "to keys loaded", WHOLE: "to keys and all"}), _READING,
        f"## Writing, {shape}\n\n" + format_race(result["write"], {"original": "to original"}),
        _WRITING, "## Bytes and errors\n\n" + _format_bytes(result["bytes"]), _BYTES,
        "## Opening\n\n" + _format_opening(result["open"]), _OPENING]) + "\n"


def format_race(rows: list[dict[str, Any]], rivals: dict[str, str], unit: str = "views/s") -> str:
    """A table of rows from `bench_timing.race_rows`.

    Args:
        rows: with "per_cpu_second" or without.
        rivals: their names, and what a column of ratios to them is headed.
        unit: of the speeds.
    """
    busy = "per_cpu_second" in rows[0]
    heads = ["", unit, "quartiles", *(["per CPU second"] if busy else [])]
    for name in rivals.values():
        heads += [f"ratio {name}", "quartiles"]
    heads.append("rounds")
    lines = []
    for row in rows:
        line = [row["what"], f"{row['median']:,.0f}", f"{row['low']:,.0f}-{row['high']:,.0f}"]
        line += [f"{row['per_cpu_second']:,.0f}"] if busy else []
        for rival in rivals:
            ratio = row["against"][rival]
            line += [f"{ratio['median']:.2f}", f"{ratio['low']:.2f}-{ratio['high']:.2f}"]
        lines.append([*line, str(row["rounds"])])
    return format_table(heads, lines)


def _format_bytes(rows: list[dict[str, Any]]) -> str:
    heads = ["teacher", "K of C", "top-1", "kept", "shards", "", "bytes a view", "of original",
             "KL", "gradient, 1/C", "gradient, close"]
    lines = []
    for i, row in enumerate(rows):  # the original's comes last of a case
        original = next(other for other in rows[i:] if other["what"] == "original")
        kl = "infinite" if row["kl"] is None else f"{row['kl']:.1e}"
        infinite = f" ({row['kl_infinite']:.1%})" if row["kl_infinite"] else ""
        lines.append([row["teacher"], f"{row['top_k']} of {row['classes']:,}",
                      f"{row['top1']:.2f}", f"{row['kept']:.3f}",
                      f"{row['shard_views']:,}" if row["shard_views"] else "-", row["what"],
                      f"{row['bytes']:.1f}", f"{row['bytes'] / original['bytes']:.3f}",
                      kl + infinite, f"{row['untrained']:.3%}",
                      f"{row['trained']:.3%}"])
    return format_table(heads, lines)


def _format_opening(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "keys" in row:
            what = f"original, {row['keys']:,} keys of one epoch"
            each = "-" if row["stays"] is None else f"{row['stays'] / row['keys']:.0f} a key"
        else:
            what = f"store, {row['views']:,} views in {row['shards']:,} shards"
            each = f"manifest {row['manifest_bytes'] / 2**10:,.0f} KiB"
        lines.append([what, f"{row['seconds']:.3f}", f"{row['busy']:.3f}", *(
            "-" if row[key] is None else f"{row[key] / 2**20:.1f}" for key in ("stays", "peak")),
            each])
    return format_table(["", "seconds", "CPU seconds", "MiB that stay", "MiB at most", "bytes"],
                        lines)


def format_table(heads: list[str], lines: list[list[str]]) -> str:
    """A Markdown table in columns of even width; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    right = [all(line[i][:1].isdigit() or line[i][:1] == "-" for line in lines)
             for i in range(len(heads))]
    rows = ["| " + " | ".join(cell.rjust(width) if to_right else cell.ljust(width)
                              for cell, width, to_right in zip(line, widths, right, strict=True))
            + " |" for line in [heads, *lines]]
    rule = "|" + "|".join("-" * (width + 1) + (":" if to_right else "-")
                          for width, to_right in zip(widths, right, strict=True)) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])
