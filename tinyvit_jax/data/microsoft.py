"""The original's own views, for stores it wrote: its draws in its order, and PIL's pixels.

A view is drawn from numpy's Generator(PCG64(seed)), one number after the other: crop, flip,
RandAugment, erasing (Wu et al., ECCV 2022, section 3.1; the rules are those of the published code,
folder data/augmentation). How many numbers the crop takes depends on the size of the image, so a
view can only be drawn together with it.

Equal to the original, byte for byte: everything up to the erased rectangle, and which rectangle it
is. The noise in it is the same draws, put back to pixels because a Batch is uint8: inside
[0, 255] a value is off by half a level at most (0.5 / 255 / std: 0.0086, 0.0088 and 0.0087 in
normalised units for red, green and blue), and what lies beyond is cut off at the ends (2.9, 2.8 and
4.0 % of the values). The normalisation is ImageNet's, the student's in the original; its teacher
saw noise and fill colour of its own normalisation, so not even there were they the student's.

numpy promises the same bits from PCG64 and MT19937 for ever, but not from the methods of Generator;
tests hold them to recorded views, and say which releases were compared. Resizing goes across
before down, which is the order of every Pillow up to 12; Pillow 13 turns it round for some shapes.
"""

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from tinyvit_jax.data import ops, rand_augment
from tinyvit_jax.data.spec import NO_BOX, Box, Spec

_ATTEMPTS = 10  # at a crop or an erased rectangle that fits
_REFERENCE = 224  # side of the square that erased rectangles are drawn in, whatever the view's
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))
_NOISE_SEEDS = 1 << 30

_AFFINE, _BICUBIC = Image.Transform.AFFINE, Image.Resampling.BICUBIC


class View(NamedTuple):
    """One view of one image.

    Attributes:
        crop: what is cut out of the image.
        flip: mirrored or not.
        ops: (name, argument) of RandAugment, in order of application.
        erase: the erased rectangle of the view, or NO_BOX.
        noise: seed of the noise in it.
    """

    crop: Box
    flip: bool
    ops: rand_augment.Applied
    erase: Box
    noise: int


