"""Operations on the values of uint8 RGB arrays [H, W, 3]: tables, histograms and blends.

They are those of RandAugment (Cubuk et al., 2020, arXiv 1909.13719) in the form that TinyViT was
trained with, timm's "increasing" set over PIL images, and give PIL's pixels exactly. Functions
return a new array or their input unchanged.
"""

import cv2
import numpy as np

from tinyvit_jax.data import ops

_SOLARIZE_ADD_BELOW = 128
# ITU-R 601 weights in 1/65536, as PIL's "L" has them, and a half to round by.
_LUMA = np.array([[19595, 38470, 7471, 32768]], np.float32) / 65536
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32)  # of 13, divided by last: exact
_RAMP = np.arange(256, dtype=np.int32)
_BYTES = np.arange(256, dtype=np.uint8)


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel to the full range."""
    rows = image.reshape(len(image), -1)  # numpy reduces whole rows by vector instructions
    low = np.minimum.reduce(rows).reshape(-1, 3).min(0).tolist()
    high = np.maximum.reduce(rows).reshape(-1, 3).max(0).tolist()
    if low == [0, 0, 0] and high == [255, 255, 255]:
        return image
    return _map_channels(image, [_contrast_table(*ends) for ends in zip(low, high, strict=True)])


def equalize(image: np.ndarray) -> np.ndarray:
    """Flattens the histogram of each channel."""
    histograms = [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(3)]
    return _map_channels(image, [_equal_table(h.astype(np.int64)) for h in histograms])


def _map_channels(image: np.ndarray, tables: list[np.ndarray]) -> np.ndarray:
    """Maps each channel by a table of its own, integers [256] in [0, 255]."""
    return cv2.LUT(image, np.stack(tables, -1).astype(np.uint8)[None])


def _contrast_table(low: int, high: int) -> np.ndarray:
    if low == high:
        return _RAMP
    scale = 255.0 / (high - low)
    return np.clip((_RAMP * scale + -low * scale).astype(np.int32), 0, 255)


def _equal_table(histogram: np.ndarray) -> np.ndarray:
    used = np.flatnonzero(histogram)
    step = (histogram.sum() - histogram[used[-1]]) // 255
    if len(used) == 1 or step == 0:
        return _RAMP
    below = np.cumsum(histogram) - histogram
    return np.minimum((step // 2 + below) // step, 255)


def invert(image: np.ndarray) -> np.ndarray:
    """Turns x into 255 - x."""
    return cv2.bitwise_not(image)


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the highest `bits` bits: 8 and more all of them, 0 and less leave black."""
    return image & np.uint8(256 - 2 ** (8 - min(max(bits, 0), 8)))


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts the values from `threshold` upwards: all from 0 down, none from 256 up."""
    return cv2.bitwise_xor(image, cv2.threshold(image, threshold - 1, 255, cv2.THRESH_BINARY)[1])


def solarize_add(image: np.ndarray, amount: int) -> np.ndarray:
    """Adds `amount`, 0 or more, to the values below 128."""
    added = cv2.threshold(image, _SOLARIZE_ADD_BELOW - 1, min(amount, 255), cv2.THRESH_BINARY_INV)
    return cv2.add(image, added[1])


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends from black: 0 = black, 1 = the image, above 1 = brighter."""
    return cv2.LUT(image, _blend(np.zeros(1, np.uint8), _BYTES, factor))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends from the mean grey level: 0 = flat, 1 = the image, above 1 = more contrast."""
    grey = _luma(image)
    mean = int(cv2.sumElems(grey)[0] / grey.size + 0.5)
    return cv2.LUT(image, _blend(np.array([mean], np.uint8), _BYTES, factor))


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends from the grey image: 0 = grey, 1 = the image, above 1 = more saturated."""
    return _blend(cv2.cvtColor(_luma(image), cv2.COLOR_GRAY2RGB), image, factor)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends from a 3x3 smoothed image (edge pixels as they are): above 1 = sharper."""
    ops.use_open_kernels()
    pixels, sums = ops.work_in(image.shape)
    np.copyto(pixels, image)  # which OpenCV filters in half the time that bytes take
    cv2.filter2D(pixels, cv2.CV_32F, _SMOOTH, dst=sums)
    smooth = cv2.convertScaleAbs(sums, alpha=1 / 13)
    for edge in (np.s_[:1], np.s_[-1:], np.s_[:, :1], np.s_[:, -1:]):
        smooth[edge] = image[edge]
    return _blend(smooth, image, factor)


def _luma(image: np.ndarray) -> np.ndarray:
    """Grey levels uint8 [H, W], rounded as PIL rounds them."""
    pixels, _ = ops.work_in(image.shape)
    np.copyto(pixels, image)
    # 65536 times the sum is a whole number below 2**24, so float32 holds every part of it exactly.
    return cv2.transform(pixels, _LUMA).astype(np.uint8)


def _blend(base: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """base + factor * (image - base) in float32, clipped, fractions cut off as PIL cuts them."""
    start, out = ops.work_in(image.shape)
    np.copyto(start, base)
    np.subtract(image, start, out=out)
    out *= np.float32(factor)
    out += start
    return np.clip(out, 0, 255, out=out).astype(np.uint8)
