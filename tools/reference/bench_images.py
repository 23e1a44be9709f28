"""Photographs from a seed, for machines without a folder of real ones.

What decoding costs hangs on the size, on the bytes of a pixel and on the subsampling. Of a thousand
files of ImageNet's training set, one of each class, most are 500 x 375 pixels, three of four keep
all their colour (4:4:4, two thirds at quality 96), a fifth is 4:2:0, and the mean is 110 KB, 0.58
bytes a pixel; these are made to match.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375
_EVERY = 4  # one image of so many is 4:2:0
_QUALITY, _COARSE_QUALITY = 96, 90
_FALL = 1.4  # of the amplitude with the frequency: photographs have about 1, the finest part aside
_CONTRAST, _GRAIN = 40.0, 1.75  # standard deviations, in levels


def make_image(seed: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A picture with the spectrum of a photograph, shapes with edges, and grain.

    Args:
        seed: decides everything.
        width: pixels.
        height: pixels.

    Returns:
        uint8 [height, width, 3].
    """
    generator = np.random.default_rng(seed)
    light = _make_noise(generator, height, width)
    tint = 0.3 * _CONTRAST * _make_noise(generator, height, width)
    image = 128 + _CONTRAST * light[..., None] + tint[..., None] * generator.normal(size=3)
    y, x = np.mgrid[:height, :width]
    for _ in range(12):
        centre_y, centre_x = generator.uniform(0, height), generator.uniform(0, width)
        radii = generator.uniform(0.03, 0.3, 2) * height
        inside = ((y - centre_y) / radii[0]) ** 2 + ((x - centre_x) / radii[1]) ** 2 < 1
        image[inside] = 0.5 * image[inside] + generator.uniform(0, 127, 3)
    image += generator.normal(0, _GRAIN, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def _make_noise(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise whose amplitude falls with the frequency, mean 0 and deviation 1: [height, width]."""
    spectrum = np.fft.rfft2(generator.normal(size=(height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(spectrum / frequency**_FALL, (height, width))
    return noise / noise.std()


def encode(image: np.ndarray, seed: int) -> bytes:
    """The picture as a JPEG file, of the kind that its number has."""
    file = io.BytesIO()
    coarse = seed % _EVERY == _EVERY - 1
    Image.fromarray(image).save(file, "JPEG", quality=_COARSE_QUALITY if coarse else _QUALITY,
                                subsampling=2 if coarse else 0)
    return file.getvalue()


def make_folder(folder: Path, count: int, classes: int = 2) -> Path:
    """Writes so many of them into a tree with a folder for each class, which it returns."""
    for i in range(count):
        path = folder / f"class{i % classes}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(make_image(i), i))
    return folder
