"""Small image sets that live on the devices, and the views of them drawn there.

A set such as CIFAR-10 is 150 MB as pixels. Decoded once and put on every device, its views need
nothing from the host: image and seed of a place, crop, flip, colours and mixing follow there from
the step's number, by the law and the draws of data/order.py and data/augment.py. So an update and
the making of its batch are one compiled loop over as many steps as nobody looks at.

Crops and flips are those of the host, pixel by pixel. What hangs on a fraction (the strength of a
jitter, the share of a mixture) is drawn to 24 bits here and to 53 there, so that a pixel may differ
by a level and CutMix's box by a pixel.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from tinyvit_jax import hashing, onednn
from tinyvit_jax import mesh as meshes
from tinyvit_jax.data import ops, slots
from tinyvit_jax.data.images import ImageSource
from tinyvit_jax.data.order import AnyOrder, Order
from tinyvit_jax.data.spec import Spec

_READ = 1024  # images read at once
_TRIES = 32  # at a number of Beta(alpha, alpha); of alpha 1, half fail, of smaller ones fewer
# Weights of grey by ITU-R 601 as PIL has them, in 1/65536, and a half to round by.
_LUMA, _HALF = (19595, 38470, 7471), 32768


class ResidentError(ValueError):
    """A run whose views cannot be made on the devices; the message says which setting it is."""


def check(config: ml_collections.ConfigDict, spec: Spec, order: AnyOrder, store: Any, steps: int,
          limit: int) -> Order:
    """Raises ResidentError where views or targets hang on what only the host can do.

    Args:
        config: of the run.
        spec: of its views.
        order: of its views.
        store: of a teacher's targets, or None.
        steps: of the run.
        limit: bytes of memory that a device and the host have, from `memory.find_room`.

    Returns:
        The order, which is a formula.
    """
    reasons, batch_size = [], config.train.batch_size
    if spec.spec != "small":
        reasons.append(f"augment.spec={spec.spec}: only small (pad, crop, flip) is drawn there")
    if spec.rand_augment:
        reasons.append(f"augment.rand_augment={spec.rand_augment}: set it to ''")
    if spec.erase:
        reasons.append(f"augment.erase={spec.erase}: set it to 0")
    objective = config.objective.name
    if store is not None or not isinstance(order, Order) or objective != "supervised":
        reasons.append(f"objective.name={objective}: a store is read by the host, and a live "
                       f"teacher is a program of its own; labels alone are there")
    size = count_bytes(order.num_images, spec.image_size) if isinstance(order, Order) else 0
    if size > limit:
        reasons.append(f"the set takes {size / 1e9:.1f} GB as pixels of {spec.image_size} x "
                       f"{spec.image_size}, and there are {limit / 1e9:.1f} GB")
    if steps * batch_size >= 2**31:
        reasons.append(f"{steps * batch_size:,} views, expected fewer than {2**31:,}")
    if reasons:
        raise ResidentError("--config.data.resident=True cannot work here: " + "; ".join(reasons)
                            + ". Or set --config.data.resident=False.")
    assert isinstance(order, Order)
    return order


def count_bytes(num_images: int, image_size: int) -> int:
    """Bytes of a set's pixels and labels on each device."""
    return num_images * (3 * image_size**2 + 4)


def read_arrays(source: ImageSource, image_size: int) -> dict[str, np.ndarray]:
    """Decodes a whole set: "image" uint8 [N, S, S, 3] as views begin with it, "label" int32 [N].

    Images of other sizes are resized as `augment.apply_view` does before it pads.
    """
    images = np.empty((len(source), image_size, image_size, 3), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), _READ):
        stop = min(start + _READ, len(source))
        for i, example in enumerate(source.read(range(start, stop)), start):
            images[i] = ops.resize(ops.decode(example.image, example.key), image_size, image_size)
            labels[i] = example.label
    return {"image": images, "label": labels}


