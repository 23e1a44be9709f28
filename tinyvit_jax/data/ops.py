"""Pixel operations on uint8 RGB arrays [H, W, 3], with OpenCV and nothing else.

The augmentations are those of RandAugment (Cubuk et al., 2020, arXiv 1909.13719) in the form that
TinyViT was trained with: timm's "increasing" set over PIL images. Point operations, colour,
contrast and sharpness give PIL's pixels exactly, translation within one level. Rotation and shear
interpolate with OpenCV's bicubic kernel (a = -0.75, coordinates in 1/32 pixel) where PIL has
a = -1 and cuts fractions off: half a level apart on average, more on edges and on the border of the
filled outside.

Functions return a new array or their input unchanged, and depend on their arguments alone, in any
thread: OpenCV's own threads are switched off for the whole process when this module is imported
(parallelism is the business of whoever calls), and Intel's closed kernels wherever they would
change a pixel. What can still differ is stated with the golden tests: with and without AVX2 and FMA
rotation and shear differ by one level in up to ten of 150,000 values, all the rest is equal; other
OpenCV releases and other families of CPU were not compared.
"""

import math
import statistics
from collections.abc import Callable

import cv2
import numpy as np

cv2.setNumThreads(0)

Fill = tuple[int, int, int]

JPEG_QUALITY = 95
_SOLARIZE_ADD_BELOW = 128
_LUMA = (19595, 38470, 7471)  # ITU-R 601 weights in 1/65536, as PIL's "L" has them
_RAMP = np.arange(256, dtype=np.int32)


def _use_open_kernels() -> None:
    """Switches Intel's closed kernels off: OpenCV keeps this choice for each thread apart."""
    cv2.ipp.setUseIPP(False)


class ImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


