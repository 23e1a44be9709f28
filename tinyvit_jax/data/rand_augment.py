"""RandAugment (Cubuk et al., 2020, arXiv 1909.13719): strings, operations, levels and our draws.

A string such as rand-m9-mstd0.5-inc1 is read as the original TinyViT and timm read it. Where their
code and their words part, the code is followed, because it is what the recipes were run with:
- inc followed by any number, inc0 included, takes the increasing set (both turn the text "0" into a
  truth value); leave it out for the other set.
- mmax0 is no limit of one's own, that is 10; a magnitude over the limit is cut back to it.
- w0 is the original's alone (timm has other weights under tweights). It is written down for the
  plain set and taken by position for the increasing one; Posterize and Invert weigh nothing.
- p is timm's alone: the probability that a drawn operation is applied, 0.5 if left out.
- mstdinf, a section without a digit, is passed over in silence by both, whatever they say of it.
  Here it means what they say, as mstd101 does: a uniform magnitude.
Over level 10, which mmax allows, SolarizeAdd goes on growing as in the original; timm ends at 128.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from tinyvit_jax.data import color, draws, ops, warp

LEVELS = 10.0  # the magnitude that is full strength
UNIFORM_OVER = 100.0  # a larger mstd asks for a uniform magnitude

_APPLIED = 0.5  # probability that a drawn operation is applied
_MOST_OPERATIONS = 100
_SECTION = re.compile(r"(mstd|mmax|inc|m|n|w|p)(inf|\d[\d.e]*)")
_SECTIONS = ("m (magnitude, 10 if left out), mstd (its spread; over 100 or inf: uniform from 0 to "
             "m), mmax (its limit, 10), n (operations, 1 to 100, 2 if left out), p (probability of "
             "each, 0.5), inc1 (the set that grows stronger with m), w0 (weighted choice)")

_Number = TypeVar("_Number", int, float)
Applied = tuple[tuple[str, float], ...]  # (name, argument) in order of application

# Every operation as f(image uint8 [H, W, 3], argument, fill).
OPERATIONS: dict[str, Callable[[np.ndarray, float, ops.Fill], np.ndarray]] = {
    "AutoContrast": lambda image, _, fill: color.auto_contrast(image),
    "Equalize": lambda image, _, fill: color.equalize(image),
    "Invert": lambda image, _, fill: color.invert(image),
    "Rotate": warp.rotate,
    "Posterize": lambda image, bits, fill: color.posterize(image, int(bits)),
    "Solarize": lambda image, threshold, fill: color.solarize(image, int(threshold)),
    "SolarizeAdd": lambda image, amount, fill: color.solarize_add(image, int(amount)),
    "Color": lambda image, factor, fill: color.saturation(image, factor),
    "Contrast": lambda image, factor, fill: color.contrast(image, factor),
    "Brightness": lambda image, factor, fill: color.brightness(image, factor),
    "Sharpness": lambda image, factor, fill: color.sharpness(image, factor),
    "ShearX": warp.shear_x,
    "ShearY": warp.shear_y,
    "TranslateXRel": warp.translate_x,
    "TranslateYRel": warp.translate_y,
}
_GROWING = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
# The draw of an operation is an index into its set, so the order is frozen.
PLAIN = tuple(OPERATIONS)
INCREASING = tuple(name + "Increasing" if name in _GROWING else name for name in PLAIN)
OPERATIONS.update({name + "Increasing": OPERATIONS[name] for name in _GROWING})
# The same with bilinear interpolation where they interpolate.
FAST = OPERATIONS | {name: functools.partial(operation, bilinear=True) for name, operation in (
    ("Rotate", warp.rotate), ("ShearX", warp.shear_x), ("ShearY", warp.shear_y))}
# And moved by whole pixels.
FASTER = FAST | {name: functools.partial(operation, whole=True) for name, operation in (
    ("TranslateXRel", warp.translate_x), ("TranslateYRel", warp.translate_y))}
BY_PIXELS = {"exact": OPERATIONS, "fast": FAST, "faster": FASTER}  # by Spec.pixels

_BLENDS = ("Color", "Contrast", "Brightness", "Sharpness")
SIGNED = frozenset(name + "Increasing" for name in _BLENDS) | {
    "Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}  # have two directions

# The original's only set of weights, in thousandths, in the order of PLAIN.
_WEIGHTS = (25, 5, 0, 300, 0, 5, 5, 25, 5, 5, 25, 200, 200, 100, 100)


class RandAugment(NamedTuple):
    """A string that was read.

    Attributes:
        magnitude: mean of the drawn magnitudes; 10 is full strength.
        std: their standard deviation; inf draws them uniformly from [0, magnitude].
        limit: what they are cut back to.
        operations: number of them that are drawn for a view.
        applied: probability of each drawn operation.
        names: of the set they are drawn from.
        weighted: drawn by _WEIGHTS and without repetition, not evenly and with it.
    """

    magnitude: float
    std: float
    limit: float
    operations: int
    applied: float
    names: tuple[str, ...]
    weighted: bool

    @property
    def weights(self) -> np.ndarray | None:
        """Probabilities float64 [15] of the first draw, or None where all are equal."""
        return np.array(_WEIGHTS) / sum(_WEIGHTS) if self.weighted else None


OFF = RandAugment(0, 0.0, LEVELS, 0, _APPLIED, PLAIN, False)


@functools.lru_cache(maxsize=16)
def parse(text: str) -> RandAugment:
    """Reads a string of the family, its sections in any order; "" has no operations.

    Raises:
        ValueError: for anything else; the message says what exists.
    """
    if not text:
        return OFF
    start, *sections = text.split("-")
    if start != "rand":
        raise ValueError(f"it begins with {start}; expected rand, then sections joined by dashes: "
                         f"{_SECTIONS}; or nothing, to switch it off")
    found: dict[str, str] = {}
    for section in sections:
        match = _SECTION.fullmatch(section)
        if not match:
            raise ValueError(f"the section {section or 'after the last dash'} is unknown; expected "
                             f"{_SECTIONS}, for example rand-m9-mstd0.5-inc1")
        if match[1] in found:
            raise ValueError(f"the section {match[1]} is there twice; expected it once")
        found[match[1]] = match[2]
    _number(found, "inc", 0, int)
    std = _number(found, "mstd", 0.0, float)
    setting = RandAugment(
        magnitude=_number(found, "m", int(LEVELS), int),
        std=math.inf if std > UNIFORM_OVER else std,
        limit=_number(found, "mmax", 0, int) or LEVELS,
        operations=_number(found, "n", 2, int),
        applied=_number(found, "p", _APPLIED, float),
        names=INCREASING if "inc" in found else PLAIN,
        weighted="w" in found)
    if _number(found, "w", 0, int) != 0:
        raise ValueError(f"it asks for weights w{found['w']}; expected w0, the one set there is")
    most = sum(weight > 0 for weight in _WEIGHTS) if setting.weighted else _MOST_OPERATIONS
    if not 1 <= setting.operations <= most:
        raise ValueError(f"it asks for n{setting.operations} operations; expected 1 to {most}"
                         f"{', as many as have a weight' if setting.weighted else ''}")
    return setting


def _number(found: dict[str, str], key: str, default: _Number, kind: type[_Number]) -> _Number:
    """The number of a section, or its default where the section was left out."""
    try:
        return kind(found[key]) if key in found else default
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise ValueError(f"the section {key}{found[key]} has no number that can be used; expected "
                         f"{expected}") from None


def make_argument(name: str, level: float, negative: bool) -> float:
    """The argument of an operation at a magnitude.

    Args:
        name: a key of OPERATIONS.
        level: magnitude, 0 or more; 10 is full strength.
        negative: takes the other direction, for the operations of SIGNED.

    Returns:
        Degrees, bits, threshold, amount, factor or fraction; 0 for the operations without one.
    """
    part = level / LEVELS
    sign = -1 if negative else 1
    if name == "Rotate":
        return sign * part * 30
    if name in ("Posterize", "PosterizeIncreasing"):
        return 4 - int(part * 4) if name.endswith("Increasing") else int(part * 4)
    if name in ("Solarize", "SolarizeIncreasing"):
        return 256 - int(part * 256) if name.endswith("Increasing") else int(part * 256)
    if name == "SolarizeAdd":
        return int(part * 110)
    if name in _BLENDS:
        return part * 1.8 + 0.1
    if name.removesuffix("Increasing") in _BLENDS:
        return max(0.1, 1 + sign * part * 0.9)
    if name in ("ShearX", "ShearY"):
        return sign * part * 0.3
    if name in ("TranslateXRel", "TranslateYRel"):
        return sign * part * 0.45
    return 0


# Draws of one operation: which, applied, magnitude (2), direction.
_SLOTS = 5


def sample(seed: int, setting: RandAugment, first_slot: int) -> Applied:
    """Draws the operations of a view from numbered slots.

    Args:
        seed: of the view.
        setting: from `parse`.
        first_slot: where the slots of RandAugment begin; five follow for each operation.

    Returns:
        Those that are applied.
    """
    left = list(_WEIGHTS)
    chosen = []
    for i in range(setting.operations):
        slot = first_slot + _SLOTS * i
        choice = draws.unit(seed, slot)
        index = _choose(left, choice) if setting.weighted else int(choice * len(setting.names))
        left[index] = 0
        if draws.unit(seed, slot + 1) >= setting.applied:
            continue
        level = _sample_level(seed, slot + 2, setting)
        negative = draws.unit(seed, slot + 4) >= 0.5
        name = setting.names[index]
        chosen.append((name, make_argument(name, level, negative)))
    return tuple(chosen)


def _choose(weights: list[int], choice: float) -> int:
    """The index whose share of the weights holds `choice`, a number in [0, 1)."""
    rest = choice * sum(weights)
    for index, weight in enumerate(weights):
        if rest < weight:
            return index
        rest -= weight
    raise AssertionError("choice is below 1 and some weight above 0")


def _sample_level(seed: int, slot: int, setting: RandAugment) -> float:
    if setting.std == math.inf:
        level = setting.magnitude * draws.unit(seed, slot)
    else:
        level = setting.magnitude + setting.std * _gauss(seed, slot)
    return min(max(round(level, 9), 0.0), setting.limit)


def _gauss(seed: int, slot: int) -> float:
    """A number of N(0, 1) by Box and Muller's transform of two draws."""
    radius = math.sqrt(-2 * math.log(1 - draws.unit(seed, slot)))
    return radius * math.cos(2 * math.pi * draws.unit(seed, slot + 1))
