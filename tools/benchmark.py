"""Measures parts of the package on this machine, each against its rival in the same run.

python tools/benchmark.py input [--images=FOLDER]            # JPEG files to views
python tools/benchmark.py step [--microsoft=FOLDER --timm]   # inference and training of a model
python tools/benchmark.py store                              # the store against TinyViT's own files
python tools/benchmark.py end_to_end                         # from the command on; distillation
python tools/benchmark.py live                               # a live teacher, a stored one, none
python tools/benchmark.py resident                           # small sets in device memory

Tables go to the standard output, progress to the standard error; with --out=DIR also DIR/input.md
and DIR/input.json. (Images a second of any model: python -m tinyvit_jax.main --mode=benchmark.)
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reference import bench_report
from reference.bench_commands import COMMANDS

from tinyvit_jax import cli


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, Any]:
    """The command line and the command's settings; exit code 2 where they cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        below = commands.add_parser(name, help=command.help)
        for field, default in command.room.Settings._field_defaults.items():
            _add_setting(below, field, default, command.room.MEANINGS[field])
        below.add_argument("--out", default="", help="folder for the tables and the JSON")
    args = parser.parse_args(argv)
    room = COMMANDS[args.command].room
    settings = room.Settings(**{field: getattr(args, field) for field in room.Settings._fields})
    try:
        room.check_settings(settings)
    except ValueError as error:
        parser.error(str(error))
    return args, settings


def _add_setting(parser: argparse.ArgumentParser, field: str, default: Any, meaning: str) -> None:
    """A flag for a setting: a switch, whole numbers joined by commas, or one value."""
    if isinstance(default, bool):
        parser.add_argument(f"--{field}", action="store_true", help=meaning)
        return
    several = isinstance(default, tuple)
    shown = ",".join(map(str, default)) if several else default
    note = "" if default == "" else f" (default {shown})"
    parser.add_argument(f"--{field}", default=default, help=f"{meaning}{note}", type=(
        (lambda text: tuple(map(int, text.split(",")))) if several else type(default)))


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, measures, prints and writes."""
    args, settings = _parse(argv)
    command = COMMANDS[args.command]
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {line}", file=sys.stderr, flush=True)

    machine = bench_report.describe_machine(command.packages) | {"load": [bench_report.read_load()]}
    result: dict[str, Any] = {"settings": settings._asdict(), "machine": machine}
    with tempfile.TemporaryDirectory(prefix="tinyvit_jax_benchmark_") as folder:
        result |= command.measure(settings, Path(folder), say)
        say("removes its files")
    machine["load"].append(bench_report.read_load())
    result["seconds"] = time.perf_counter() - began
    text = command.format(result)
    print(text)
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        for suffix, content in (("md", text), ("json", json.dumps(result, indent=2) + "\n")):
            (out / f"{args.command}.{suffix}").write_text(content, encoding="utf-8")


if __name__ == "__main__":
    cli.keep_freed_memory()  # as a run does; it serves PyTorch in the same process as well
    main()
