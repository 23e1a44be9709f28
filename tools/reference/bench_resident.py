"""What a small set in device memory saves: views of the host's pipeline against views made there.

Of a recipe for small images, with random pixels for a set: images a second of the views alone, and
of whole training updates, by turns in one process.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reference import bench_report
from reference.bench_end_to_end import ROOT, Case, load_config, make_steps
from reference.bench_step import count_steps
from reference.bench_timing import race, race_rows

HOST, DEVICE = "views, host's pipeline", "views, on the device"
TRAINED, RESIDENT = "training, host's pipeline", "training, on the device"
_ROUNDS = 7
_TURN = 0.5  # seconds of a turn, about


class Settings(NamedTuple):
    """What is measured."""

    config: str = "configs/cifar10.py:slides"
    images: int = 10_000
    batch: int = 0
    seconds: float = 10.0


MEANINGS = {
    "config": "a recipe with data.resident=True",
    "images": "of the set, which is of random pixels",
    "batch": "views of an update; 0 = the config's",
    "seconds": "that each side runs for, about",
}


def check_settings(settings: Settings) -> None:
    """Raises ValueError for what cannot be measured."""
    for name, lowest in (("images", 2), ("batch", 0), ("seconds", 0)):
        if getattr(settings, name) < lowest:
            raise ValueError(f"--{name}={getattr(settings, name)}: expected {lowest} or more")
    if not (ROOT / settings.config.partition(":")[0]).is_file():
        raise ValueError(f"--config={settings.config}: there is no such file in {ROOT}")
    from tinyvit_jax import memory, resident

    config = read_config(settings)  # what the device cannot do, the two sides would not both do
    resident.check(config, *_describe(config, settings.images), None, 1, memory.find_room())


class RandomSource:
    """Images of random pixels in ten classes, handed on as the sources of small sets do.

    Args:
        images: how many.
        side: of each, in pixels.
    """

    name, fingerprint = "random", "0" * 64
    class_names = tuple(f"class {i}" for i in range(10))

    def __init__(self, images: int, side: int):
        from tinyvit_jax.data import ppm

        pixels = np.random.default_rng(0).integers(0, 256, (images, side, side, 3), np.uint8)
        self._files = [ppm.encode(image) for image in pixels]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> Any:
        from tinyvit_jax.data.source import Example

        return Example(str(i), self._files[i], i % 10)

    def read(self, indices: Any) -> list[Any]:
        """Several examples at once, in the order asked for."""
        return [self[i] for i in indices]


def measure(settings: Settings, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Races the views, then the training.

    Args:
        settings: checked.
        folder: unused; no files are made.
        say: takes a line of progress.

    Returns:
        "views" and "training": rows of bench_timing.race_rows in images a second; "batch", "side".
    """
    from tinyvit_jax import config as configs

    case = make_case(settings)
    batch, side = case.config.train.batch_size, case.config.model.image_size
    found: dict[str, Any] = {"batch": batch, "side": side, "images": settings.images}
    say("views")
    found["views"] = _race(make_views(case), batch, HOST, settings.seconds)
    say("compiles training")
    on_host = make_steps(case, None, mixed=configs.mixes(case.config))
    training = {TRAINED: on_host.take, RESIDENT: _make_training(case)}
    say("training")
    found["training"] = _race(training, batch, TRAINED, settings.seconds)
    return found


def make_case(settings: Settings) -> Case:
    """A recipe and a set for it."""
    config = read_config(settings)
    return Case(config, RandomSource(settings.images, config.model.image_size), 10, None)


def read_config(settings: Settings) -> Any:
    """The recipe, with labels for an objective and the batch that is asked for."""
    config = load_config(settings.config)
    config.objective.name = "supervised"
    config.train.batch_size = settings.batch or config.train.batch_size
    return config


def make_views(case: Case) -> dict[str, Callable[[int], None]]:
    """fn(n) that makes n batches of views, for both sides."""
    return {HOST: _make_host_views(case), DEVICE: _make_device_views(case)}


def _race(turns: dict[str, Callable[[int], None]], batch: int, rival: str, seconds: float
          ) -> list[dict[str, Any]]:
    for turn in turns.values():
        turn(64)  # what was prepared meanwhile is used up
    counted = {name: count_steps(turn, batch, _TURN) for name, turn in turns.items()}
    return race_rows(race(counted, seconds, _ROUNDS)[0], (rival,))