def decode(data: bytes, name: str) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP or any other still image that OpenCV reads.

    Args:
        data: the file's bytes.
        name: what to call the image in an error.

    Returns:
        uint8 [H, W, 3] RGB, turned upright by its EXIF orientation; grey is repeated over the
        channels, alpha is dropped, 16 bits become 8.

    Raises:
        ImageError: for bytes that are no image, or not all of one.
    """
    image = None
    if data and not _jpeg_stops_early(data):
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error:  # a size over OpenCV's limit
            image = None
    if image is None:
        raise make_image_error(name, len(data))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def make_image_error(name: str, length: int) -> ImageError:
    """The error for an image whose bytes, of a given length, cannot be decoded."""
    return ImageError(
        f"Image {name} cannot be decoded: its {length} bytes are not a complete JPEG, PNG or WebP "
        f"file. Replace or delete it; tools/pack_images.py finds every such image of a set and "
        f"leaves it out."
    )


def _jpeg_stops_early(data: bytes) -> bool:
    """Whether a JPEG lacks its end marker; some OpenCV versions fill the rest with grey."""
    if not data.startswith(b"\xff\xd8"):
        return False
    end = data.rfind(b"\xff\xd9")
    return end < 0 or data.find(b"\xff\xda", end) >= 0  # the end found is a thumbnail's


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, 3] RGB as a JPEG of quality 95."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def encode_png(image: np.ndarray) -> bytes:
    """Encodes uint8 [H, W] grey or [H, W, 3] RGB as a PNG at the highest compression."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes for training: area averaging when both sides shrink, else OpenCV's bicubic.

    Area averaging avoids aliasing as PIL's widened bicubic does, a little softer and much faster.

    Args:
        image: uint8 [h, w, 3].
        height: rows of the result.
        width: columns of the result.

    Returns:
        uint8 [height, width, 3].
    """
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    shrinks = h >= height and w >= width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    _use_open_kernels()
    return cv2.resize(image, (width, height), interpolation=how)


def resize_bicubic(image: np.ndarray, height: int, width: int,
                   top: int = 0, left: int = 0, rows: int = 0, cols: int = 0) -> np.ndarray:
    """Resizes for evaluation as PIL's antialiased bicubic does (a = -0.5), within one level.

    Only the window of the result that is asked for is computed, so a centre crop costs its own
    size and not the whole image's.

    Args:
        image: uint8 [h, w, 3].
        height: rows of the whole result.
        width: columns of the whole result.
        top: first row of the window.
        left: first column of the window.
        rows: rows of the window; 0 = all.
        cols: columns of the window; 0 = all.

    Returns:
        uint8 [rows, cols, 3].
    """
    h, w = image.shape[:2]
    low_y, weight_y = _taps(h, height, top, rows or height)
    low_x, weight_x = _taps(w, width, left, cols or width)
    # Across, then down, rounded to bytes in between: the order of Pillow up to 12. From 13 on it
    # turns round where the height shrinks much more than the width, and clips differently there.
    first, last = low_y[0], low_y[-1] + weight_y.shape[1]
    across = _weigh_rows(cv2.transpose(image[first:last]), low_x, weight_x)
    return _weigh_rows(cv2.transpose(across), low_y - first, weight_y)


def _taps(size: int, new_size: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs that outputs start..start+count are made of.

    Returns:
        First input of each, int [count], and the weights from there on, float32 [count, taps].
    """
    scale = size / new_size
    stretch = max(scale, 1.0)
    center = (np.arange(start, start + count) + 0.5) * scale
    low = np.maximum(center - 2 * stretch + 0.5, 0).astype(np.int64)
    high = np.minimum(center + 2 * stretch + 0.5, size).astype(np.int64)
    taps = (high - low).max()
    first = np.minimum(low, size - taps)
    at = first[:, None] + np.arange(taps)
    x = np.abs((at - center[:, None] + 0.5) / stretch)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights[(at < low[:, None]) | (at >= high[:, None])] = 0
    return first, (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _weigh_rows(image: np.ndarray, first: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums rows [h, w, 3] by their weights, rounds and clips: uint8 [count, w, 3]."""
    count, taps = weights.shape
    flat = image.reshape(len(image), -1).astype(np.float32)
    out = np.empty((count, flat.shape[1]), np.float32)
    for i, low in enumerate(first.tolist()):
        np.dot(weights[i], flat[low:low + taps], out=out[i])
    out += 0.5
    np.clip(out, 0, 255, out=out)
    return out.astype(np.uint8).reshape(count, image.shape[1], 3)


def crop(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Cuts a window that lies inside the image: a view, not a copy."""
    return image[top:top + height, left:left + width]


def flip(image: np.ndarray) -> np.ndarray:
    """Mirrors left and right."""
    return cv2.flip(image, 1)


def pad(image: np.ndarray, width: int) -> np.ndarray:
    """Adds a border of `width` zero pixels on every side."""
    return cv2.copyMakeBorder(image, width, width, width, width, cv2.BORDER_CONSTANT)


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel to the full range."""
    return _map_channels(image, _contrast_table)


def equalize(image: np.ndarray) -> np.ndarray:
    """Flattens the histogram of each channel."""
    return _map_channels(image, _equal_table)


def _map_channels(image: np.ndarray, make_table: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Maps each channel by a table made from its histogram int64 [256]."""
    histograms = [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(3)]
    tables = [make_table(h.astype(np.int64)) for h in histograms]
    return cv2.LUT(image, np.stack(tables, -1).astype(np.uint8)[None])


def _contrast_table(histogram: np.ndarray) -> np.ndarray:
    used = np.flatnonzero(histogram)
    low, high = used[0], used[-1]
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
    return _map_all(image, _RAMP & ~(2 ** (8 - min(bits, 8)) - 1))


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts the values from `threshold` upwards: all from 0 down, none from 256 up."""
    return _map_all(image, np.where(threshold <= _RAMP, 255 - _RAMP, _RAMP))


def solarize_add(image: np.ndarray, amount: int) -> np.ndarray:
    """Adds `amount` to the values below 128."""
    return _map_all(image, np.where(_RAMP < _SOLARIZE_ADD_BELOW, _RAMP + amount, _RAMP))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends from black: 0 = black, 1 = the image, above 1 = brighter."""
    return _map_all(image, _blend(np.zeros(256, np.float32), _RAMP, factor))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends from the mean grey level: 0 = flat, 1 = the image, above 1 = more contrast."""
    mean = int(_luma(image).mean(dtype=np.float64) + 0.5)
    return _map_all(image, _blend(np.full(256, mean, np.float32), _RAMP, factor))


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends from the grey image: 0 = grey, 1 = the image, above 1 = more saturated."""
    return _blend(_luma(image)[..., None].astype(np.float32), image, factor)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends from a 3x3 smoothed image (edge pixels as they are): above 1 = sharper."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = image.copy()
    _use_open_kernels()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel)[1:-1, 1:-1]
    return _blend(smooth.astype(np.float32), image, factor)


def _map_all(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))


def _luma(image: np.ndarray) -> np.ndarray:
    """Grey levels uint8 [H, W], rounded as PIL rounds them."""
    r, g, b = (image[..., c].astype(np.int32) for c in range(3))
    return ((r * _LUMA[0] + g * _LUMA[1] + b * _LUMA[2] + 32768) >> 16).astype(np.uint8)


