"""Rotation, shear and translation against PIL, which the original recipe used."""

import cv2
import numpy as np
import pytest
from pictures import FILL, IMAGES, differ, noise_image, smooth_image

from tinyvit_jax.data import warp

PIL = pytest.importorskip("PIL", minversion="10")
from PIL import Image  # noqa: E402

BICUBIC = Image.Resampling.BICUBIC


def pil_affine(image: np.ndarray, *matrix: float) -> Image.Image:
    pil = Image.fromarray(image)
    return pil.transform(pil.size, Image.Transform.AFFINE, matrix, BICUBIC, fillcolor=FILL)


@pytest.mark.parametrize("fraction", [0.4017, -0.4017, 0.0031, -0.3333, 0.45, 0.0, 1.5, 0.0125])
@pytest.mark.parametrize("name", IMAGES)
def test_translation_is_within_one_level_of_pil(name, fraction):
    image = IMAGES[name]
    h, w = image.shape[:2]
    right = pil_affine(image, 1, 0, fraction * w, 0, 1, 0)
    down = pil_affine(image, 1, 0, 0, 0, 1, fraction * h)
    assert differ(warp.translate_x(image, fraction, FILL), right).max() <= 1
    assert differ(warp.translate_y(image, fraction, FILL), down).max() <= 1


def test_translation_seldom_differs_from_pil_at_all():
    image = IMAGES["smooth"]
    shares = []
    for fraction in np.linspace(-0.45, 0.45, 61).tolist():
        expected = pil_affine(image, 1, 0, fraction * 80, 0, 1, 0)
        shares.append((differ(warp.translate_x(image, fraction, FILL), expected) > 0).mean())
    assert np.mean(shares) < 0.025


@pytest.mark.parametrize("fraction", [0.4017, -0.4017, 0.0, 0.45, -1.5, 1.0, -1.0, 0.0125])
@pytest.mark.parametrize("name", IMAGES)
def test_translation_by_whole_pixels_takes_them_as_they_are(name, fraction):
    image = IMAGES[name]
    h, w = image.shape[:2]
    right = pil_affine(image, 1, 0, round(fraction * w), 0, 1, 0)
    down = pil_affine(image, 1, 0, 0, 0, 1, round(fraction * h))
    assert np.array_equal(warp.translate_x(image, fraction, FILL, whole=True), right)
    assert np.array_equal(warp.translate_y(image, fraction, FILL, whole=True), down)


def test_translation_of_a_flat_image_stays_flat():
    for level in (1, 77, 200, 255):
        image = np.full((8, 50, 3), level, np.uint8)
        for fraction in np.linspace(-0.45, 0.45, 181):
            out = warp.translate_x(image, float(fraction), (level,) * 3)
            assert (out == level).all(), (level, fraction)


@pytest.mark.parametrize("fraction", [0.4017, -0.4017, 0.0, 0.45, -1.5, 1.0, 0.0125])
@pytest.mark.parametrize("name", IMAGES)
def test_down_is_right_of_the_turned_image(name, fraction):
    image = IMAGES[name]
    down = warp.translate_y(image, fraction, FILL)
    right = warp.translate_x(np.ascontiguousarray(image.transpose(1, 0, 2)), fraction, FILL)
    assert np.array_equal(down, right.transpose(1, 0, 2))


def test_floats_are_warped_to_the_pixels_of_bytes():
    # The form that is frozen is OpenCV's of bytes; the one that runs is faster.
    how = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    generator = np.random.default_rng(0)
    cv2.ipp.setUseIPP(False)
    for image in (noise_image(224, 224), smooth_image(96, 80), noise_image(3, 5)):
        for _ in range(20):
            a, b, c, d, e, f = matrix = generator.normal([1, 0, 0, 0, 1, 0], 0.3).tolist()
            centers = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
            expected = cv2.warpAffine(image, centers, image.shape[1::-1], flags=how,
                                      borderValue=FILL)
            assert np.array_equal(warp._warp(image, matrix, FILL), expected)


def geometric_pairs(image: np.ndarray):
    pil = Image.fromarray(image)
    for degrees in (29.1, -14.0, 0.0):
        yield warp.rotate(image, degrees, FILL), pil.rotate(degrees, BICUBIC, fillcolor=FILL)
    for factor in (0.27, -0.2):
        yield warp.shear_x(image, factor, FILL), pil_affine(image, 1, factor, 0, 0, 1, 0)
        yield warp.shear_y(image, factor, FILL), pil_affine(image, 1, 0, 0, factor, 1, 0)


def test_rotation_and_shear_are_near_pil():
    for ours, theirs in geometric_pairs(smooth_image(224, 200)):
        difference = differ(ours, theirs)
        assert difference.mean() < 0.7
        assert (difference > 1).mean() < 0.03  # the border of the filled outside


def test_rotation_and_shear_move_a_pattern_to_the_same_place():
    # On noise the two bicubic kernels differ most; a shift by half a pixel would double this.
    for ours, theirs in geometric_pairs(cv2.GaussianBlur(noise_image(128, 128), (0, 0), 1)):
        assert differ(ours, theirs).mean() < 1.5
