"""Decoding, resizing, cutting and erasing of uint8 RGB arrays [H, W, 3], with OpenCV.

What RandAugment does to a view besides is in `data.color` and `data.warp`.

Functions here and there return a new array or their input unchanged, and depend on their arguments
alone, in any thread: OpenCV's own threads are switched off for the whole process when this module
is imported (parallelism is the business of whoever calls), and Intel's closed kernels wherever they
would change a pixel. What can still differ is stated with the golden tests: with and without AVX2
and FMA rotation and shear differ by one level in up to ten of 150,000 values, all the rest is
equal; other OpenCV releases and other families of CPU were not compared.
"""

import math
import statistics
import threading
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from tinyvit_jax.data import jpeg, ppm
from tinyvit_jax.data.jpeg import Box

cv2.setNumThreads(0)

Fill = tuple[int, int, int]

JPEG_QUALITY = 90
# How many times smaller a side may become by a bilinear kernel, by Spec.pixels. The first kernel is
# the one that OpenCV promises to be equal bit by bit on every machine. The second was equal in its
# releases 4.10, 4.12 and 5.0, with AVX2 and without.
_BILINEAR = {"exact": (0, cv2.INTER_AREA), "fast": (2, cv2.INTER_LINEAR_EXACT),
             "faster": (3, cv2.INTER_LINEAR)}
_FITS_CACHE = 1 << 21  # values of an image that are worth a copy as float32

_kept = threading.local()


def use_open_kernels() -> None:
    """Switches Intel's closed kernels off: OpenCV keeps this choice for each thread apart."""
    cv2.ipp.setUseIPP(False)


def work_in(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 arrays of a shape that this thread keeps, with what the last user left in them.

    New ones for each operation would be pages that the kernel clears first, again and again.
    """
    size = math.prod(shape)
    if getattr(_kept, "size", 0) < size:
        _kept.size, _kept.pair = size, np.empty((2, size), np.float32)
    one, other = (flat[:size].reshape(shape) for flat in _kept.pair)
    return one, other


class ImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


class Window(NamedTuple):
    """What is to be decoded of an image.

    Attributes:
        data: the file's bytes.
        name: what to call the image in an error.
        place: fn(height, width of the image in pixels) -> the window, inside of it.
        header: of a plain JPEG; None for other images, whose size is known when they are decoded.
        box: the window, where there is a header.
    """

    data: bytes
    name: str
    place: Callable[[int, int], Box]
    header: jpeg.Header | None
    box: Box | None


def decode(data: bytes, name: str) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP or any other still image that OpenCV reads.

    Args:
        data: the file's bytes.
        name: what to call the image in an error.

    Returns:
        uint8 [H, W, 3] RGB, turned upright by its EXIF orientation; grey is repeated over the
        channels, alpha is dropped, 16 bits become 8. Of a plain PPM it is the bytes themselves and
        cannot be written to.

    Raises:
        ImageError: for bytes that are no image, or not all of one.
    """
    return decode_window(find_window(data, name, lambda height, width: (0, 0, height, width)))


def find_window(data: bytes, name: str, place: Callable[[int, int], Box]) -> Window:
    """Finds what `decode_window` decodes, as far as a file's first bytes tell.

    Args:
        data: the file's bytes.
        name: what to call the image in an error.
        place: fn(height, width of the image in pixels) -> the window, inside of it.

    Raises:
        ImageError: for no bytes, or a JPEG without its end.
    """
    if not data or _jpeg_stops_early(data):
        raise make_image_error(name, len(data))
    header = jpeg.read_header(data)
    box = None if header is None else place(header.height, header.width)
    return Window(data, name, place, header, box)


def decode_window(window: Window, enough: int = 0) -> np.ndarray:
    """Decodes a window of an image: of a plain JPEG little more than is asked for.

    Args:
        window: from `find_window`.
        enough: 0, or the fast way for plain JPEGs: where both sides of the window have twice (4, 8
            times) as many pixels, they are decoded at 1/2 (1/4, 1/8) of their size, and the colour
            that pixels share is not blended with their neighbours'.

    Returns:
        uint8 [y1 - y0, x1 - x0, 3] RGB: with enough=0 the pixels that `decode` gives there. Else
        near them, as many or 1/2, 1/4, 1/8 of each side, and mostly with a fourth byte of no
        meaning, in memory that the next call on the same thread overwrites: `resize` and `flip`
        take these, `as_rgb` drops the byte and copies.

    Raises:
        ImageError: for bytes that are no image, or not all of one.
    """
    data, name, place, header, box = window
    if header is not None and box is not None:
        enough = 0 if header.exact else enough
        pixels = jpeg.decode_window(data, header, box, _find_factor(box, enough), enough > 0)
        if pixels is not None:
            return pixels
    image = ppm.decode(data)
    if image is None:
        image = _decode_by_opencv(data, name)
    y0, x0, y1, x1 = place(*image.shape[:2])
    return crop(image, y0, x0, y1 - y0, x1 - x0)


def _find_factor(box: Box, enough: int) -> int:
    """How many times smaller a window may be decoded: 1, 2, 4 or 8."""
    side = min(box[2] - box[0], box[3] - box[1])
    # One pixel more, because the window's edges are rounded in the smaller image.
    return next((f for f in (8, 4, 2) if enough and side >= f * (enough + 1)), 1)


def _decode_by_opencv(data: bytes, name: str) -> np.ndarray:
    """Decodes the whole of an image of any kind to RGB."""
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


def encode_jpeg(image: np.ndarray, interval: int = 0) -> bytes:
    """Encodes uint8 [H, W, 3] RGB as a JPEG of quality 90.

    Args:
        image: the pixels.
        interval: units of 16 x 16 pixels from one restart marker to the next; 0 = no markers.
    """
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY,
                                      cv2.IMWRITE_JPEG_RST_INTERVAL, interval])[1].tobytes()


