"""Compiles the real train and inference steps for a slice of TPU v5e chips, on any machine.

No TPU is needed, only libtpu: pip install '.[tpu]'. A train step takes minutes of one core.

python tools/reference/compile_tpu.py --plan=5m:train --chips=4
"""

import argparse
import importlib.metadata
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":  # before jax: this process compiles for a TPU and runs nothing
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no cloud to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # none of them holds a chip
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from reference import tpu_program
from tinyvit_jax import mesh as meshes
from tinyvit_jax import mix, models, optim, train

TOPOLOGIES = {1: "v5e:1x1", 4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4", 32: "v5e:4x8",
              64: "v5e:8x8"}
CLASSES_22K, CLASSES_1K = 21_841, 1000
RECORD = Path(__file__).with_name("tpu_record.json")
CONFIGS = Path(__file__).parents[2] / "configs"


class Plan(NamedTuple):
    """One program: a stage of a recipe, in training or inference, and a chip's share of it."""

    config: str  # file of configs/
    stage: str  # of the recipe
    rows: int  # images of a chip in an update or a batch
    train: bool = True
    accumulate: int = 1  # micro-batches of an update
    remat: bool = False


# A slice of 64 chips has 64 images of the 22k recipe's batch of 4,096 on each, 16 of the 1,024 of
# the recipes at 384 and 512.
PLANS = {
    "5m:train": Plan("5m", "22k_distill", 64),
    "11m:train": Plan("11m", "22k_distill", 64),
    "21m:train": Plan("21m", "22k_distill", 64),
    "21m-384:train": Plan("21m", "384", 16),
    "21m-512:train": Plan("21m", "512", 16),
    "5m:infer": Plan("5m", "1k", 64, train=False),
    "11m:infer": Plan("11m", "1k", 64, train=False),
    "21m:infer": Plan("21m", "1k", 64, train=False),
    "21m-384:infer": Plan("21m", "384", 16, train=False),
    "21m-512:infer": Plan("21m", "512", 16, train=False),
    "teacher:infer": Plan("5m", "22k_distill", 64, train=False),
}


def make_slice(chips: int) -> Mesh:
    """The package's mesh over chips that need not be there."""
    found = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chips])
    return Mesh(np.array(found.devices), ("data",), axis_types=(AxisType.Auto,))


def make_config(plan: Plan, chips: int) -> ml_collections.ConfigDict:
    """The recipe's config with the plan's batch."""
    config = runpy.run_path(str(CONFIGS / f"{plan.config}.py"))["get_config"](plan.stage)
    config.train.batch_size, config.train.accumulate = plan.rows * chips, plan.accumulate
    config.model.remat = plan.remat
    return config


def make_model(config: ml_collections.ConfigDict):
    """The student of a recipe, with the classes that its images have."""
    m = config.model
    classes = CLASSES_22K if config.objective.name == "stored_logits" else CLASSES_1K
    return models.create_model(m.name, classes, drop_path=m.drop_path, dtype=m.dtype,
                               remat=m.remat, freeze_norm=m.freeze_norm)


def describe_batch(config: ml_collections.ConfigDict, model, mesh: Mesh
                   ) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as the plans' stages take it, none of which mixes views: shapes alone."""
    B, S, K = config.train.batch_size, model.image_size, config.store.top_k
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((B, S, S, 3), jnp.uint8), "label": ((B,), jnp.int32),
        "weight": ((B,), jnp.float32)}
    if config.objective.name == "stored_logits":
        shapes |= {"index": ((B, K), jnp.int32), "prob": ((B, K), jnp.float32)}
    rows = meshes.sharded(mesh)
    return {k: jax.ShapeDtypeStruct(*v, sharding=rows) for k, v in shapes.items()}


