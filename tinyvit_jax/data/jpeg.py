"""Windows of JPEGs: libjpeg-turbo decodes what a crop shows, and not what lies around it.

Nearly all the time of decoding goes to the entropy-coded data, bit after bit from the top. So a
shorter image is declared in the header, and the decoder stops below the window. Where the file has
restart markers, what lies above and beside the window is left out of the data as well.

Pixels are those of the whole image, bit by bit: its smallest unit is kept whole, and a pixel more
on every side, since the upsampling of colour looks one pixel over each edge. Only plain files are
taken (baseline, 8 bits, one scan, upright, YCbCr or grey in the usual subsamplings); the others
have no header here, and are for OpenCV.
"""

import re
import struct
import threading
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

Box = tuple[int, int, int, int]  # y0, x0, y1, x1; the end is outside

_SEGMENT = struct.Struct(">BBH")  # 0xFF, kind, length with its own two bytes
_FRAME = struct.Struct(">BHHB")  # bits, height, width, components
_SIZE = struct.Struct(">HH")
_BASELINE, _RESTART, _EXIF, _ADOBE, _SCAN = (0xC0, 0xC1), 0xDD, 0xE1, 0xEE, 0xDA
# Tables, comments and other notes.
_PASSED_OVER = frozenset((0xC4, 0xDB, 0xFE, *range(0xE0, 0xF0))) - {_EXIF, _ADOBE}
_SAMPLINGS = (b"\x11", b"\x21", b"\x22", b"\x12")  # of luma, in blocks; colour has one
_WHOLE_SPECTRUM = b"\x00\x3f\x00"
_END = b"\xff\xd9"
# The orientation tag with any type, and where it says upright (1) or nothing (0), in either byte
# order. Each begins with bytes that stand, as `re` finds those eight times as fast.
_ORIENTATIONS = tuple((re.compile(tag), re.compile(upright)) for tag, upright in (
    (rb"\x01\x12\x00[\x01-\x0c]\x00\x00", rb"\x01\x12\x00\x03\x00\x00\x00\x01\x00([\x00\x01])"),
    (rb"\x12\x01[\x01-\x0c]\x00", rb"\x12\x01\x03\x00\x01\x00\x00\x00([\x00\x01])\x00")))
_KEPT = 1 << 22  # bytes of pixels that a thread keeps for its next image

_own = threading.local()


class Header(NamedTuple):
    """What a window needs to know of a JPEG.

    Attributes:
        height: of the image in pixels.
        width: likewise.
        mcu: rows and columns of the smallest unit of the data, in pixels.
        interval: units from one restart marker to the next; 0 = there are none.
        size_at: where in the file the height is, and after it the width.
        data_at: where the entropy-coded data begins.
        exact: its pixels are never decoded the fast way. These are files whose orientation is 0,
            for which earlier versions had no header.
    """

    height: int
    width: int
    mcu: tuple[int, int]
    interval: int
    size_at: int
    data_at: int
    exact: bool = False


def read_header(data: bytes) -> Header | None:
    """Reads up to the entropy-coded data of a JPEG.

    Returns:
        The header, or None for a file that windows are not taken of.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    at, frame, interval, exact = 2, 0, 0, False
    while at + _SEGMENT.size <= len(data):
        mark, kind, length = _SEGMENT.unpack_from(data, at)
        if mark != 0xFF or length < 2:
            return None
        body, at = at + _SEGMENT.size, at + 2 + length
        if kind in _PASSED_OVER:
            continue
        if kind in _BASELINE and not frame:
            frame = body
        elif kind == _RESTART:
            interval = int.from_bytes(data[body:body + 2], "big")
        elif kind == _SCAN:
            return _describe(data, frame, interval, body, at, exact)
        elif kind == _EXIF:
            values = _read_orientations(data, body, at)
            if values is None:
                return None
            exact |= 0 in values
        elif kind != _ADOBE or _is_not_ycc(data[body:body + 12]):
            return None
    return None


def _read_orientations(data: bytes, start: int, end: int) -> set[int] | None:
    """The orientations in a note, each 1 = upright or 0 = none given; None if it has another."""
    found: set[int] = set()
    if not data.startswith(b"Exif", start):
        return found
    for tag, upright in _ORIENTATIONS:
        values = upright.findall(data, start, end)
        if len(tag.findall(data, start, end)) != len(values):
            return None
        found.update(value[0] for value in values)
    return found


def _is_not_ycc(note: bytes) -> bool:
    """Whether Adobe's note says that the colours are not YCbCr."""
    return note.startswith(b"Adobe") and note[11:] != b"\x01"


def _describe(data: bytes, frame: int, interval: int, scan: int, data_at: int, exact: bool
              ) -> Header | None:
    """The header from where its segments lie, if the frame and the scan are plain."""
    if not frame or data_at > len(data):
        return None
    bits, height, width, components = _FRAME.unpack_from(data, frame)
    samplings = [data[frame + i:frame + i + 1] for i in range(7, 6 + 3 * components, 3)]
    plain = samplings[:1] == [b"\x11"] if components == 1 else (
        components == 3 and samplings[0] in _SAMPLINGS and samplings[1:] == [b"\x11"] * 2)
    one_scan = data[scan] == components and data[data_at - 3:data_at] == _WHOLE_SPECTRUM
    if bits != 8 or not (height and width and plain and one_scan):
        return None
    across, down = divmod(samplings[0][0], 16)
    return Header(height, width, (8 * down, 8 * across), interval, frame + 1, data_at, exact)


