"""The teacher pass: runs a teacher over the seeded views of a config and writes the store.

python tools/save_logits.py --config=configs/21m.py --estimate
python tools/save_logits.py --config=configs/X.py --workdir=DIR --config.teacher.name=NAME \
    --config.teacher.weights=FILE_OR_WORKDIR --config.store.path=STORE

Start it as often as you like, on any machines that share the store: each process captures shards
that no other is at, takes over those of processes that died, and ends when the store is complete.
A teacher of one's own is a function that is named by --config.teacher.name=module:function. One
that needs several machines at once runs with --distributed.
"""

from pathlib import Path

import ml_collections
from absl import flags

from tinyvit_jax import cli
from tinyvit_jax.log import format_seconds

cli.define_flags()
cli.define_process_flags()
_ESTIMATE = flags.DEFINE_bool(
    "estimate", False, "Print what the capture needs, by a bound and by a few batches of the "
    "teacher, and stop; exit code 1 if it won't fit.")


def main() -> None:
    """Estimates, then captures what is missing."""
    config, workdir = cli.read_flags()
    import jax

    cli.join_processes()
    cli.use_compilation_cache()
    cli.use_onednn(config)
    from tinyvit_jax import forecast, recipe, train

    data = train.open_data(config, evaluated=False)
    place = recipe.store_place(config, workdir)
    needs = forecast.estimate(config, data.train, data.order, place)
    if jax.process_index() == 0:
        print(f"{place.url}: {needs.views:,} views ({config.store.passes} passes over "
              f"{len(data.train):,} images), at most {needs.most_bytes:,} bytes in {needs.files:,} "
              f"files; {_tell_free(needs.free)}", flush=True)
    forecast.check_fits(needs, place, needs.missing / needs.shards)
    if _ESTIMATE.value:
        if jax.process_count() == 1:  # a few batches in each process would tell nothing of all
            _print_pilot(config, workdir, data, needs)
        return
    config.store.capture = True
    store, result = recipe.provide_store(config, workdir, data, cli.typed_flags())
    if jax.process_index() == 0:
        print(f"{place.url}: complete, {store.bytes_per_view():.1f} bytes a view, captured in "
              f"{result['capture_seconds']:.0f} s")


def _tell_free(free: int | None) -> str:
    return "its place does not say what is free" if free is None else (
        f"{free:,} bytes free on its disk")


def _print_pilot(config: ml_collections.ConfigDict, workdir: Path, data, needs) -> None:
    """Runs a few teacher batches, where there is a teacher, and prints what follows from them."""
    from tinyvit_jax import forecast, recipe, teachers
    from tinyvit_jax import mesh as meshes

    untrained = recipe.teaches_itself(config) and not (workdir / "teacher").exists()
    config = recipe.with_teacher(config, workdir)
    t = config.teacher
    if untrained or not (":" in t.name or t.weights):
        print("That is a bound, as there are no teacher weights to measure: name them by "
              "--config.teacher.weights, or a function by --config.teacher.name=module:function.")
        return
    views, mesh = recipe.make_views(config, data), meshes.make_mesh()
    meshes.check_rows(t.batch_size, "teacher.batch_size", 2 if data.order.paired else 1)
    teacher = teachers.make_teacher(t, tuple(data.train.class_names), views.spec.image_size, mesh,
                                    config.store.temperature)
    print("measuring a few teacher batches ...", flush=True)
    found = forecast.pilot(config, teacher, views, mesh)
    print(f"by {found.views:,} views of one process: {found.rate:,.4g} views/s (preparing views "
          f"{found.read:,.4g}, the teacher {found.teach:,.4g}, encoding {found.write:,.4g}); "
          f"{found.view_bytes:.1f} bytes a view, {found.count_bytes(needs):,} bytes in all")
    hours = [f"{needs.views / found.rate / 3600 / n:,.3g} with {n}" for n in (1, 2, 8, 64)]
    print(f"hours for the whole store, by the number of such processes: {', '.join(hours)} "
          f"({format_seconds(needs.views / found.rate)} alone)", flush=True)


if __name__ == "__main__":
    cli.keep_freed_memory()  # the teacher runs here
    cli.run_command(main)
