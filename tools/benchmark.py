"""Measures parts of the package on this machine.

python tools/benchmark.py store [--out=DIR]      # the store against TinyViT's own files

Tables go to the standard output, progress to the standard error; with --out also DIR/store.md and
DIR/store.json. (Images a second of a model: python -m tinyvit_jax.main --mode=benchmark.)
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_DEFAULTS = {  # of tools/reference/bench_store.py's Settings, and what each means
    "views": "that are written and read",
    "top_k": "classes of a view",
    "classes": "in all",
    "seconds": "that each reader reads for, about",
    "images": "of the whole store that is opened",
    "passes": "of that store",
    "keys": "of the original's epoch that is opened",
}


def measure_store(args: argparse.Namespace, say: Callable[[str], None]
                  ) -> tuple[dict[str, Any], str]:
    """The result and its tables."""
    from reference import bench_opening, bench_report, bench_store

    settings = bench_store.Settings(**{name: getattr(args, name) for name in _DEFAULTS})
    result: dict[str, Any] = {"settings": settings._asdict(),
                              "machine": bench_report.describe_machine()}
    before = bench_report.read_load()
    with tempfile.TemporaryDirectory(prefix="tinyvit_jax_benchmark_") as folder:
        result |= bench_store.measure(settings, Path(folder) / "views", say)
        result["open"] = bench_opening.measure_opening(settings, Path(folder) / "whole", say)
        say("removes its files")
    result["machine"]["load"] = [before, bench_report.read_load()]
    return result, bench_report.format_store(result)


def _add_store(commands: argparse._SubParsersAction) -> None:
    from reference import bench_store

    parser = commands.add_parser("store", help="the store against TinyViT's own files")
    for name, meaning in _DEFAULTS.items():
        default = bench_store.Settings._field_defaults[name]
        parser.add_argument(f"--{name}", type=type(default), default=default,
                            help=f"{meaning} (default {default:,})")
    parser.set_defaults(measure=measure_store)


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Ends with exit code 2 where a number cannot be measured."""
    for name, lowest in {**dict.fromkeys(_DEFAULTS, 1), "views": 4096, "classes": 16,
                         "seconds": 0.0}.items():
        if getattr(args, name) < lowest:
            parser.error(f"--{name}={getattr(args, name)}: expected {lowest} or more")
    if args.top_k >= args.classes:
        parser.error(f"--top_k={args.top_k}: expected less than --classes={args.classes}")


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_store(commands)
    for command in commands.choices.values():
        command.add_argument("--out", default="", help="folder for the tables and the JSON")
    args = parser.parse_args(argv)
    _check(args, parser)
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {line}", file=sys.stderr, flush=True)

    result, text = args.measure(args, say)
    result["seconds"] = time.perf_counter() - began
    print(text)
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{args.command}.md").write_text(text, encoding="utf-8")
        (out / f"{args.command}.json").write_text(json.dumps(result, indent=2) + "\n",
                                                  encoding="utf-8")


if __name__ == "__main__":
    main()
