"""The command: python -m tinyvit_jax.main --config=configs/X.py --workdir=DIR."""

from absl import flags

from tinyvit_jax import cli

cli.define_flags()
cli.define_process_flags()
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval", "benchmark"],
    "train: run or resume; eval: measure WORKDIR's weights; benchmark: images a second.")


def main() -> None:
    """Checks the config, joins the other processes, and hands over."""
    config, workdir = cli.read_flags()
    cli.join_processes()
    cli.use_compilation_cache()
    cli.use_onednn(config)
    from tinyvit_jax import benchmark, recipe

    if _MODE.value == "train":
        recipe.run(config, workdir, cli.typed_flags())
    elif _MODE.value == "eval":
        recipe.run_eval(config, workdir)
    else:
        benchmark.run(config, workdir)


if __name__ == "__main__":
    cli.keep_freed_memory()
    cli.run_command(main)
