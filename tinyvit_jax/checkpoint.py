"""Checkpoints by orbax (the only file that imports it) and the weights of a finished run."""

import logging
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger("tinyvit_jax")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and says what to do."""


class Checkpoints:
    """The checkpoints of a run: the newest few and the best by top-1.

    A checkpoint appears under its final name only when it is whole (orbax writes beside it and
    renames), so a killed run leaves nothing half-written to be picked up.

    Args:
        folder: where they are.
        keep_last: newest to keep.
        keep_best: whether to keep the one with the highest top-1 too.
    """

    def __init__(self, folder: Path, keep_last: int = 1, keep_best: bool = False):
        from orbax.checkpoint import v1 as ocp

        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep_last)]
        if keep_best:
            kept.append(policies.BestN(get_metric_fn=lambda m: m["top1"], n=1,
                                       keep_checkpoints_without_metrics=False))
        self.folder = Path(folder).absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The newest step, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: Any, top1: float | None = None) -> None:
        """Saves in the background; the arrays are copied before this returns."""
        metrics = None if top1 is None else {"top1": top1}
        self._checkpointer.save_async(step, state, metrics=metrics)

    def restore(self, step: int, like: Any) -> Any:
        """Reads the checkpoint of `step` into arrays of the shapes and shardings of `like`."""
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        path = self.folder / str(step)
        try:
            return self._checkpointer.load(step, abstract)
        except (ValueError, KeyError, TypeError) as error:
            if self._differs_in_optimizer_alone(step, abstract):
                raise CheckpointError(
                    f"The checkpoint {path} holds this model, and the state of another optimiser: "
                    f"an earlier release of tinyvit_jax wrote it, or another optim. Finish the run "
                    f"with what began it; or start a new one from its weights, in another "
                    f"--workdir, with --config.model.init_from={self.folder.parent}"
                ) from error
            raise CheckpointError(
                f"The checkpoint {path} does not fit this model or is damaged: "
                f"{_reason(error)}. If the config changed, use another --workdir; if "
                f"the file is damaged, delete {path} and start again: the run resumes from the "
                f"checkpoint before it."
            ) from error

    def _differs_in_optimizer_alone(self, step: int, like: Any) -> bool:
        """Whether a checkpoint's list of arrays fits but for those of the optimiser."""
        try:
            saved = self._checkpointer.metadata(step).metadata
        except (ValueError, KeyError, TypeError, OSError):
            return False
        parts = like if isinstance(like, dict) else like._asdict()
        return isinstance(saved, dict) and saved.keys() == parts.keys() and [
            name for name, part in parts.items() if _shapes(part) != _shapes(saved[name])
        ] == ["opt_state"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_variables(folder: Path, which: int | str = "last") -> tuple[dict, int]:
    """The weights of a checkpoint as numpy arrays: the averaged ones where the run kept them.

    Args:
        folder: a run's `checkpoints` folder.
        which: a step, "last", or "best" by top-1 on the run's own evaluation images.

    Returns:
        ({"params", "batch_stats"}, step).
    """
    from orbax.checkpoint import v1 as ocp

    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} does not exist: no checkpoint was written there. Train "
                              f"first, or point at the workdir of a run that has trained.")
    with ocp.training.Checkpointer(Path(folder).absolute()) as checkpointer:
        step = _choose(checkpointer.checkpoints, which, folder)
        try:
            saved = checkpointer.metadata(step).metadata
            if saved is None:
                raise ValueError("the list of its arrays cannot be read")
            params = "ema" if jax.tree.leaves(saved["ema"]) else "params"
            state = checkpointer.load(step, _only(saved, (params, "batch_stats")))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(f"The checkpoint {folder}/{step} is damaged: {_reason(error)}. "
                                  f"Delete it to use the one before it.") from error
    to_host = {"params": state[params], "batch_stats": state["batch_stats"]}
    return jax.device_get(to_host), step


def find_step(folder: Path, which: int | str = "last") -> int:
    """The step of the checkpoint that `load_variables` would read, without reading it."""
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer(Path(folder).absolute()) as checkpointer:
        return _choose(checkpointer.checkpoints, which, folder)


def _choose(found, which: int | str, folder: Path) -> int:
    """The step that `which` means."""
    if not found:
        raise CheckpointError(f"{folder} holds no whole checkpoint. Train longer, or start the "
                              f"run again: it begins where it stopped.")
    if isinstance(which, int):
        return which
    rated = [c for c in found if c.metrics and "top1" in c.metrics]
    if which == "best" and rated:
        return max(rated, key=lambda c: (c.metrics["top1"], c.step)).step
    return found[-1].step


def _only(saved: dict, names: tuple[str, ...]) -> dict:
    """What to load: the named parts onto one local device, a placeholder for everything else."""
    from orbax.checkpoint import v1 as ocp

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def array(x) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)

    return {name: jax.tree.map(array if name in names else lambda _: ocp.PLACEHOLDER, part)
            for name, part in saved.items()}


def _shapes(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a tree by path, however their containers are called."""
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), tuple(x.shape))
            for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def _reason(error: BaseException) -> str:
    """The innermost cause's first line: orbax wraps what really went wrong several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