def encode_png(image: np.ndarray) -> bytes:
    """Encodes uint8 [H, W] grey or [H, W, 3] RGB as a PNG at the highest compression."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()


def resize(image: np.ndarray, height: int, width: int, pixels: str = "exact") -> np.ndarray:
    """Resizes for training: area averaging when both sides shrink, else OpenCV's bicubic.

    Area averaging avoids aliasing as PIL's widened bicubic does, a little softer and much faster.

    Args:
        image: uint8 [h, w, 3], or 4 bytes a pixel.
        height: rows of the result.
        width: columns of the result.
        pixels: "fast" interpolates from four pixels where no side shrinks to less than half: three
            times as fast again, a little sharper with some aliasing (what tf.image.resize does).
            "faster" does so down to a third, with weights of 11 bits for 8: faster still.

    Returns:
        uint8 [height, width, 3], or 4 bytes as they came.
    """
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    use_open_kernels()
    least, kernel = _BILINEAR[pixels]
    if h <= least * height and w <= least * width:
        return cv2.resize(image, (width, height), interpolation=kernel)
    if h < height or w < width:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    blocks = h % height == 0 and w % width == 0  # which OpenCV sums up another way
    if blocks or image.size > _FITS_CACHE:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    # OpenCV sums fractions of pixels up as float32 in any case, and faster if they come as such.
    sums = cv2.resize(image.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return cv2.convertScaleAbs(sums)


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
    """Mirrors left and right: uint8 [H, W, 3], or with a fourth byte, -> [H, W, 3]."""
    # OpenCV mirrors four channels by vector instructions and three one by one.
    if image.shape[2] == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
    return as_rgb(cv2.flip(image, 1))


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Drops a fourth byte: uint8 [H, W, 3], or with one, -> [H, W, 3], one row after the other."""
    if image.shape[2] == 4:
        return cv2.cvtColor(image, cv2.COLOR_RGBA2RGB)
    return np.ascontiguousarray(image)


def pad(image: np.ndarray, width: int) -> np.ndarray:
    """Adds a border of `width` zero pixels on every side."""
    return cv2.copyMakeBorder(image, width, width, width, width, cv2.BORDER_CONSTANT)


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
