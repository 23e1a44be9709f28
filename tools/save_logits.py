"""The teacher pass: runs a teacher over the seeded views of a config and writes the store.

python tools/save_logits.py --config=configs/21m.py --estimate
python tools/save_logits.py --config=configs/X.py --workdir=DIR --config.teacher.name=NAME \
    --config.teacher.weights=FILE_OR_WORKDIR --config.store.path=STORE

It resumes at the first missing shard. A teacher of one's own is a function that is named by
--config.teacher.name=module:function.
"""

from absl import flags

from tinyvit_jax import cli

cli.define_flags()
_ESTIMATE = flags.DEFINE_bool(
    "estimate", False, "Print views, bytes and free disk, and stop; exit code 1 if it won't fit.")


def main() -> None:
    """Estimates, then captures what is missing."""
    config, workdir = cli.read_flags()
    cli.use_compilation_cache()
    from tinyvit_jax import capture, recipe, train

    data = train.open_data(config, evaluated=False)
    path = recipe.store_path(config, workdir)
    needed = capture.estimate(config, data.train, data.order, path)
    print(f"{path}: {needed['views']:,} views ({config.store.passes} passes over "
          f"{len(data.train):,} images), about {needed['bytes']:,} bytes; {needed['free']:,} bytes "
          f"free on its disk", flush=True)
    capture.check_fits(needed, path)
    if not _ESTIMATE.value:
        config.store.capture = True
        store, result = recipe.provide_store(config, workdir, data, cli.typed_flags())
        print(f"{path}: complete, {store.bytes_per_view():.1f} bytes a view, captured in "
              f"{result['capture_seconds']:.0f} s")


if __name__ == "__main__":
    cli.run_command(main)