class _Draws:
    """The original's random numbers: a seeded generator and the rules it takes numbers by."""

    def __init__(self, seed: int):
        self.generator = np.random.Generator(np.random.PCG64(seed))

    def unit(self) -> float:
        """A number in [0, 1)."""
        return self.generator.random()

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return self.unit() * (high - low) + low

    def whole(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return min(int(self.unit() * (high - low + 1)) + low, high)


def replay(data: bytes, name: str, seed: int, spec: Spec) -> np.ndarray:
    """Decodes an image and makes the view of a seed.

    Args:
        data: the file's bytes.
        name: what to call the image in an error.
        seed: of the view, 0 or more.
        spec: an augmentation whose `spec` is "microsoft".

    Returns:
        uint8 [S, S, 3], S = spec.image_size.

    Raises:
        ops.ImageError: for bytes that PIL does not decode, and for an image of a few pixels, of
            which a crop can be empty (the original stops there).
    """
    image = decode(data, name)
    view = sample_view(seed, image.height, image.width, spec)
    y0, x0, y1, x1 = view.crop
    if y0 == y1 or x0 == x1:
        raise ops.ImageError(
            f"Image {name} cannot be shown as augment.spec=microsoft: of its {image.height} x "
            f"{image.width} pixels the original cuts out none at seed {seed}, and stops. Leave the "
            f"image out, or use augment.spec=imagenet.")
    return apply_view(image, view, spec)


def decode(data: bytes, name: str) -> Image.Image:
    """Decodes an image by PIL to RGB, not turned by its EXIF orientation.

    Raises:
        ops.ImageError: for bytes that are no image, or not all of one.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # PIL's readers raise whatever damaged bytes lead them to
        raise ops.make_image_error(name, len(data)) from error


def sample_view(seed: int, height: int, width: int, spec: Spec) -> View:
    """Draws the view of an image of height x width pixels."""
    draws = _Draws(seed)
    crop = _sample_crop(draws, height, width, spec)
    flip = spec.flip > 0 and draws.unit() < spec.flip
    applied = _sample_ops(draws, rand_augment.parse(spec.rand_augment))
    box, noise = _sample_erased(draws, spec)
    return View(crop, flip, applied, box, noise)


def _sample_crop(draws: _Draws, height: int, width: int, spec: Spec) -> Box:
    """The first attempt that fits; else the largest central crop of an allowed ratio."""
    low, high = spec.ratio
    for _ in range(_ATTEMPTS):
        area = draws.uniform(*spec.scale) * (height * width)
        ratio = math.exp(draws.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            y, x = draws.whole(0, height - h), draws.whole(0, width - w)
            return y, x, y + h, x + w
    h = round(width / low) if width / height < low else height
    w = round(height * high) if width / height > high else width
    y, x = (height - h) // 2, (width - w) // 2
    return y, x, y + h, x + w


def _sample_ops(draws: _Draws, setting: rand_augment.RandAugment) -> rand_augment.Applied:
    """Which operations first, then for each: applied or not, magnitude, direction."""
    if not setting.operations:
        return ()
    indices = draws.generator.choice(len(setting.names), setting.operations,
                                     replace=not setting.weighted, p=setting.weights)
    chosen = []
    for name in (setting.names[index] for index in indices):
        if setting.applied < 1 and draws.unit() > setting.applied:
            continue
        level = float(setting.magnitude)
        if setting.std == math.inf:
            level = draws.uniform(0, level)
        elif setting.std > 0:
            level = draws.generator.normal(level, setting.std)
        level = max(0.0, min(level, setting.limit))
        negative = name in rand_augment.SIGNED and draws.unit() > 0.5
        chosen.append((name, rand_augment.make_argument(name, level, negative)))
    return tuple(chosen)


def _sample_erased(draws: _Draws, spec: Spec) -> tuple[Box, int]:
    """A rectangle drawn in the reference square, in pixels of the view, and its noise's seed."""
    if not spec.erase or draws.unit() > spec.erase:
        return NO_BOX, 0
    for _ in range(_ATTEMPTS):
        area = draws.uniform(*_ERASED_AREA) * _REFERENCE**2
        ratio = math.exp(draws.uniform(*_ERASED_LOG_RATIO))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < _REFERENCE and w < _REFERENCE:
            y, x = draws.whole(0, _REFERENCE - h), draws.whole(0, _REFERENCE - w)
            y, h = _scale(y, h, spec.image_size)
            x, w = _scale(x, w, spec.image_size)
            return (y, x, y + h, x + w), draws.whole(0, _NOISE_SEEDS)
    return NO_BOX, 0


def _scale(start: int, length: int, size: int) -> tuple[int, int]:
    """Where a stretch of the reference square begins in a view, and how long it is there."""
    start = min(round(start * size / _REFERENCE), size - 1)
    return start, min(round(length * size / _REFERENCE), size - start)


def apply_view(image: Image.Image, view: View, spec: Spec) -> np.ndarray:
    """Makes the pixels of a view: uint8 [S, S, 3], S = spec.image_size."""
    y0, x0, y1, x1 = view.crop
    size = spec.image_size
    image = image.crop((x0, y0, x1, y1))
    image = image.resize((size, image.height), _BICUBIC).resize((size, size), _BICUBIC)
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, argument in view.ops:
        image = OPERATIONS[name](image, argument, spec.fill)
    pixels = np.array(image)
    y0, x0, y1, x1 = view.erase
    noise = make_noise(view.noise, y1 - y0, x1 - x0) * spec.std + spec.mean
    pixels[y0:y1, x0:x1] = np.clip(np.rint(255 * noise), 0, 255)
    return pixels


def make_noise(seed: int, height: int, width: int) -> np.ndarray:
    """N(0, 1) as the original draws it for an erased rectangle: float64 [height, width, 3]."""
    generator = np.random.Generator(np.random.MT19937(seed))
    return generator.normal(size=(3, height, width)).transpose(1, 2, 0)


def sample_mix(seed: int, spec: Spec) -> tuple[float, Box]:
    """Draws how a pair is mixed: lam and box as `augment.sample_mix` returns them.

    This is the original's mode "pair2". There lam of a CutMix box that an edge clipped goes into
    the accuracy it logs uncorrected; its pixels, and its loss from stored logits, do not see lam.

    Args:
        seed: of one view XOR that of the other.
        spec: the augmentation.
    """
    draws, size = _Draws(seed), spec.image_size
    if not (spec.mixup or spec.cutmix) or draws.unit() >= spec.mix_prob:
        return 1.0, NO_BOX
    both = spec.mixup > 0 and spec.cutmix > 0
    cuts = draws.unit() < spec.mix_switch if both else spec.cutmix > 0
    alpha = spec.cutmix if cuts else spec.mixup
    lam = float(draws.generator.beta(alpha, alpha))
    if lam == 1 or not cuts:
        return lam, NO_BOX
    half = int(size * math.sqrt(1 - lam)) // 2
    y, x = draws.whole(0, size - 1), draws.whole(0, size - 1)
    y0, x0, y1, x1 = max(y - half, 0), max(x - half, 0), min(y + half, size), min(x + half, size)
    area = (y1 - y0) * (x1 - x0)
    return (1 - area / (size * size), (y0, x0, y1, x1)) if area else (1.0, NO_BOX)


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: ops.Fill) -> Image.Image:
    return image.transform(image.size, _AFFINE, matrix, resample=_BICUBIC, fillcolor=fill)


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    """Keeps the highest bits; none leaves black, which ImageOps of Pillow 13 refuses to do."""
    mask = ~(2 ** (8 - min(int(bits), 8)) - 1)
    return image.point([i & mask for i in range(256)] * 3)


