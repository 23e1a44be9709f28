"""Mixing of pairs and normalisation, on the device: uint8 pixels in, what a model reads out."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def mix_pairs(image: jax.Array, lam: jax.Array, box: jax.Array) -> jax.Array:
    """Mixes rows 2k and 2k+1 with each other by CutMix (a box) or mixup (an empty box).

    Args:
        image: [B, H, W, 3], any real dtype, pixel values 0 to 255.
        lam: float32 [B/2], mixup's weight of the own image; CutMix's label weight is not used here.
        box: int32 [B/2, 4], y0 x0 y1 x1; pixels inside come from the partner.

    Returns:
        float32 [B, H, W, 3], pixel values 0 to 255.
    """
    height, width = image.shape[1:3]
    own = image.astype(jnp.float32)
    pairs = own.reshape(-1, 2, *own.shape[1:])
    partner = pairs[:, ::-1].reshape(own.shape)
    y0, x0, y1, x1 = (jnp.repeat(box[:, i], 2)[:, None] for i in range(4))
    rows, columns = jnp.arange(height)[None], jnp.arange(width)[None]
    inside = ((rows >= y0) & (rows < y1))[:, :, None] & ((columns >= x0) & (columns < x1))[:, None]
    cut = (y1 > y0) & (x1 > x0)
    keep = jnp.where(cut[:, :, None], 1.0 - inside, jnp.repeat(lam, 2)[:, None, None])[..., None]
    return keep * own + (1.0 - keep) * partner


def view_pixels(batch: Mapping[str, Any]) -> jax.Array:
    """The pixels that a model or a teacher should see: float32 [B, H, W, 3], 0 to 255."""
    if "lam" in batch:
        return mix_pairs(batch["image"], batch["lam"], batch["box"])
    return batch["image"].astype(jnp.float32)


def normalize(pixels: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Pixels 0-255 -> (pixels / 255 - mean) / std, float32, channel by channel."""
    return (pixels.astype(jnp.float32) / 255.0 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(
        std, jnp.float32)
