"""The command: python -m tinyvit_jax.main --config=configs/X.py --workdir=DIR."""

from absl import flags

from tinyvit_jax import cli

cli.define_flags()
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval", "benchmark"],
    "train: run or resume; eval: measure WORKDIR's weights; benchmark: images a second.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other processes that Slurm, a TPU pod or Open MPI started.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where no scheduler says it.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", None, "This process's number, with --coordinator.")


def main() -> None:
    """Checks the config, joins the other processes, and hands over."""
    config, workdir = cli.read_flags()
    import jax

    if _DISTRIBUTED.value or _COORDINATOR.value:
        jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    cli.use_compilation_cache()
    from tinyvit_jax import benchmark, recipe

    if _MODE.value == "train":
        recipe.run(config, workdir, cli.typed_flags())
    elif _MODE.value == "eval":
        recipe.run_eval(config, workdir)
    else:
        benchmark.run(config, workdir)


if __name__ == "__main__":
    cli.run_command(main)
