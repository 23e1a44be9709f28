"""The subcommands of tools/benchmark.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from reference import bench_end_to_end as end_to_end
from reference import (
    bench_input,
    bench_live,
    bench_opening,
    bench_report,
    bench_resident,
    bench_step,
    bench_store,
)

Say = Callable[[str], None]


class Command(NamedTuple):
    """A subcommand: what it may be told, what it does, and how its result reads."""

    help: str
    room: Any  # the module with Settings, MEANINGS of its fields, and check_settings
    measure: Callable[[Any, Path, Say], dict[str, Any]]  # (settings, folder for files, say)
    format: Callable[[dict[str, Any]], str]
    packages: tuple[str, ...]  # whose versions the figures hang on


def _measure_store(settings: bench_store.Settings, folder: Path, say: Say) -> dict[str, Any]:
    return bench_store.measure(settings, folder / "views", say) | {
        "open": bench_opening.measure_opening(settings, folder / "whole", say)}


COMMANDS = {
    "input": Command("JPEG files to views, against the original's path", bench_input,
                     bench_input.measure, bench_input.format_result,
                     ("numpy", "opencv-python-headless", "simplejpeg", "grain", "pillow", "torch")),
    "step": Command("inference and training against PyTorch", bench_step, bench_step.measure,
                    bench_step.format_result, ("jax", "jaxlib", "flax", "optax", "torch", "timm")),
    "store": Command("the store against TinyViT's own files", bench_store, _measure_store,
                     bench_report.format_store, ("numpy", "array_record", "zstandard")),
    "end_to_end": Command("from the command to the first step; distillation", end_to_end,
                          end_to_end.measure, end_to_end.format_result,
                          ("jax", "jaxlib", "flax", "grain", "orbax-checkpoint")),
    "resident": Command("a small set in device memory against the host's pipeline", bench_resident,
                        bench_resident.measure, bench_resident.format_result,
                        ("jax", "jaxlib", "flax", "grain")),
    "live": Command("a live teacher, a stored one and labels alone", bench_live, bench_live.measure,
                    bench_live.format_result, ("jax", "jaxlib", "flax")),
}
