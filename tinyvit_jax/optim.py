"""From parameters to their update: AdamW as TinyViT's recipes set it, in optax."""

import re
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
import optax

from tinyvit_jax import packing


def make_schedule(config: ml_collections.ConfigDict, batch_size: int, steps: int,
                  steps_per_epoch: float) -> Callable[[jax.Array], jax.Array]:
    """The original's learning rate by update: linear warmup, then a cosine over all the steps.

    The cosine is not shifted by the warmup, and the original moves its schedule after the update,
    so update k runs at the value for k - 1 and updates 0 and 1 both at the warmup rate.

    Args:
        config: the `optim` section.
        batch_size: views in an update; rates are given for 512 where scale_by_batch is set.
        steps: updates in the run.
        steps_per_epoch: updates in an epoch.

    Returns:
        step int -> learning rate float32.
    """
    scale = batch_size / 512 if config.scale_by_batch else 1.0
    peak, start, low = (scale * rate for rate in (
        config.learning_rate, config.warmup_learning_rate, config.min_learning_rate))
    # A warmup that was asked for is one update at least, however short an epoch.
    warmup = max(int(config.warmup_epochs * steps_per_epoch), int(config.warmup_epochs > 0))

    def schedule(step: jax.Array) -> jax.Array:
        t = jnp.maximum(step - 1.0, 0.0)
        cosine = low + 0.5 * (peak - low) * (1 + jnp.cos(jnp.pi * jnp.minimum(t / steps, 1.0)))
        return jnp.where(t < warmup, start + t * (peak - start) / max(warmup, 1), cosine)

    return schedule


def decay_mask(params: dict) -> dict:
    """Which parameters weight decay touches.

    Not vectors, biases or attention bias tables, and of a ViT neither its positions nor the tokens
    that it learns: DeiT's and timm's rule. (MAE's pretraining decays the class token, and torch's
    AdamW by itself all there is.)
    """
    exempt = ("bias", "attention_biases", "pos_embed", "cls_token", "dist_token")
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p.ndim > 1 and path[-1].key not in exempt, params)


def layer_scales(params: dict, decay: float, depths: Sequence[int]) -> dict:
    """The factor of each parameter's learning rate under layer decay.

    Block i of n = sum(depths) has decay**(n-1-i); the stem that of block 0, a downsample that of
    the block beside it in its stage, the head 1. A ViT follows BEiT's and MAE's count, which its
    recipes are given in: block i has decay**(n-i), its patches, positions and class token
    decay**(n+1), and a distillation token 1, as it is new where a ViT is fine-tuned.
    """
    total = sum(depths)

    def block(names: list[str]) -> int:
        if "cls_token" in params:
            inside = re.fullmatch(r"blocks_(\d+)", names[0])
            front = names[0] in ("patch_embed", "cls_token", "pos_embed")
            return int(inside[1]) - 1 if inside else -2 if front else total - 1
        if names[0] in ("patch_embed", "stem"):
            return 0
        if names[0] == "visual":  # a CLIP: what comes before its blocks is block 0's
            inside = re.search(r"resblocks_(\d+)", "/".join(names))
            after = names[1] in ("ln_post", "proj")
            return int(inside[1]) if inside else (total - 1) * after
        stage = re.fullmatch(r"(layers|stages)_(\d+)", names[0])
        if not stage:
            return total - 1
        s = int(stage[2])
        inner = re.fullmatch(r"blocks_(\d+)", names[1])
        if inner or stage[1] == "stages":  # whose way down is at its start
            return sum(depths[:s]) + (int(inner[1]) if inner else 0)
        return sum(depths[: s + 1]) - 1

    return jax.tree_util.tree_map_with_path(
        lambda path, _: decay ** (total - 1 - block([p.key for p in path])), params)


def hold_frozen(params: dict, trainable: str) -> dict:
    """The parameters, with no gradient through those that `trainable` ("all", "head") leaves out.

    Where a whole trunk stands still, XLA drops its backward pass.
    """
    if trainable == "all":
        return params
    return {name: part if _learns(name, trainable) else jax.tree.map(jax.lax.stop_gradient, part)
            for name, part in params.items()}


def _learns(name: str, trainable: str) -> bool:
    """Whether a part of the model learns; a distillation head goes with the head."""
    return trainable == "all" or name in (trainable, f"{trainable}_dist")


def make_factors(config: ml_collections.ConfigDict, params: dict, depths: Sequence[int],
                 trainable: str = "all") -> Callable[[jax.Array], dict] | None:
    """The factor of every parameter's learning rate by update, or None where all are 1.

    The original's scheduler multiplies by the layer decay when it is set after an update, so its
    first update, at the warmup rate, goes without; ours too, but not where there is no warmup.

    Args:
        config: the `optim` section.
        params: the model's parameters (their names only).
        depths: blocks of each stage.
        trainable: "all", or "head": the factor of everything else is 0.

    Returns:
        step int -> a tree like params, of float32 scalars.
    """
    if config.layer_decay == 1.0 and trainable == "all":
        return None
    scales = layer_scales(params, config.layer_decay, depths)
    at_once = config.warmup_epochs <= 0
    moves = {name: _learns(name, trainable) for name in params}

    def factors(step: jax.Array) -> dict:
        def factor(scale: float, moving: bool) -> jax.Array | float:
            if not moving:
                return 0.0
            return scale if at_once else jnp.where(step > 0, scale, 1.0)

        return {name: jax.tree.map(partial(factor, moving=moves[name]), part)
                for name, part in scales.items()}

    return factors


def pack_by_decay(params: dict) -> packing.Packing:
    """The vectors that the optimiser sees in place of a model's parameters, or of their shapes."""
    return packing.make_packing(params, decay_mask(params))


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Clip by the global norm, Adam, decoupled weight decay.

    Learning rate and factors are not part of it: they are functions of the run's step, which goes
    on where an update is skipped and optax's own count does not.

    Args:
        config: the `optim` section.

    Returns:
        An optax transformation of the vectors of `pack_by_decay`; its update times the negative
        learning rate is to be added.
    """
    def decayed(vectors: dict) -> dict[str, bool]:
        return {name: name == "decayed" for name in vectors}

    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(
        *parts, optax.scale_by_adam(*config.betas, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed))
