"""Checks a store: every checksum, then the teacher again on a sample of its views.

python tools/check_store.py --config=configs/X.py --workdir=DIR [--views=512] [--repair]

Exit code 0 if all is well, 1 if not; what is wrong is named by shard and block. --repair captures
damaged and missing shards again.
"""

from absl import flags

from tinyvit_jax import cli

cli.define_flags()
_VIEWS = flags.DEFINE_integer("views", 512, "How many views the teacher sees again.")
_REPAIR = flags.DEFINE_bool("repair", False, "Capture damaged and missing shards again.")


def main() -> int:
    """Verifies, repairs and compares; returns the exit code."""
    config, workdir = cli.read_flags()
    cli.use_compilation_cache()
    from tinyvit_jax import recipe

    problems, agreement = recipe.check_captured(config, workdir, _VIEWS.value, _REPAIR.value)
    for problem in problems:
        print("bad:", problem)
    if agreement:
        print(f"teacher again on {agreement['views']} views: largest KL {agreement['kl']:.2e}, "
              f"same top class on {agreement['top1']:.2%}")
    print("store is", "damaged" if problems else "good")
    if problems and not (agreement or _REPAIR.value):
        print("Run the same command with --repair to capture those shards again.")
    return 1 if problems else 0


if __name__ == "__main__":
    cli.keep_freed_memory()  # the teacher runs here
    cli.run_command(main)