def lower_train(config: ml_collections.ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    """The update of a recipe, traced and not compiled."""
    model = make_model(config)
    schedule = optim.make_schedule(config.optim, config.train.batch_size, 100_000, 1000.0)

    state = train.describe_state(config, model, mesh)
    step: Any = train.make_train_step(config, model, schedule, mesh)
    return step.lower(state, describe_batch(config, model, mesh))


def lower_infer(config: ml_collections.ConfigDict, mesh: Mesh, teacher: bool = False
                ) -> jax.stages.Lowered:
    """Images to logits, or to the teacher's top classes, traced and not compiled."""
    whole, rows = meshes.replicated(mesh), meshes.sharded(mesh)
    model = (models.create_model(config.teacher.name, CLASSES_22K, dtype=config.teacher.dtype)
             if teacher else make_model(config))
    mean, std = tuple(config.data.mean), tuple(config.data.std)

    def infer(variables: dict, image: jax.Array):
        logits: Any = model.apply(variables, mix.normalize(image, mean, std))
        if not teacher:
            return logits
        log_probs, index = jax.lax.top_k(jax.nn.log_softmax(logits), config.store.top_k)
        return jnp.exp(log_probs), index

    variables = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
                             model.variable_shapes())
    shape = (config.train.batch_size, model.image_size, model.image_size, 3)
    image = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows)
    return jax.jit(infer, out_shardings=rows).lower(variables, image)


def compile_plan(name: str, plan: Plan, chips: int, keep: Path | None = None) -> dict[str, Any]:
    """Compiles one program and says what it needs; `keep`: file for the compiler's text."""
    mesh, config = make_slice(chips), make_config(plan, chips)
    began = time.perf_counter()
    # Layers choose their forms by the backend, and this process has none but the CPU.
    with mock.patch.object(jax, "default_backend", return_value="tpu"):
        lowered = (lower_train(config, mesh) if plan.train
                   else lower_infer(config, mesh, teacher=name.startswith("teacher")))
    compiled = lowered.compile()
    if keep is not None:
        keep.write_text(compiled.as_text() or "")
    return {"plan": name, **plan._asdict(), "chips": chips,
            "versions": find_versions(), "compile_seconds": round(time.perf_counter() - began),
            **tpu_program.describe(compiled, plan.rows)}


def find_versions() -> dict[str, str]:
    """The versions that decide what comes out."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


def find_recorded(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What is recorded of the same program, whatever the versions; None where nothing is."""
    same = ("plan", "chips", "rows", "accumulate", "remat")
    return next((old for old in rows if all(old[key] == row[key] for key in same)), None)


def record(row: dict[str, Any], file: Path = RECORD) -> None:
    """Writes a program's figures into the record, over those of the same program."""
    rows = json.loads(file.read_text()) if file.exists() else []
    before = find_recorded(row, rows)
    rows = [old for old in rows if old is not before] + [row]
    order = list(PLANS)
    rows.sort(key=lambda r: (order.index(r["plan"]), r["chips"], r["rows"], r["accumulate"],
                             r["remat"]))
    lines = ",\n".join(json.dumps(r) for r in rows)
    file.write_text(f"[\n{lines}\n]\n")


def format_record(rows: list[dict[str, Any]]) -> str:
    """The record as a Markdown table."""
    lines = ["| program | chips | images a chip | micro-batches | remat | memory, GB "
             "| images/s a chip | k cycles an image | exchanged, MB |", "|---" * 9 + "|"]
    for r in rows:
        exchanged = sum(part["bytes"] for part in r["collectives"].values())
        lines.append(f"| {r['plan']} | {r['chips']} | {r['rows']} | {r['accumulate']} | "
                     f"{'yes' if r['remat'] else 'no'} | {r['memory']['peak'] / 1e9:.1f} | "
                     f"{r['images_per_second']:,.0f} | {r['cycles_per_image'] / 1e3:,.0f} | "
                     f"{exchanged / 1e6:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Compiles what the command line names and prints its figures as JSON, one line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--chips", nargs="+", type=int, choices=TOPOLOGIES, default=[4, 8])
    parser.add_argument("--rows", type=int, default=0, help="images of a chip; 0 = the plan's")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of an update")
    parser.add_argument("--remat", action="store_true", help="recompute blocks' insides")
    parser.add_argument("--record", action="store_true", help=f"write them into {RECORD.name}")
    parser.add_argument("--table", action="store_true", help="print the record, compile nothing")
    parser.add_argument("--text", type=Path, help="folder for the compiled programs")
    args = parser.parse_args()
    if args.table:
        print(format_record(json.loads(RECORD.read_text())))
        return
    for name in args.plan:
        plan = PLANS[name]._replace(accumulate=args.accumulate, remat=args.remat)
        plan = plan._replace(rows=args.rows or plan.rows)
        for chips in args.chips:
            text = args.text and args.text / f"{name.replace(':', '-')}-{chips}.txt"
            row = compile_plan(name, plan, chips, text)
            print(json.dumps(row), flush=True)
            if args.record:
                record(row)


if __name__ == "__main__":
    main()
