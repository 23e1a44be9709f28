"""--mode=benchmark: parameters, multiply-adds and images a second of a model, as one table.

The measure is the original's throughput mode: inference on a fixed batch of random numbers, one
call at a time, waiting for each. Compilation happens before and is reported apart.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from tinyvit_jax import log, onednn, weights
from tinyvit_jax import mesh as meshes
from tinyvit_jax.models import cost

_CLASSES = 1000  # of the head where the config names no number


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict:
    """Measures the config's model and writes WORKDIR/benchmark.json.

    Args:
        config: a checked config; `model` and `benchmark` are read.
        workdir: gets benchmark.json.

    Returns:
        What is written: the model, its cost, the machine, and a row for each dtype and batch size.
    """
    mesh = meshes.make_mesh()
    section = config.model
    for size in config.benchmark.batch_sizes:
        meshes.check_rows(size, "benchmark.batch_sizes")
    make = partial(weights.make_model, section, section.num_classes or _CLASSES)
    model = make()
    result: dict[str, Any] = {
        "model": section.name or section.init_from, "image_size": model.image_size,
        "num_classes": model.num_classes,
        "parameters": cost.count_parameters(model), "macs": cost.count_macs(model),
        "machine": describe_machine(), "rows": []}
    first = jax.process_index() == 0
    if first:
        print(f"{result['model']} at {model.image_size} pixels: {result['parameters']:,} "
              f"parameters, {result['macs'] / 1e9:.2f} G multiply-adds an image\n"
              f"{result['machine']}\n"
              f"{'dtype':<10}{'batch':>7}{'images/s':>11}{'quartiles':>17}{'ms a batch':>12}"
              f"{'compile s':>11}", flush=True)
    for dtype in config.benchmark.dtypes:
        variables = meshes.put_state(_random_variables(model), mesh)
        for size in config.benchmark.batch_sizes:
            row = {"dtype": dtype, "batch_size": size, **measure(
                make(dtype=dtype), variables, size, config.benchmark.seconds, mesh)}
            result["rows"].append(row)
            if first:
                spread = f"{row['images_per_second_low']:.1f}-{row['images_per_second_high']:.1f}"
                print(f"{dtype:<10}{size:>7}{row['images_per_second']:>11.1f}{spread:>17}"
                      f"{row['milliseconds']:>12.2f}{row['compile_seconds']:>11.1f}", flush=True)
    if first:
        log.write_json(workdir / "benchmark.json", result)
    return result


def measure(model: Any, variables: dict, batch_size: int, seconds: float, mesh: Mesh
            ) -> dict[str, float]:
    """Compiles inference for one batch size and times it.

    Args:
        model: from models.create_model.
        variables: on the mesh.
        batch_size: images over all devices.
        seconds: of warming up, and again of measuring; three calls at the least.
        mesh: over which the batch is cut.

    Returns:
        Median and quartiles of images_per_second (_low, _high), milliseconds a batch (median),
        compile_seconds, calls.
    """
    shape = (batch_size // jax.process_count(), model.image_size, model.image_size, 3)
    pixels = np.random.default_rng(0).standard_normal(shape, np.float32)
    images = meshes.put_batch({"image": pixels}, mesh)["image"]
    began = time.perf_counter()
    apply = onednn.jit(partial(model.apply, train=False))
    apply.lower(variables, images).compile()  # a call finds it
    compiled = time.perf_counter() - began
    list(_time_calls(apply, variables, images, seconds))
    times = np.array(list(_time_calls(apply, variables, images, seconds)))
    low, middle, high = batch_size / np.quantile(times, [0.75, 0.5, 0.25])
    return {"images_per_second": float(middle), "images_per_second_low": float(low),
            "images_per_second_high": float(high),
            "milliseconds": 1000 * float(np.median(times)), "compile_seconds": compiled,
            "calls": len(times)}


def _time_calls(apply: Callable, variables: dict, images: jax.Array, seconds: float
                ) -> Iterator[float]:
    """Seconds of each call, until they sum up to `seconds`; three calls at the least."""
    total, calls = 0.0, 0
    while total < seconds or calls < 3:
        began = time.perf_counter()
        jax.block_until_ready(apply(variables, images))
        took = time.perf_counter() - began
        total, calls = total + took, calls + 1
        yield took


def _random_variables(model: Any) -> dict:
    """Random weights, and statistics of an identity: speed does not hang on values."""
    image = jnp.zeros((1, model.image_size, model.image_size, 3))
    return jax.jit(partial(model.init, train=False))(jax.random.key(0), image)


def describe_machine() -> str:
    """Devices, their kind and the versions that a figure hangs on, in one line."""
    device = jax.devices()[0]
    return (f"{jax.device_count()} {device.platform} device(s) ({device.device_kind}), "
            f"jax {jax.__version__}")
