"""Augmented views of images as pure functions: seed -> View, (image, View) -> pixels.

The teacher saw a view years ago on another machine; training must show the student the same pixels.
So a view is a tuple of plain numbers, drawn from its seed alone and from numbered slots
(`data.draws`), and applied by operations that depend on nothing else. What a view looks like also
hangs on a Spec, which a store keeps and training compares field by field.

Frozen: a change that moves a draw or a pixel is a new VERSION.

The spec "microsoft" is the one exception: its views are the original's, in data/microsoft.py, and
only `replay_batch` and `sample_mix` know them.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tinyvit_jax.data import draws, microsoft, ops, rand_augment, slots
from tinyvit_jax.data.spec import (
    NO_BOX,
    VERSION,
    Box,
    Spec,
    SpecError,
    from_dict,
    make_spec,
    to_dict,
)

__all__ = ["NO_BOX", "VERSION", "Box", "Spec", "SpecError", "View", "apply_view", "crop_box",
           "eval_view", "from_dict", "make_spec", "replay", "replay_batch", "sample_mix",
           "sample_view", "to_dict"]

_ATTEMPTS = 10  # at a crop or an erased rectangle that fits
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)
_VIEW_CROP, _VIEW_RATIO = "center", 224 / 256  # the view of "none"


class View(NamedTuple):
    """One augmented view, before it meets its image. Only what the Spec switches on is not empty.

    Attributes:
        crop: (area fraction, aspect ratio) of each attempt at a crop.
        top: where the crop begins in its free range, in [0, 1).
        left: likewise.
        flip: mirrored or not.
        ops: (name, argument) of RandAugment or of the colour jitter and then of turning grey, in
            order of application.
        erase: the erased rectangle, or NO_BOX.
        noise: the key of the noise in it.
    """

    crop: tuple[tuple[float, float], ...]
    top: float
    left: float
    flip: bool
    ops: rand_augment.Applied
    erase: Box
    noise: int


def replay(data: bytes, name: str, seed: int, spec: Spec) -> np.ndarray:
    """Decodes an image and makes the view of a seed: `replay_batch` for one.

    Args:
        data: the file's bytes.
        name: what to call the image in an error.
        seed: of the view.
        spec: the augmentation.

    Returns:
        uint8 [S, S, 3], S = spec.image_size.

    Raises:
        ops.ImageError: for bytes that are no image, or not all of one.
    """
    return next(replay_batch([(data, name)], [seed], spec))


def replay_batch(images: Sequence[tuple[bytes, str]], seeds: Sequence[int], spec: Spec
                 ) -> Iterator[np.ndarray]:
    """Decodes images and makes a view of each: the one function for every spec.

    All views are drawn and placed before the first is decoded. Python that runs on its own finds
    its code in the core's cache; in between pixels it has to be fetched again for each view.

    Args:
        images: (the file's bytes, what to call the image in an error) of each.
        seeds: of the views, as many.
        spec: the augmentation.

    Yields:
        uint8 [S, S, 3] of each, S = spec.image_size.

    Raises:
        ops.ImageError: for bytes that are no image, or not all of one.
    """
    if spec.spec != "imagenet":
        for (data, name), seed in zip(images, seeds, strict=True):
            yield (microsoft.replay(data, name, seed, spec) if spec.spec == "microsoft" else
                   apply_view(ops.decode(data, name), sample_view(seed, spec), spec))
        return
    size = spec.image_size
    views = [_sample_but_crop(seed, spec) for seed in seeds]
    windows = [ops.find_window(data, name, functools.partial(_place_seeds_crop, seed, view, spec))
               for (data, name), seed, view in zip(images, seeds, views, strict=True)]
    for window, view in zip(windows, views, strict=True):
        pixels = ops.decode_window(window, enough=0 if spec.pixels == "exact" else size)
        yield _finish(ops.resize(pixels, size, size, spec.pixels), view, spec)


def _place_seeds_crop(seed: int, view: View, spec: Spec, height: int, width: int) -> Box:
    """The crop of a view that was sampled without one."""
    # Mostly the first attempt fits, and to draw all ten takes as long as all the other draws.
    return _place_crop(_draw_crops(seed, spec), view, spec, height, width)


def sample_view(seed: int, spec: Spec) -> View:
    """Draws a view from its seed, a whole number of up to 64 bits.

    Raises:
        SpecError: for "microsoft", whose draws depend on the size of the image.
    """
    if spec.spec == "microsoft":
        raise SpecError("A view of augment.spec=microsoft cannot be drawn without its image: use "
                        "augment.replay, or microsoft.sample_view with the image's size.")
    if spec.spec == "none":
        return View((), 0.0, 0.0, False, (), NO_BOX, 0)
    crop = tuple(_draw_crops(seed, spec)) if spec.spec == "imagenet" else ()
    return _sample_but_crop(seed, spec)._replace(crop=crop)


def _draw_crops(seed: int, spec: Spec) -> Iterator[tuple[float, float]]:
    """Every attempt at a crop, drawn as one looks at it."""
    return (_area_and_ratio(seed, slots.CROP_TRY + 2 * i, spec.scale, spec.ratio)
            for i in range(_ATTEMPTS))


def _sample_but_crop(seed: int, spec: Spec) -> View:
    """A view without attempts at a crop."""
    box = _sample_erased(seed, spec)
    return View(
        crop=(),
        top=draws.unit(seed, slots.TOP),
        left=draws.unit(seed, slots.LEFT),
        flip=draws.unit(seed, slots.FLIP) < spec.flip,
        ops=_sample_ops(seed, spec),
        erase=box,
        noise=draws.hash64(seed, slots.ERASE_NOISE) if box != NO_BOX else 0,
    )


def _area_and_ratio(seed: int, slot: int, area: tuple[float, float],
                    ratio: tuple[float, float]) -> tuple[float, float]:
    """An area, uniform, and an aspect ratio, uniform in its logarithm."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    fraction = area[0] + (area[1] - area[0]) * draws.unit(seed, slot)
    # Rounded here and wherever a logarithm, power or cosine leads to pixels: platforms differ in
    # its last bit, and no pixel may hang on that.
    return fraction, round(math.exp(low + (high - low) * draws.unit(seed, slot + 1)), 9)


def _sample_ops(seed: int, spec: Spec) -> rand_augment.Applied:
    applied = rand_augment.sample(seed, rand_augment.parse(spec.rand_augment), slots.OPS) if (
        spec.rand_augment) else _sample_jitter(seed, spec)
    if spec.greyscale and draws.unit(seed, slots.GREY) < spec.greyscale:
        applied += _TO_GREY
    return applied


_TO_GREY = (("ColorIncreasing", 0.0),)  # no saturation is PIL's grey, on all three channels
_JITTERS = tuple(itertools.permutations(
    ("BrightnessIncreasing", "ContrastIncreasing", "ColorIncreasing")))


def _sample_jitter(seed: int, spec: Spec) -> rand_augment.Applied:
    """Brightness, contrast and saturation in a drawn order, factors of 1 -+ the strength."""
    if not spec.color_jitter:
        return ()
    low, high = max(0.0, 1 - spec.color_jitter), 1 + spec.color_jitter
    order = _JITTERS[int(draws.unit(seed, slots.JITTER) * len(_JITTERS))]
    own = {name: slots.JITTER + 1 + i for i, name in enumerate(_JITTERS[0])}
    return tuple((name, low + (high - low) * draws.unit(seed, own[name])) for name in order)


def _sample_erased(seed: int, spec: Spec) -> Box:
    """The rectangle of Random Erasing (Zhong et al., 2020), or NO_BOX."""
    if draws.unit(seed, slots.ERASE) >= spec.erase:
        return NO_BOX
    size = spec.image_size
    for i in range(_ATTEMPTS):
        area, ratio = _area_and_ratio(seed, slots.ERASE_TRY + 2 * i, _ERASED_AREA, _ERASED_RATIO)
        h = round(math.sqrt(area * size * size * ratio))
        w = round(math.sqrt(area * size * size / ratio))
        if h < size and w < size:
            y = int(draws.unit(seed, slots.ERASE_TOP) * (size - h + 1))
            x = int(draws.unit(seed, slots.ERASE_LEFT) * (size - w + 1))
            return (y, x, y + h, x + w) if h and w else NO_BOX
    return NO_BOX


def crop_box(view: View, spec: Spec, height: int, width: int) -> Box:
    """Where the random resized crop of a view lies in an image of a given size.

    The first attempt that fits is taken; where none of them does, the largest central crop whose
    aspect ratio is allowed (the rule of torchvision and timm).
    """
    return _place_crop(view.crop, view, spec, height, width)


def _place_crop(attempts: Iterable[tuple[float, float]], view: View, spec: Spec, height: int,
                width: int) -> Box:
    for area, ratio in attempts:
        w = round(math.sqrt(area * height * width * ratio))
        h = round(math.sqrt(area * height * width / ratio))
        if 0 < w <= width and 0 < h <= height:
            y, x = int(view.top * (height - h + 1)), int(view.left * (width - w + 1))
            return y, x, y + h, x + w
    low, high = spec.ratio
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    y, x = (height - h) // 2, (width - w) // 2
    return y, x, y + h, x + w


def apply_view(image: np.ndarray, view: View, spec: Spec) -> np.ndarray:
    """Makes the pixels of a view.

    Args:
        image: uint8 [h, w, 3] RGB, of any size.
        view: from `sample_view` with the same spec.
        spec: the augmentation.

    Returns:
        uint8 [S, S, 3], S = spec.image_size.
    """
    if spec.spec == "none":
        return eval_view(image, spec.image_size, _VIEW_CROP, _VIEW_RATIO)
    size = spec.image_size
    if spec.spec == "imagenet":
        y0, x0, y1, x1 = crop_box(view, spec, *image.shape[:2])
        image = ops.resize(ops.crop(image, y0, x0, y1 - y0, x1 - x0), size, size,
                           spec.pixels)
    else:
        free = 2 * spec.pad + 1
        image = ops.pad(ops.resize(image, size, size), spec.pad)
        image = ops.crop(image, int(view.top * free), int(view.left * free), size, size)
    return _finish(image, view, spec)


def _finish(image: np.ndarray, view: View, spec: Spec) -> np.ndarray:
    """All of a view after its crop: uint8 [S, S, 3], or 4 bytes a pixel, -> [S, S, 3]."""
    image = ops.flip(image) if view.flip else ops.as_rgb(image)
    operations = rand_augment.BY_PIXELS[spec.pixels]
    for name, argument in view.ops:
        image = operations[name](image, argument, spec.fill)
    if view.erase != NO_BOX:
        image = ops.erase(image, view.erase, view.noise, _noise_tables(spec.mean, spec.std))
    return image


_noise_tables = functools.lru_cache(maxsize=16)(ops.make_noise_tables)


def sample_mix(seed_a: int, seed_b: int, spec: Spec) -> tuple[float, Box]:
    """Draws how the two views of a pair are mixed with each other.

    Args:
        seed_a: seed of one view of the pair.
        seed_b: seed of the other; the order does not matter.
        spec: the augmentation.

    Returns:
        lam in [0, 1], the weight of a view's own label, and a box. Inside the box a view shows its
        partner's pixels. With an empty box it shows lam * own + (1 - lam) * partner; lam = 1 with
        an empty box is a view that is not mixed.
    """
    seed = seed_a ^ seed_b
    if spec.spec == "microsoft":
        return microsoft.sample_mix(seed, spec)
    if not (spec.mixup or spec.cutmix) or draws.unit(seed, slots.MIX) >= spec.mix_prob:
        return 1.0, NO_BOX
    both = spec.mixup > 0 and spec.cutmix > 0
    cuts = draws.unit(seed, slots.SWITCH) < spec.mix_switch if both else spec.cutmix > 0
    lam = _beta(seed, spec.cutmix if cuts else spec.mixup)
    return _cut_box(seed, lam, spec.image_size) if cuts else (lam, NO_BOX)


def _beta(seed: int, alpha: float) -> float:
    """A number of Beta(alpha, alpha) by Joehnk's rejection (Metrika 8, 1964), to nine decimals."""
    for slot in itertools.count(slots.BETA, 2):
        x = math.log(1 - draws.unit(seed, slot)) / alpha
        y = math.log(1 - draws.unit(seed, slot + 1)) / alpha
        # With a small alpha both powers underflow; their ratio, from the logarithms, does not.
        if math.exp(x) + math.exp(y) <= 1:
            return round(1 / (1 + math.exp(min(y - x, 700.0))), 9)
    raise AssertionError("itertools.count does not end")


def _cut_box(seed: int, lam: float, size: int) -> tuple[float, Box]:
    """CutMix's box (Yun et al., 2019) around a drawn centre, clipped; lam is what it leaves."""
    half = int(size * math.sqrt(1 - lam)) // 2
    y, x = (int(draws.unit(seed, slot) * size) for slot in (slots.MIX_TOP, slots.MIX_LEFT))
    y0, x0, y1, x1 = max(y - half, 0), max(x - half, 0), min(y + half, size), min(x + half, size)
    area = (y1 - y0) * (x1 - x0)
    return (1 - area / (size * size), (y0, x0, y1, x1)) if area else (1.0, NO_BOX)


def eval_view(image: np.ndarray, image_size: int, crop: str, crop_ratio: float) -> np.ndarray:
    """The view an image is evaluated in.

    Args:
        image: uint8 [h, w, 3] RGB.
        image_size: side S of the view in pixels.
        crop: "center" resizes the short side to floor(S / crop_ratio), the long side to its share
            rounded down, and cuts out the centre (offsets rounded half to even), as torchvision
            and timm do; "square" resizes to S x S whatever the shape.
        crop_ratio: side of the centre crop by the short side.

    Returns:
        uint8 [S, S, 3]; an image of just that size comes back untouched.
    """
    h, w = image.shape[:2]
    if (h, w) == (image_size, image_size):
        return image
    if crop == "square":
        return ops.resize_bicubic(image, image_size, image_size)
    if crop != "center":
        raise SpecError(f"--config.eval.crop={crop} is unknown: expected center or square.")
    short = int(image_size / crop_ratio)
    height, width = (short, int(short * w / h)) if h <= w else (int(short * h / w), short)
    top, left = round((height - image_size) / 2), round((width - image_size) / 2)
    return ops.resize_bicubic(image, height, width, top, left, image_size, image_size)