def _solarize_add(image: Image.Image, amount: float) -> Image.Image:
    return image.point([min(255, i + int(amount)) if i < 128 else i for i in range(256)] * 3)


# Every operation as f(image, argument, fill) over PIL.
OPERATIONS: dict[str, Callable[[Image.Image, float, ops.Fill], Image.Image]] = {
    "AutoContrast": lambda image, _, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, _, fill: ImageOps.equalize(image),
    "Invert": lambda image, _, fill: ImageOps.invert(image),
    "Rotate": lambda image, d, fill: image.rotate(d, resample=_BICUBIC, fillcolor=fill),
    "Posterize": lambda image, bits, fill: _posterize(image, bits),
    "Solarize": lambda image, threshold, fill: ImageOps.solarize(image, int(threshold)),
    "SolarizeAdd": lambda image, amount, fill: _solarize_add(image, amount),
    "Color": lambda image, factor, fill: ImageEnhance.Color(image).enhance(factor),
    "Contrast": lambda image, factor, fill: ImageEnhance.Contrast(image).enhance(factor),
    "Brightness": lambda image, factor, fill: ImageEnhance.Brightness(image).enhance(factor),
    "Sharpness": lambda image, factor, fill: ImageEnhance.Sharpness(image).enhance(factor),
    "ShearX": lambda image, f, fill: _affine(image, (1, f, 0, 0, 1, 0), fill),
    "ShearY": lambda image, f, fill: _affine(image, (1, 0, 0, f, 1, 0), fill),
    "TranslateXRel": lambda image, f, fill: _affine(
        image, (1, 0, f * image.width, 0, 1, 0), fill),
    "TranslateYRel": lambda image, f, fill: _affine(
        image, (1, 0, 0, 0, 1, f * image.height), fill),
}
OPERATIONS.update({grown: OPERATIONS[name] for name, grown in
                   zip(rand_augment.PLAIN, rand_augment.INCREASING, strict=True)})