def make_batches(spec: Spec, order: Order, batch_size: int, mesh: Mesh
                 ) -> Callable[[dict[str, jax.Array], jax.Array], dict[str, jax.Array]]:
    """Makes fn(arrays, step) -> the Batch of a step, to be called inside a compiled function.

    Args:
        spec: of the views; `check` has passed it.
        order: of the run.
        batch_size: rows over all devices.
        mesh: over which batches are cut.

    Returns:
        fn: arrays from `read_arrays` on the devices, step int32 -> image uint8 [B, S, S, 3], label
        int32 [B], weight float32 [B]; lam float32 [B/2] and box int32 [B/2, 4] where pairs are
        mixed: as pipeline.TrainBatches[step].
    """
    rows = meshes.sharded(mesh)

    def batch_of(arrays: dict[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
        view = step * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        place = view // order.views_per_pass, view % order.views_per_pass
        index, seed = hashing.view_keys(order.seed, order.num_images, *place)
        index, seed = jax.lax.with_sharding_constraint((index, seed), rows)
        batch = {"image": make_views(arrays["image"][index], seed, spec),
                 "label": arrays["label"][index], "weight": jnp.ones(batch_size, jnp.float32)}
        if order.paired:
            batch["lam"], batch["box"] = draw_mix(seed[::2] ^ seed[1::2], spec)
        return jax.lax.with_sharding_constraint(batch, rows)

    return batch_of


def make_views(images: jax.Array, seed: jax.Array, spec: Spec) -> jax.Array:
    """The views of a batch of images: augment.sample_view and augment.apply_view.

    Args:
        images: uint8 [B, S, S, 3].
        seed: uint32 [B].
        spec: `check` has passed it.

    Returns:
        uint8 [B, S, S, 3].
    """
    size, pad = spec.image_size, spec.pad
    top, left = (hashing.scaled(hashing.draw(seed, slot), 2 * pad + 1)
                 for slot in (slots.TOP, slots.LEFT))
    flip = hashing.below(hashing.draw(seed, slots.FLIP), spec.flip)
    # A crop of a padded image is the image moved: where it came from, row by row and column by
    # column, flipped or not. What lies outside is black.
    along = jnp.arange(size)
    rows = along + top[:, None] - pad
    columns = jnp.where(flip[:, None], size - 1 - along, along) + left[:, None] - pad
    inside = [(i >= 0) & (i < size) for i in (rows, columns)]
    take = jax.vmap(lambda image, r, c: image[r][:, c])
    moved = take(images, jnp.clip(rows, 0, size - 1), jnp.clip(columns, 0, size - 1))
    moved = jnp.where((inside[0][:, :, None] & inside[1][:, None, :])[..., None], moved, 0)
    if spec.color_jitter:
        moved = _jitter(moved, seed, spec.color_jitter)
    if spec.greyscale:
        grey = hashing.below(hashing.draw(seed, slots.GREY), spec.greyscale)
        moved = jnp.where(grey[:, None, None, None], _luma(moved), moved)
    return moved


def _jitter(images: jax.Array, seed: jax.Array, strength: float) -> jax.Array:
    """Brightness, contrast and saturation in a drawn order: augment._sample_jitter."""
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = [low + (high - low) * hashing.uniform(hashing.draw(seed, slots.JITTER + 1 + i))
               for i in range(3)]
    order = hashing.scaled(hashing.draw(seed, slots.JITTER), 6)
    # Of the six orders in itertools.permutations' sequence: which operation comes as number k.
    orders = jnp.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])[order]
    for k in range(3):
        chosen = orders[:, k, None, None, None]
        grey = _luma(images)
        mean = jnp.floor(grey.astype(jnp.float32).mean((1, 2, 3), keepdims=True) + 0.5)
        base = jnp.where(chosen == 0, 0.0, jnp.where(chosen == 1, mean, grey.astype(jnp.float32)))
        factor = jnp.stack(factors, -1)[jnp.arange(len(seed)), orders[:, k]][:, None, None, None]
        images = jnp.clip(base + factor * (images.astype(jnp.float32) - base), 0, 255).astype(
            jnp.uint8)
    return images


def _luma(images: jax.Array) -> jax.Array:
    """Grey levels, rounded as PIL rounds them: uint8 [B, H, W, 3] -> uint8 [B, H, W, 1]."""
    total = (images.astype(jnp.int32) * jnp.array(_LUMA)).sum(-1, keepdims=True) + _HALF
    return (total >> 16).astype(jnp.uint8)


