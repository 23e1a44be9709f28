"""What the 22k recipe costs at scale, on paper: hours, bytes and cores, from recorded figures.

python tools/reference/cost_at_scale.py [--input=DIR/input.json] [--gpu_use=0.1]

Nothing is run here. Steps on TPU are the compiler's estimates (tpu_record.json, which
compile_tpu.py writes), bytes and images a second of a core are measured (cost_figures.json, and
with --input the result of `tools/benchmark.py input`), the use that a GPU makes of its peak is
assumed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from reference import tpu_program
from tinyvit_jax import models
from tinyvit_jax.models import cost

HERE = Path(__file__).parent
STUDENTS = {"5m": "tiny_vit_5m_224", "11m": "tiny_vit_11m_224", "21m": "tiny_vit_21m_224"}
TEACHER = "clip_vit_large14_224"
CLASSES = 21_841
_PASSES = 3  # over the network in an update: forward, and the gradients of inputs and of weights


class Machine(NamedTuple):
    """Accelerators that train together, and what each does in a second."""

    name: str
    chips: int
    teacher: float  # images of the teacher's forward pass
    students: dict[str, float]  # images of a student's update
    source: str  # where these come from


class Run(NamedTuple):
    """What is to be learned."""

    images: int
    epochs: int

    @property
    def views(self) -> int:
        """Views in all: every epoch shows each image anew."""
        return self.images * self.epochs


def read_tpu(record: Path, chips: int, network: float, students: Sequence[str]) -> Machine:
    """A slice of v5e by the compiler's estimates.

    Args:
        record: of compile_tpu.py.
        chips: in the slice.
        network: bytes a second of one chip to the others; a ring sends every byte about twice.
        students: keys of STUDENTS.

    Raises:
        ValueError: naming the programs that the record lacks.
    """
    rows = {row["plan"]: row for row in reversed(json.loads(record.read_text()))
            if row["accumulate"] == 1 and not row["remat"]}
    wanted = ["teacher:infer", *(f"{name}:train" for name in students)]
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise ValueError(f"{record.name} lacks {', '.join(missing)}. Run compile_tpu.py --record "
                         f"--chips 4 --plan {' '.join(missing)}")

    def rate(row: dict[str, Any]) -> float:
        seconds = row["cycles"] / tpu_program.CLOCK
        exchanged = sum(part["bytes"] for part in row["collectives"].values())
        return row["rows"] / (seconds + 2 * exchanged / network)

    return Machine(f"v5e-{chips}", chips, rate(rows["teacher:infer"]),
                   {name: rate(rows[f"{name}:train"]) for name in students},
                   "compiler's estimate")


def assume_gpus(name: str, chips: int, peak: float, use: float, teacher_use: float,
                students: Sequence[str]) -> Machine:
    """GPUs by multiply-adds and an assumed use of their peak.

    Args:
        name: of the machine.
        chips: GPUs in it.
        peak: bfloat16 operations a second of one, by its maker.
        use: of the peak in a student's update, in (0, 1].
        teacher_use: likewise in the teacher's forward pass.
        students: keys of STUDENTS.
    """
    def operations(variant: str) -> int:
        return 2 * cost.count_macs(models.create_model(variant, CLASSES))

    return Machine(name, chips, peak * teacher_use / operations(TEACHER),
                   {short: peak * use / (_PASSES * operations(STUDENTS[short]))
                    for short in students}, "assumed")


def count_hours(views: int, rate: float, chips: int) -> float:
    """Hours of a machine whose chips do so many views a second each."""
    return views / (rate * chips) / 3600


def format_hours(run: Run, machines: list[Machine]) -> str:
    """Hours of every student with the teacher beside it, and from a store."""
    lines = ["| machine | figures | what | teacher, h | student, h | teacher online, h | "
             "store at hand, h | online / store |", "|---|---|---|---|---|---|---|---|"]
    for m in machines:
        teacher = count_hours(run.views, m.teacher, m.chips)
        hours = {name: count_hours(run.views, rate, m.chips) for name, rate in m.students.items()}
        for name, student in hours.items():
            lines.append(_row(m.name, m.source, name, f"{teacher:,.0f}", f"{student:,.0f}",
                              f"{teacher + student:,.0f}", f"{student:,.0f}",
                              f"{(teacher + student) / student:.1f}x"))
        total = sum(hours.values())
        online, stored = len(hours) * teacher + total, teacher + total
        lines.append(_row(m.name, m.source, "all of them, capturing the store first",
                          f"{teacher:,.0f}", f"{total:,.0f}", f"{online:,.0f}", f"{stored:,.0f}",
                          f"{online / stored:.1f}x"))
    return "\n".join(lines)


def format_store(run: Run, figures: dict[str, Any]) -> str:
    """Bytes of the store, whole and of one epoch."""
    least, most = (view * run.views for view in figures["store_bytes"])
    return "\n".join([
        "| | least | most |", "|---|---|---|",
        _row("bytes a view, measured", *(f"{view:.0f}" for view in figures["store_bytes"])),
        _row(f"{run.epochs} passes over {run.images / 1e6:.1f} M images, GB",
             f"{least / 1e9:,.0f}", f"{most / 1e9:,.0f}"),
        _row("one pass, GB", f"{least / run.epochs / 1e9:.2f}", f"{most / run.epochs / 1e9:.2f}")])


def format_hosts(machines: list[Machine], figures: dict[str, Any]) -> str:
    """Host cores that keep a machine busy, by the images a second that one core prepares."""
    kinds = figures["images_per_core"]
    lines = ["| machine | what | images/s | store, MB/s | "
             + " | ".join(f"cores, {kind} ({rate:,.0f}/s each)" for kind, rate in kinds.items())
             + " |", "|---" * (4 + len(kinds)) + "|"]
    for m in machines:
        for what, rate in {"teacher (capture)": m.teacher, **m.students}.items():
            total = rate * m.chips
            lines.append(_row(m.name, what, f"{total:,.0f}",
                              f"{total * figures['store_bytes'][1] / 1e6:.1f}",
                              *(f"{total / each:,.0f}" for each in kinds.values())))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def read_figures(file: Path, measured: Path | None) -> dict[str, Any]:
    """The measured figures; images a second from a result of `benchmark.py input` where given."""
    figures = json.loads(file.read_text())
    if measured is not None:
        race = {row["what"]: row["per_cpu_second"]
                for row in json.loads(measured.read_text())["race"]}
        names = figures["images_per_core"]
        missing = [name for name in names if name not in race]
        if missing:
            raise ValueError(f"{measured} has no row {', '.join(missing)}; it has "
                             f"{', '.join(race)}. Name one of these in {file.name}.")
        figures["images_per_core"] = {name: race[name] for name in names}
    return figures


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", type=Path, default=HERE / "tpu_record.json")
    parser.add_argument("--figures", type=Path, default=HERE / "cost_figures.json")
    parser.add_argument("--input", type=Path, help="result of tools/benchmark.py input")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--images", type=int, default=14_197_122)
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--chips", type=int, default=64, help="of the v5e slice")
    parser.add_argument("--network", type=float, default=200e9,
                        help="bytes a second that a v5e chip sends, by its maker")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu_peak", type=float, default=989e12,
                        help="bfloat16 operations a second of an H100, by its maker")
    parser.add_argument("--gpu_use", type=float, default=0.1,
                        help="assumed use of it in a student's update")
    parser.add_argument("--gpu_teacher_use", type=float, default=0.4,
                        help="assumed use of it in the teacher's forward pass")
    args = parser.parse_args()
    run = Run(args.images, args.epochs)
    try:
        figures = read_figures(args.figures, args.input)
        slice_ = read_tpu(args.record, args.chips, args.network, args.students)
    except ValueError as error:
        parser.error(str(error))
    machines = [slice_, assume_gpus(f"{args.gpus} H100", args.gpus, args.gpu_peak, args.gpu_use,
                                     args.gpu_teacher_use, args.students)]
    print("\n\n".join([format_hours(run, machines), format_store(run, figures),
                       format_hosts(machines, figures)]))


if __name__ == "__main__":
    main()
