"""What views depend on besides their seeds: the Spec that stores keep and training compares."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tinyvit_jax.data import rand_augment

SPECS = ("imagenet", "small", "none", "microsoft")
PIXELS = ("exact", "fast", "faster")
# Of the code that draws and applies views: ours, and the original's rules in data/microsoft.py.
VERSION, MICROSOFT_VERSION = 1, 1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, pixels in [0, 1]

Box = tuple[int, int, int, int]  # y0, x0, y1, x1; the end is outside
NO_BOX: Box = (0, 0, 0, 0)


class SpecError(ValueError):
    """An augmentation setting that cannot work; the message names the field."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything besides the seed that a view and its mixing depend on.

    Fields are those of `config.augment` and mean the same, and besides them:
        version: of the code that draws and applies views of this kind.
        image_size: side of a view in pixels.
        mean, std: of the noise that erases; the fill of RandAugment is round(255 * mean).
    """

    spec: str
    version: int
    image_size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    pad: int
    flip: float
    rand_augment: str
    color_jitter: float
    erase: float
    mixup: float
    cutmix: float
    mix_prob: float
    mix_switch: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    # Later fields: a spec written before they were there means these values.
    pixels: str = "exact"
    greyscale: float = 0.0

    @property
    def fill(self) -> tuple[int, int, int]:
        """Colour of what a geometric operation uncovers."""
        r, g, b = (min(255, round(255 * m)) for m in self.mean)
        return r, g, b


_LATER = {field.name: field.default for field in dataclasses.fields(Spec)
          if field.default is not dataclasses.MISSING}


def make_spec(augment_config: Any, image_size: int) -> Spec:
    """Reads a Spec from `config.augment`, or from anything with its attributes.

    Settings without effect (the colour jitter beside RandAugment, the padding of "imagenet" ...)
    are set to zero, so that two specs differ only where their views do.

    Raises:
        SpecError: for an unknown spec, a RandAugment string that is not understood, or one that
            the original did not follow in "microsoft".
    """
    a = augment_config
    if a.spec not in SPECS:
        raise SpecError(f"--config.augment.spec={a.spec} is unknown: expected one of "
                        f"{', '.join(SPECS)}.")
    if a.pixels not in PIXELS:
        raise SpecError(f"--config.augment.pixels={a.pixels} is unknown: expected one of "
                        f"{', '.join(PIXELS)}.")
    random, crops = a.spec != "none", a.spec in ("imagenet", "microsoft")
    mixes = a.mixup > 0 or a.cutmix > 0
    text = a.rand_augment if random else ""
    _check_rand_augment(text)
    if a.spec == "microsoft":
        _check_microsoft(text, a.color_jitter, a.greyscale)
    return Spec(
        spec=a.spec, version=_version(a.spec), image_size=int(image_size),
        scale=_pair(a.scale) if crops else (0.0, 0.0),
        ratio=_pair(a.ratio) if crops else (0.0, 0.0),
        pad=int(a.pad) if a.spec == "small" else 0,
        flip=float(a.flip) if random else 0.0,
        rand_augment=text,
        color_jitter=float(a.color_jitter) if random and not text else 0.0,
        erase=float(a.erase) if random else 0.0,
        mixup=float(a.mixup) if a.mix_prob > 0 else 0.0,
        cutmix=float(a.cutmix) if a.mix_prob > 0 else 0.0,
        mix_prob=float(a.mix_prob) if mixes else 0.0,
        mix_switch=float(a.mix_switch) if a.mixup > 0 and a.cutmix > 0 and a.mix_prob > 0 else 0.0,
        mean=MEAN, std=STD, pixels=a.pixels if a.spec == "imagenet" else "exact",
        greyscale=float(a.greyscale) if random else 0.0,
    )


def _version(spec_name: str) -> int:
    return MICROSOFT_VERSION if spec_name == "microsoft" else VERSION


def _pair(values: Any) -> tuple[float, float]:
    low, high = values
    return float(low), float(high)


def _check_rand_augment(text: str) -> None:
    try:
        rand_augment.parse(text)
    except ValueError as error:
        raise SpecError(f"--config.augment.rand_augment={text} is not understood: {error}."
                        ) from None


def _check_microsoft(text: str, color_jitter: float, greyscale: float) -> None:
    """Refuses what the original's own code does not do, so that no store of it has such views."""
    if greyscale:
        raise SpecError(
            f"--config.augment.greyscale={greyscale} cannot be replayed as augment.spec=microsoft: "
            f"the original turns no view grey. Set augment.greyscale=0.")
    if "mstdinf" in text.split("-"):
        raise SpecError(
            f"--config.augment.rand_augment={text} cannot be replayed as augment.spec=microsoft: "
            f"the original passes over mstdinf, so its magnitudes had no spread. Leave mstdinf out "
            f"for these views; mstd101 is what it draws uniformly.")
    if not text and color_jitter:
        raise SpecError(
            f"--config.augment.color_jitter={color_jitter} cannot be replayed as "
            f"augment.spec=microsoft: the original's seeded generator cannot shuffle, so it stops "
            f"at the first view with colour jitter. Set augment.color_jitter=0, or "
            f"augment.rand_augment to what its store was written with.")


def to_dict(spec: Spec) -> dict[str, Any]:
    """A dictionary that JSON keeps without loss; later fields are in it where they say something.

    So the stores written before a field was there are equal to new ones of the same views.
    """
    return {key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(spec).items()
            if key not in _LATER or value != _LATER[key]}


def from_dict(fields: Mapping[str, Any]) -> Spec:
    """The Spec that `to_dict` wrote.

    Raises:
        SpecError: for a version this code does not replay, or fields that are not a Spec's.
    """
    found, replayed = fields.get("version"), _version(fields.get("spec", ""))
    if found != replayed:
        raise SpecError(
            f"The augmentation has version {found}, and this tinyvit_jax replays version "
            f"{replayed} only. Install the release of tinyvit_jax that wrote it, or make the store "
            f"again."
        )
    known = {field.name for field in dataclasses.fields(Spec)}
    fields = {**_LATER, **fields}
    if known != set(fields):
        raise SpecError(
            f"The augmentation of version {replayed} does not have its fields: missing "
            f"{sorted(known - set(fields))}, unknown {sorted(set(fields) - known)}. The manifest "
            f"was edited or damaged; restore it, or make the store again."
        )
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                              for key, value in fields.items()}
    return Spec(**values)