def draw_mix(seed: jax.Array, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """How pairs are mixed: augment.sample_mix.

    Args:
        seed: uint32 [P], of one view XOR of the other.
        spec: `check` has passed it.

    Returns:
        lam float32 [P] and box int32 [P, 4].
    """
    def bits(slot: int) -> hashing.Word:
        return hashing.draw(seed, slot)

    mixed = hashing.below(bits(slots.MIX), spec.mix_prob)
    if spec.mixup and spec.cutmix:
        cuts = hashing.below(bits(slots.SWITCH), spec.mix_switch)
    else:
        cuts = jnp.full(seed.shape, spec.cutmix > 0)
    lam = jnp.ones(seed.shape)
    for alpha, chosen in ((spec.mixup, ~cuts), (spec.cutmix, cuts)):
        if alpha:
            lam = jnp.where(chosen & mixed, _draw_beta(seed, alpha), lam)
    size = spec.image_size
    half = jnp.floor(size * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
    y, x = (hashing.scaled(bits(slot), size) for slot in (slots.MIX_TOP, slots.MIX_LEFT))
    box = jnp.stack([jnp.maximum(y - half, 0), jnp.maximum(x - half, 0),
                     jnp.minimum(y + half, size), jnp.minimum(x + half, size)], -1)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    box = jnp.where((cuts & mixed & (area > 0))[:, None], box, 0)
    return jnp.where(cuts & mixed, 1 - area / size**2, lam).astype(jnp.float32), box


def _draw_beta(seed: jax.Array, alpha: float) -> jax.Array:
    """Numbers of Beta(alpha, alpha) by Joehnk's rejection: uint32 [P] -> float32 [P].

    The chance that every attempt fails is below 1e-9 for an alpha up to 1; then it is the last one.
    """
    pairs = [tuple(jnp.log1p(-hashing.uniform(hashing.draw(seed, slots.BETA + 2 * i + j))) / alpha
                   for j in (0, 1)) for i in range(_TRIES)]
    lam = jnp.zeros(seed.shape)
    for x, y in reversed(pairs):
        fits = jnp.exp(x) + jnp.exp(y) <= 1
        lam = jnp.where(fits | (lam == 0), jax.nn.sigmoid(x - y), lam)
    return lam


def list_stops(start: int, steps: int, *marks: set[int]) -> Iterator[int]:
    """The steps after which the host looks at a run, ascending from after `start` to `steps`."""
    stops = sorted({steps}.union(*marks))
    return (stop for stop in stops if start < stop <= steps)


def make_update(train_step: Callable, batch_of: Callable, mesh: Mesh) -> Callable:
    """Compiles many updates, each with the making of its batch, into one loop.

    Args:
        train_step: (state, batch) -> (state, metrics), not compiled.
        batch_of: from `make_batches`.
        mesh: of the run.

    Returns:
        fn(state, arrays, stop int32) -> (state, metrics): all updates up to number `stop`, and the
        means of their metrics ("skipped" and "learning_rate": the last ones'). The state is
        donated. How many updates they are is no part of the program.
    """
    whole = meshes.replicated(mesh)

    def run(state: Any, arrays: dict[str, jax.Array], stop: jax.Array) -> tuple[Any, dict]:
        def once(state: Any) -> tuple[Any, dict]:
            return train_step(state, batch_of(arrays, state.step))

        def body(carry: tuple[Any, dict]) -> tuple[Any, dict]:
            state, total = carry
            state, metrics = once(state)
            last = {name: metrics[name] for name in ("skipped", "learning_rate")}
            return state, {name: total[name] + metrics[name] for name in total} | last

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(once, state)[1])
        before = state.step
        state, total = jax.lax.while_loop(lambda carry: carry[0].step < stop, body, (state, zero))
        count = jnp.maximum(state.step - before, 1).astype(jnp.float32)
        return state, {name: x if name in ("skipped", "learning_rate") else x / count
                       for name, x in total.items()}

    return onednn.jit(run, donate_argnums=0, out_shardings=(whole, whole))