def _blend(base: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """base + factor * (image - base) in float32, clipped, fractions cut off as PIL cuts them."""
    out = image.astype(np.float32)
    out -= base
    out *= np.float32(factor)
    out += base
    np.clip(out, 0, 255, out=out)
    return out.astype(np.uint8)


def rotate(image: np.ndarray, degrees: float, fill: Fill) -> np.ndarray:
    """Rotates counter-clockwise about the centre; the outside is filled."""
    angle = math.radians(-degrees)
    # Rounded, so that the last bit of a platform's sine cannot move a pixel.
    cos, sin = round(math.cos(angle), 9), round(math.sin(angle), 9)
    y, x = image.shape[0] / 2, image.shape[1] / 2
    return _warp(image, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y), fill)


def shear_x(image: np.ndarray, factor: float, fill: Fill) -> np.ndarray:
    """Reads each pixel from `factor` pixels further right for every row down."""
    return _warp(image, (1, factor, 0, 0, 1, 0), fill)


def shear_y(image: np.ndarray, factor: float, fill: Fill) -> np.ndarray:
    """Reads each pixel from `factor` pixels further down for every column to the right."""
    return _warp(image, (1, 0, 0, factor, 1, 0), fill)


def translate_x(image: np.ndarray, fraction: float, fill: Fill) -> np.ndarray:
    """Reads each pixel from `fraction` of the width further right."""
    return _shift_columns(image, fraction * image.shape[1], fill)


def translate_y(image: np.ndarray, fraction: float, fill: Fill) -> np.ndarray:
    """Reads each pixel from `fraction` of the height further down."""
    turned = _shift_columns(cv2.transpose(image), fraction * image.shape[0], fill)
    return cv2.transpose(turned)


def _warp(image: np.ndarray, inverse: tuple[float, ...], fill: Fill) -> np.ndarray:
    """Applies an affine map given from output to input, in coordinates of pixel edges."""
    a, b, c, d, e, f = inverse
    _use_open_kernels()
    centers = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    return cv2.warpAffine(image, centers, image.shape[1::-1], borderValue=fill,
                          flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)


def _shift_columns(image: np.ndarray, distance: float, fill: Fill) -> np.ndarray:
    """Reads each pixel from `distance` pixels further right with PIL's cubic (a = -1)."""
    whole = math.floor(distance)
    d = distance - whole
    taps = np.array([[-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2]])
    width = image.shape[1]
    low, high = max(0, math.ceil(-distance - 0.5)), min(width, math.ceil(width - distance - 0.5))
    out = np.empty_like(image)
    out[:] = fill
    if low < high:
        _use_open_kernels()
        edged = cv2.copyMakeBorder(image, 0, 0, 2, 2, cv2.BORDER_REPLICATE)
        # PIL cuts fractions off; the last bit of a sum of weights must not cost a level there.
        moved = cv2.filter2D(edged, cv2.CV_32F, taps, anchor=(1, 0), delta=1 / 4096)
        out[:, low:high] = np.clip(moved[:, low + whole + 2:high + whole + 2], 0, 255)
    return out


def make_noise_tables(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Byte values of normalised Gaussian noise by the quantile of a uniform byte.

    Args:
        mean: of each channel, of pixels scaled to [0, 1].
        std: likewise.

    Returns:
        uint8 [1, 256, 3]: round(255 * (mean + std * n)), clipped, n the middle of the k-th of 256
        equal parts of N(0, 1): the distribution function is within 1/512 of the Gaussian's, the
        deviation 0.9975, and nothing lies beyond 2.89, where bytes end at 0 and 255 anyway.
    """
    normal = statistics.NormalDist()
    n = np.array([round(normal.inv_cdf((k + 0.5) / 256), 9) for k in range(256)])
    pixels = 255 * (np.array(mean) + n[:, None] * np.array(std))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)[None]


def erase(image: np.ndarray, box: tuple[int, int, int, int], noise_key: int,
          tables: np.ndarray) -> np.ndarray:
    """Overwrites a rectangle with noise that is a pure function of a key.

    Args:
        image: uint8 [H, W, 3].
        box: y0, x0, y1, x1.
        noise_key: 64 bits that name the noise.
        tables: uint8 [1, 256, 3] from `make_noise_tables`.

    Returns:
        uint8 [H, W, 3], a copy.
    """
    y0, x0, y1, x1 = box
    count = (y1 - y0) * (x1 - x0) * 3
    # Raw Philox words are the same under every numpy; the Generator's methods are not.
    words = np.random.Philox(key=noise_key).random_raw((count + 7) // 8).astype("<u8")
    noise = words.view(np.uint8)[:count].reshape(y1 - y0, x1 - x0, 3)
    out = image.copy()
    out[y0:y1, x0:x1] = cv2.LUT(noise, tables)
    return out
