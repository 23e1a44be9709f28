"""Whether a run that is started again is the same run: config.json in its workdir."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_collections

from tinyvit_jax import log


class ResumeError(RuntimeError):
    """A workdir that holds another run; the message names what differs."""


# What may change between a run and its resumption without changing a number of it.
_FREE = ("data.workers", "data.threads", "data.prefetch", "data.source", "data.eval_source",
         "data.data_dir", "log_every", "checkpoint", "store.path", "store.capture", "store.codec",
         "store.shard_views", "store.block_views",
         "store.teacher", "store.replay", "store.lease", "store.cache", "store.cache_gb", "teacher",
         "train.max_skipped", "eval.batch_size", "eval.checkpoint", "eval.image_size", "benchmark",
         "compare", "label_only_twin", "export_torch", "onednn")

# What runs did whose config had no such key yet.
_BEFORE = {"augment.pixels": "exact", "augment.greyscale": 0.0, "objective.temperature": 1.0,
           "objective.alpha": 0.5, "objective.kind": "soft", "store.temperature": 1.0,
           "store.tail": "uniform", "model.dropout": -1.0, "model.patch_size": 0,
           "model.mlp_dims": [], "model.token_layout": "", "model.pool": "", "model.positions": "",
           "model.norm_order": "", "model.layer_scale": 0.0,
           "data.resident": False}


def record_config(config: ml_collections.ConfigDict, workdir: Path, images: dict[str, str],
                  others: dict[str, Any] | None = None) -> None:
    """Writes config.json, or checks that the workdir's own says the same.

    A run that never came to a line of metrics or a checkpoint binds nobody: what kept it from
    beginning may have been a setting.

    Args:
        config: of the run.
        workdir: where it lives.
        images: fingerprint of each image set; a folder may move between two starts.
        others: what else must stay the same, such as a live teacher's description.

    Raises:
        ResumeError: the workdir holds a run of another config.
    """
    path = workdir / "config.json"
    own = json.loads(config.to_json_best_effort())
    own |= {"images": images, **(others or {})}
    begun = (workdir / "metrics.jsonl").exists() or any(workdir.glob("checkpoints/*"))
    before, now = _BEFORE | _flat((log.read_json(path) if begun else None) or own), _flat(own)
    changed = [k for k in sorted(before.keys() | now.keys())
               if before.get(k) != now.get(k)
               and not any(k == f or k.startswith(f + ".") for f in _FREE)]
    if changed:
        listed = "; ".join(f"{k} was {before.get(k)}, now {now.get(k)}" for k in changed[:6])
        raise ResumeError(
            f"{workdir} holds a run of another config: {listed}. Resume it with the same "
            f"settings, or start a new run in another --workdir.")
    if jax.process_index() == 0:
        log.write_json(path, own)


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    out: dict[str, Any] = {}
    for k, v in tree.items():
        out |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return out