def _describe(config: Any, images: int) -> tuple[Any, Any]:
    """The spec and the order of the views."""
    from tinyvit_jax import config as configs
    from tinyvit_jax.data import augment
    from tinyvit_jax.data.order import Order

    spec = augment.make_spec(config.augment, config.model.image_size)
    return spec, Order(0, images, configs.mixes(config))


def _make_host_views(case: Case) -> Callable[[int], None]:
    from tinyvit_jax import mesh as meshes
    from tinyvit_jax.data import pipeline

    mesh, batch = meshes.make_mesh(), case.config.train.batch_size
    views = pipeline.Views(case.source, *_describe(case.config, len(case.source)))
    stream = pipeline.batch_stream(
        pipeline.TrainBatches(views, batch, pipeline.Rows(0, batch), 1 << 20),
        threads=case.config.data.threads, prefetch=case.config.data.prefetch)

    def turn(steps: int) -> None:
        for _ in range(steps):
            meshes.put_batch(next(stream), mesh)["image"].block_until_ready()

    return turn


def _make_device_views(case: Case) -> Callable[[int], None]:
    """Batches in one loop, of each of which the sum is taken, so that none is left out."""
    import jax
    import jax.numpy as jnp

    from tinyvit_jax import mesh as meshes
    from tinyvit_jax import resident

    mesh, (spec, order) = meshes.make_mesh(), _describe(case.config, len(case.source))
    batch_of = resident.make_batches(spec, order, case.config.train.batch_size, mesh)
    arrays = meshes.put_state(resident.read_arrays(case.source, spec.image_size), mesh)

    @jax.jit
    def run(arrays: dict, steps: jax.Array) -> jax.Array:
        def body(step: jax.Array, total: jax.Array) -> jax.Array:
            batch = jax.lax.optimization_barrier(batch_of(arrays, step))
            return sum((x.astype(jnp.float32).sum() for x in batch.values()), total)

        return jax.lax.fori_loop(0, steps, body, jnp.float32(0))

    return lambda steps: run(arrays, jnp.int32(steps)).block_until_ready()


def _make_training(case: Case) -> Callable[[int], None]:
    """Updates from the set in device memory, as feed.Resident gives them."""
    import jax.numpy as jnp

    from tinyvit_jax import mesh as meshes
    from tinyvit_jax import optim, resident, train, weights

    config, mesh = case.config.copy_and_resolve_references(), meshes.make_mesh()
    config.objective.name = "supervised"
    model = weights.make_model(weights.complete(config.model), case.classes)
    spec, order = _describe(config, len(case.source))
    batch_of = resident.make_batches(spec, order, config.train.batch_size, mesh)
    arrays = meshes.put_state(resident.read_arrays(case.source, spec.image_size), mesh)

    state = meshes.put_state(train.init_state(config, model), mesh)
    schedule = optim.make_schedule(config.optim, config.train.batch_size, 10_000, 100.0)
    step = train.make_train_step(config, model, schedule, mesh)
    update, held = resident.make_update(step, batch_of, mesh), [state]

    def turn(steps: int) -> None:
        stop = int(held[0].step) + steps
        held[0], metrics = update(held[0], arrays, jnp.int32(stop))
        metrics["loss"].block_until_ready()

    return turn


_READING = """\
Images a second of batches of {batch} from {images:,} images of {side} pixels: median and quartiles
of turns of about {turn} s, by turns; the ratio is to the host's pipeline in the same rounds. Views
of the host are ready on the device, with as many threads as the config asks for."""


def format_result(result: dict[str, Any]) -> str:
    """The tables of tools/benchmark.py resident."""
    parts = [f"# A small set in device memory: {result['settings']['config']}\n\n"
             f"{bench_report.format_machine(result['machine'])}"]
    for name, rival in (("views", HOST), ("training", TRAINED)):
        parts.append(f"## {name.capitalize()}\n\n" + bench_report.format_table(
            ["", "images/s", "quartiles", "ratio", "quartiles", "rounds"],
            [[row["what"], f"{row['median']:,.0f}", f"{row['low']:,.0f}-{row['high']:,.0f}",
              *(f"{row['against'][rival]['median']:.2f}",
                f"{row['against'][rival]['low']:.2f}-{row['against'][rival]['high']:.2f}"),
              str(row["rounds"])] for row in result[name]]))
    reading = _READING.format(batch=result["batch"], images=result["images"], side=result["side"],
                              turn=_TURN)
    return "\n\n".join([*parts, reading]) + "\n"
