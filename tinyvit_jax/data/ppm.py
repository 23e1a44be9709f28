"""Pixels as they are, in the bytes of a file: the binary PPM, a header of a line and then RGB.

Sources whose images are arrays hand them on as such a file, so that everything that takes an image
takes them too, and reading one back is no decoding: no byte is moved.
"""

import re

import numpy as np

_HEADER = re.compile(rb"P6\s(\d{1,6})\s(\d{1,6})\s255\s")


def encode(pixels: np.ndarray) -> bytes:
    """Writes uint8 [H, W, 3] RGB as a PPM, every byte as it is."""
    height, width, _ = pixels.shape
    return header(height, width) + pixels.tobytes()


def header(height: int, width: int) -> bytes:
    """What stands before the pixels of an image of that size."""
    return b"P6 %d %d 255\n" % (width, height)


def decode(data: bytes) -> np.ndarray | None:
    """Reads a PPM as `encode` writes it.

    Args:
        data: bytes of any file.

    Returns:
        uint8 [H, W, 3] RGB that shares the memory of `data` and cannot be written to; None for any
        other file (a PPM with comments or 16 bits among them) and for one that is not complete.
    """
    if not data.startswith(b"P6"):
        return None
    match = _HEADER.match(data)
    if match is None:
        return None
    width, height = int(match[1]), int(match[2])
    if not width * height or len(data) - match.end() != 3 * width * height:
        return None
    return np.frombuffer(data, np.uint8, offset=match.end()).reshape(height, width, 3)