def decode_window(data: bytes, header: Header, box: Box, factor: int = 1,
                  fast: bool = False) -> np.ndarray | None:
    """Decodes a window of an image.

    Args:
        data: the file's bytes.
        header: from `read_header`.
        box: the window, inside the image.
        factor: 1, or the image is decoded at 1/2, 1/4 or 1/8 of its size: from fewer frequencies
            of each block, and with the edges of the window on the nearest pixel.
        fast: all pixels that share a stored colour get that one, and not a blend with their
            neighbours' (an eighth of a level), and each has a fourth byte, of no meaning, for
            vector instructions: together a tenth of the time. They lie in memory that the next
            fast window of the same thread overwrites.

    Returns:
        uint8 [(y1 - y0) / factor, (x1 - x0) / factor, 3] RGB, or 4 bytes each, rounded one way or
        the other; or None where libjpeg-turbo finds the file damaged.
    """
    part, top, left = _cut(data, header, box)
    least = [-(-side // factor) for side in _SIZE.unpack_from(part, header.size_at)]
    # Of an image declared shorter, libjpeg-turbo finds data left over, and warns: not an error.
    left_over = isinstance(part, bytearray)
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            part, "RGBX" if fast else "RGB", min_height=least[0], min_width=least[1],
            min_factor=factor, fastupsample=fast, strict=not left_over,
            buffer=_find_memory(4 * least[0] * least[1]) if fast else None)
    except ValueError:
        return None
    y0, x0, y1, x1 = ((edge - start + factor // 2) // factor
                      for edge, start in zip(box, (top, left) * 2, strict=True))
    return pixels[y0:y1, x0:x1]


def _find_memory(size: int) -> np.ndarray:
    """So many bytes, mostly those of this thread's last call: its core's cache still holds them."""
    if size > _KEPT:
        return np.empty(size, np.uint8)
    if not hasattr(_own, "memory"):
        _own.memory = np.empty(_KEPT, np.uint8)
    return _own.memory


def _cut(data: bytes, header: Header, box: Box) -> tuple[Any, int, int]:
    """A JPEG of the window and a little around it.

    Returns:
        The file's bytes, a bytearray where more data follows than its header declares, and the row
        and the column of the image that it begins at.
    """
    part = _cut_around(data, header, box) if header.interval else None
    if part is not None:
        return part
    unit = header.mcu[0]
    height = -(-(box[2] + 1) // unit) * unit
    if height >= header.height:
        return data, 0, 0
    shorter = bytearray(data)
    _SIZE.pack_into(shorter, header.size_at, height, header.width)
    return shorter, 0, 0


def _cut_around(data: bytes, header: Header, box: Box) -> tuple[bytes, int, int] | None:
    """Leaves out the restart intervals on every side of the window.

    Returns:
        As `_cut` does, or None where the intervals form no grid, or markers are missing.
    """
    across = -(-header.width // header.mcu[1])
    if across % header.interval and header.interval % across:
        return None
    unit_h = header.mcu[0] * max(1, header.interval // across)
    unit_w = header.mcu[1] * min(across, header.interval)
    rows, columns = -(-header.height // unit_h), -(-header.width // unit_w)
    y0, x0, y1, x1 = box
    top, bottom = max(0, y0 - 1) // unit_h, min(rows, -(-(y1 + 1) // unit_h))
    left, right = max(0, x0 - 1) // unit_w, min(columns, -(-(x1 + 1) // unit_w))
    if (bottom - top, right - left) == (rows, columns):
        return data, 0, 0
    markers, end = _find_restarts(data, header.data_at)
    if len(markers) != rows * columns - 1:
        return None
    # The decoder wants the markers it meets counted from 0 to 7, over and over.
    before = np.arange(len(markers))  # the interval that each marker ends
    row, column = before // columns - top, before % columns - left
    counted = bytearray(data)
    np.frombuffer(counted, np.uint8)[markers + 1] = (
        0xD0 + (row * (right - left) + column) % 8)
    starts = [header.data_at, *(markers + 2).tolist(), end + 2]
    body = b"".join(counted[starts[r * columns + left]:starts[r * columns + right]]
                    for r in range(top, bottom))
    _SIZE.pack_into(counted, header.size_at, min(header.height, bottom * unit_h) - top * unit_h,
                    min(header.width, right * unit_w) - left * unit_w)
    # In place of its last marker it gets the end.
    return b"".join((counted[:header.data_at], body[:-2], _END)), top * unit_h, left * unit_w


def _find_restarts(data: bytes, start: int) -> tuple[np.ndarray, int]:
    """Where in a file the restart markers lie, int [n], and where the data ends, 0 = nowhere.

    A byte of 0xFF in the data itself is followed by a zero.
    """
    body = np.frombuffer(data, np.uint8, offset=start)
    at = np.flatnonzero(body[:-1] == 0xFF)
    kind = body[at + 1]
    others = np.flatnonzero((kind != 0) & (kind != 0xFF) & (kind & 0xF8 != 0xD0))
    if not len(others):
        return at[:0], 0
    before = slice(0, others[0])
    return at[before][kind[before] & 0xF8 == 0xD0] + start, int(at[others[0]]) + start
