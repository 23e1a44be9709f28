"""Operations on the values of pixels against PIL, which the original recipe used."""

import numpy as np
import pytest
from pictures import IMAGES, differ

from tinyvit_jax.data import color

PIL = pytest.importorskip("PIL", minversion="10")
from PIL import Image, ImageEnhance, ImageOps  # noqa: E402


@pytest.mark.parametrize("name", IMAGES)
def test_point_operations_equal_pil(name):
    image, pil = IMAGES[name], Image.fromarray(IMAGES[name])
    assert differ(color.auto_contrast(image), ImageOps.autocontrast(pil)).max() == 0
    assert differ(color.equalize(image), ImageOps.equalize(pil)).max() == 0
    assert differ(color.invert(image), ImageOps.invert(pil)).max() == 0
    for bits in range(1, 9):
        assert differ(color.posterize(image, bits), ImageOps.posterize(pil, bits)).max() == 0
    for threshold in (0, 1, 26, 128, 255, 256):
        expected = ImageOps.solarize(pil, threshold)
        assert differ(color.solarize(image, threshold), expected).max() == 0
    added = pil.point([min(255, i + 99) if i < 128 else i for i in range(256)] * 3)
    assert differ(color.solarize_add(image, 99), added).max() == 0


def test_point_operations_keep_their_definition_for_every_value_and_argument():
    ramp = np.arange(256)
    image = ramp.astype(np.uint8).reshape(16, 16, 1).repeat(3, 2)

    def check(found: np.ndarray, expected: np.ndarray) -> None:
        assert np.array_equal(found, np.clip(expected, 0, 255)[image])

    for bits in range(9):
        check(color.posterize(image, bits), ramp >> (8 - bits) << (8 - bits))
    for threshold in range(-2, 259):
        check(color.solarize(image, threshold), np.where(ramp >= threshold, 255 - ramp, ramp))
    for amount in range(300):
        check(color.solarize_add(image, amount), np.where(ramp < 128, ramp + amount, ramp))


def test_auto_contrast_leaves_the_full_range_and_one_level_alone():
    full = IMAGES["noise"].copy()
    full[0, :2] = [[0] * 3, [255] * 3]
    assert np.array_equal(color.auto_contrast(full), full)
    assert np.array_equal(color.auto_contrast(IMAGES["flat"]), IMAGES["flat"])
    full[..., 1] = full[..., 1] // 2  # one channel alone has something to stretch
    expected = ImageOps.autocontrast(Image.fromarray(full))
    assert differ(color.auto_contrast(full), expected).max() == 0
    assert not np.array_equal(color.auto_contrast(full), full)


def test_posterize_takes_any_number_of_bits():
    assert color.posterize(IMAGES["noise"], 0).max() == 0
    assert color.posterize(IMAGES["noise"], -2).max() == 0
    assert np.array_equal(color.posterize(IMAGES["noise"], 11), IMAGES["noise"])


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.19, 0.6, 1.0, 1.37, 1.81, 1.9])
@pytest.mark.parametrize("name", IMAGES)
def test_blends_equal_pil(name, factor):
    image, pil = IMAGES[name], Image.fromarray(IMAGES[name])
    for ours, theirs in ((color.brightness, ImageEnhance.Brightness),
                         (color.saturation, ImageEnhance.Color),
                         (color.contrast, ImageEnhance.Contrast),
                         (color.sharpness, ImageEnhance.Sharpness)):
        assert differ(ours(image, factor), theirs(pil).enhance(factor)).max() == 0


def test_grey_levels_are_those_of_whole_numbers_for_every_colour():
    green, blue = np.mgrid[:256, :256]
    image = np.stack([green, green, blue], -1).astype(np.uint8)
    for red in range(256):
        image[..., 0] = red
        expected = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
        assert np.array_equal(color._luma(image), expected), red


def test_grey_levels_equal_pil_where_they_are_rounded():
    values = np.random.default_rng(1).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    grey = np.asarray(Image.fromarray(values).convert("L"))[..., None].repeat(3, 2)
    assert differ(color.saturation(values, 0.0), grey).max() == 0
