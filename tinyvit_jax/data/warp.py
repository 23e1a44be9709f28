"""Rotation, shear and translation of uint8 RGB arrays [H, W, 3] by RandAugment's rules.

Translation gives PIL's pixels within one level. Rotation and shear interpolate with OpenCV's
bicubic kernel (a = -0.75) where PIL has a = -1 and cuts fractions off: half a level apart on
average, more on edges and on the border of the filled outside. OpenCV 5 interpolates at the very
coordinates, releases before it at the nearest 1/32 pixel. `bilinear` takes four pixels instead of
sixteen: the view of augment.pixels=fast. That of "faster" is translated by whole pixels besides, as
torchvision's is.
"""

import math

import cv2
import numpy as np

from tinyvit_jax.data import ops

# From OpenCV 5 on a warp weighs bytes and floats alike, in float32, but floats by vector
# instructions; before, bytes were weighed in whole numbers and floats would end a level apart.
_WEIGHS_IN_FLOAT = int(cv2.__version__.split(".")[0]) >= 5


def rotate(image: np.ndarray, degrees: float, fill: ops.Fill, bilinear: bool = False
           ) -> np.ndarray:
    """Rotates counter-clockwise about the centre; the outside is filled."""
    angle = math.radians(-degrees)
    # Rounded, so that the last bit of a platform's sine cannot move a pixel.
    cos, sin = round(math.cos(angle), 9), round(math.sin(angle), 9)
    y, x = image.shape[0] / 2, image.shape[1] / 2
    return _warp(image, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y), fill,
                 bilinear)


def shear_x(image: np.ndarray, factor: float, fill: ops.Fill, bilinear: bool = False
            ) -> np.ndarray:
    """Reads each pixel from `factor` pixels further right for every row down."""
    return _warp(image, (1, factor, 0, 0, 1, 0), fill, bilinear)


def shear_y(image: np.ndarray, factor: float, fill: ops.Fill, bilinear: bool = False
            ) -> np.ndarray:
    """Reads each pixel from `factor` pixels further down for every column to the right."""
    return _warp(image, (1, 0, 0, factor, 1, 0), fill, bilinear)


def translate_x(image: np.ndarray, fraction: float, fill: ops.Fill, whole: bool = False
                ) -> np.ndarray:
    """Reads each pixel from `fraction` of the width further right."""
    return _shift(image, fraction * image.shape[1], 1, fill, whole)


def translate_y(image: np.ndarray, fraction: float, fill: ops.Fill, whole: bool = False
                ) -> np.ndarray:
    """Reads each pixel from `fraction` of the height further down."""
    return _shift(image, fraction * image.shape[0], 0, fill, whole)


def _warp(image: np.ndarray, inverse: tuple[float, ...], fill: ops.Fill,
          bilinear: bool = False) -> np.ndarray:
    """Applies an affine map given from output to input, in coordinates of pixel edges."""
    a, b, c, d, e, f = inverse
    ops.use_open_kernels()
    centers = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    size = image.shape[1::-1]
    how = (cv2.INTER_LINEAR if bilinear else cv2.INTER_CUBIC) | cv2.WARP_INVERSE_MAP
    if bilinear:
        # OpenCV weighs four channels by vector instructions, and three one by one.
        padded = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
        return ops.as_rgb(cv2.warpAffine(padded, centers, size, flags=how, borderValue=fill))
    if not _WEIGHS_IN_FLOAT:
        return cv2.warpAffine(image, centers, size, flags=how, borderValue=fill)
    pixels, out = ops.work_in(image.shape)
    np.copyto(pixels, image)
    cv2.warpAffine(pixels, centers, size, dst=out, flags=how, borderValue=fill)
    return np.clip(np.rint(out, out=out), 0, 255, out=out).astype(np.uint8)


def _shift(image: np.ndarray, distance: float, axis: int, fill: ops.Fill, whole: bool
           ) -> np.ndarray:
    """Reads each pixel from `distance` pixels further along an axis, where `whole` rounded."""
    if whole:
        distance = round(distance)
    size = image.shape[axis]
    low, high = max(0, math.ceil(-distance - 0.5)), min(size, math.ceil(size - distance - 0.5))
    if low >= high:
        return np.broadcast_to(np.array(fill, np.uint8), image.shape).copy()
    first = low + math.floor(distance)
    shown = slice(first, first + high - low)
    moved = (image[shown] if axis == 0 else image[:, shown]) if whole else _interpolate(
        image, shown, distance - math.floor(distance), axis)
    return _extend(moved, axis, low, size - high, cv2.BORDER_CONSTANT, fill)


def _interpolate(image: np.ndarray, shown: slice, d: float, axis: int) -> np.ndarray:
    """The pixels that lie `d` in [0, 1) behind a slice along an axis, by PIL's cubic (a = -1)."""
    taps = np.array([-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2])
    # With one pixel more before and two after.
    seen = slice(shown.start + 1, shown.stop + 4)
    edged = _extend(image, axis, 2, 2, cv2.BORDER_REPLICATE)
    edged = edged[seen] if axis == 0 else edged[:, seen]
    moved, cut = ops.work_in(edged.shape)
    ops.use_open_kernels()
    # PIL cuts fractions off; the last bit of a sum of weights must not cost a level there.
    cv2.filter2D(edged, cv2.CV_32F, np.expand_dims(taps, 1 - axis), dst=moved,
                 anchor=(0, 1) if axis == 0 else (1, 0), delta=1 / 4096)
    np.clip(moved, 0, 255, out=cut)
    return (cut[1:-2] if axis == 0 else cut[:, 1:-2]).astype(np.uint8)


def _extend(image: np.ndarray, axis: int, before: int, after: int, kind: int,
            fill: ops.Fill = (0, 0, 0)) -> np.ndarray:
    """Adds rows (axis 0) or columns (axis 1) in front and behind."""
    top, bottom, left, right = (before, after, 0, 0) if axis == 0 else (0, 0, before, after)
    return cv2.copyMakeBorder(image, top, bottom, left, right, kind, value=fill)
