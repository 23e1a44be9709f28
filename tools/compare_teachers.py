"""Trains one student from several live teachers, and says what sets the teachers apart.

python tools/compare_teachers.py --config=configs/teachers.py --workdir=runs/teachers
    [--config.compare.teachers="('x2', 'x4', 'x4>x2', 'runs/mine', 'my_module:my_function')"]
    [--config.compare.temperatures="(1.0, 4.0)"] [--config.compare.seeds=3]

WORKDIR gets teachers.md, teachers.csv, teachers.json and teachers.png. Stop it at any time and type
the same command again: what is finished is not done again. docs/teachers.md says how to read it.
"""

import csv
import io

import jax

from tinyvit_jax import cli, compare, log, plots

cli.define_flags()
cli.define_process_flags()


def main() -> None:
    """Checks the config, compares, prints the table and writes it."""
    config, workdir = cli.read_flags()
    cli.join_processes()
    cli.use_compilation_cache()
    cli.use_onednn(config)
    result = compare.run(config, workdir)
    if jax.process_index():
        return
    table = compare.format_table(result)
    print(table, flush=True)
    log.write_atomic(workdir / "teachers.md", (table + "\n").encode())
    log.write_json(workdir / "teachers.json", result)
    lines = io.StringIO(newline="")
    keys = max((list(row) for row in result["rows"]), key=len)
    writer = csv.DictWriter(lines, keys)
    writer.writeheader()
    writer.writerows(result["rows"])
    log.write_atomic(workdir / "teachers.csv", lines.getvalue().encode())
    plots.plot_teachers(result, workdir / "teachers.png")


if __name__ == "__main__":
    cli.keep_freed_memory()
    cli.run_command(main)
