"""Windows of JPEGs: the pixels of the whole image, from less of its data."""

import io
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image

from tinyvit_jax.data import jpeg, ops

SAMPLINGS = {"4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
             "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
             "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
             "4:4:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
             "4:1:1": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411}
SIZES = [(96, 128), (61, 75), (33, 17), (16, 200), (130, 9), (1, 1)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Colours that change slowly under noise, so that wrong blocks and wrong edges show."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    image = 40 * cv2.GaussianBlur(noise, (0, 0), 3).reshape(height, width, 3) * 8 + 10 * noise
    return np.clip(image + 128, 0, 255).astype(np.uint8)


def encode(image: np.ndarray, sampling: str = "4:2:0", interval: int = 0) -> bytes:
    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling],
               cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    return cv2.imencode(".jpg", image, options)[1].tobytes()


def save(image: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **options)
    return file.getvalue()


def make_boxes(height: int, width: int, count: int, seed: int = 0) -> list[jpeg.Box]:
    generator = np.random.default_rng(seed)
    edges = [[sorted(generator.choice(side + 1, 2, replace=False).tolist()) for _ in range(count)]
             for side in (height, width)]
    return [(y0, x0, y1, x1) for (y0, y1), (x0, x1) in zip(*edges, strict=True)]


def decode_at(data: bytes, name: str, place, enough: int = 0) -> np.ndarray:
    return ops.decode_window(ops.find_window(data, name, place), enough)


def check_windows(data: bytes, count: int = 12) -> None:
    """Windows are those of the image that OpenCV decodes as a whole."""
    whole = ops._decode_by_opencv(data, "x")
    header = jpeg.read_header(data)
    assert (header.height, header.width) == whole.shape[:2]
    for box in [(0, 0, *whole.shape[:2]), *make_boxes(*whole.shape[:2], count)]:
        y0, x0, y1, x1 = box
        window = jpeg.decode_window(data, header, box)
        assert np.array_equal(window, whole[y0:y1, x0:x1]), box


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sampling", [name for name in SAMPLINGS if name != "4:1:1"])
def test_windows_are_those_of_the_whole_image(size, sampling):
    unit = 16 if sampling in ("4:2:2", "4:2:0") else 8
    row = -(-size[1] // unit)
    for interval in {0, 1, 2, 3, row, 2 * row, row + 1}:
        check_windows(encode(picture(*size), sampling, interval))


def test_windows_of_a_grey_image():
    grey = picture(61, 75)[..., 0]
    for interval in (0, 1, 4):
        data = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_RST_INTERVAL, interval])[1].tobytes()
        check_windows(data)


def orient(orientation: int, thumbnail: bytes = b"") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes() + thumbnail


@pytest.mark.parametrize(("options", "plain"), [
    ({"progressive": True}, False), ({"exif": orient(6)}, False), ({"exif": orient(1)}, True),
    ({"exif": orient(0)}, True),
    ({"exif": orient(1, b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x08")}, False),
    ({"keep_rgb": True}, False), ({"comment": b"a note"}, True), ({"optimize": True}, True),
], ids=["progressive", "turned", "upright", "no orientation", "doubtful", "stored as RGB",
        "comment", "optimised"])
def test_only_plain_files_have_a_header(options, plain):
    data = save(picture(61, 75), **options)
    assert (jpeg.read_header(data) is not None) == plain
    assert np.array_equal(ops.decode(data, "x"), ops._decode_by_opencv(data, "x"))
    if plain:
        check_windows(data)


def test_a_file_without_orientation_is_decoded_exactly():
    """As it was before its windows were cut, or a stored view of it would not be what it was."""
    image = cv2.GaussianBlur(picture(160, 192), (0, 0), 4)
    for orientation, exact in ((0, True), (1, False)):
        data = save(image, exif=orient(orientation))
        window = decode_at(data, "x", lambda h, w: (10, 20, 120, 140), enough=32)
        expected = ops._decode_by_opencv(data, "x")[10:120, 20:140]
        assert np.array_equal(window, expected) == exact


def test_other_files_have_no_header():
    cmyk = io.BytesIO()
    Image.fromarray(picture(61, 75)).convert("CMYK").save(cmyk, "JPEG")
    data = encode(picture(61, 75))
    others = [b"", b"\xff\xd8", ops.encode_png(picture(5, 5)), cmyk.getvalue(), data[:300],
              encode(picture(61, 75), "4:1:1"), data.replace(b"\xff\xc0", b"\xff\xc9", 1)]
    assert [jpeg.read_header(other) for other in others] == [None] * len(others)
    for whole in (cmyk.getvalue(), others[5]):
        assert np.array_equal(ops.decode(whole, "x"), ops._decode_by_opencv(whole, "x"))


def test_what_lies_below_is_not_decoded():
    data = encode(picture(160, 160))
    part, top, left = jpeg._cut(data, jpeg.read_header(data), (0, 20, 47, 60))
    assert jpeg.read_header(bytes(part)).height == 48
    assert jpeg.read_header(bytes(jpeg._cut(data, jpeg.read_header(data), (0, 20, 48, 60))[0])
                            ).height == 64  # one row more, for the colours on the edge
    assert (top, left) == (0, 0)


def test_what_lies_around_is_left_out_between_restart_markers():
    data = encode(picture(160, 160), interval=1)
    header = jpeg.read_header(data)
    part, top, left = jpeg._cut(data, header, (64, 33, 95, 63))
    inner = jpeg.read_header(part)
    assert (inner.height, inner.width, top, left) == (48, 32, 48, 32)
    share = (len(part) - header.data_at) / (len(data) - header.data_at)
    assert share == pytest.approx(3 * 2 / 100, rel=0.3)


def test_missing_markers_leave_the_rows_above_in():
    data = encode(picture(96, 96), interval=1)
    at, _ = jpeg._find_restarts(data, jpeg.read_header(data).data_at)
    lost = data[:at[9]] + data[at[9] + 2:]
    assert jpeg._cut_around(lost, jpeg.read_header(lost), (40, 40, 60, 60)) is None
    assert np.array_equal(decode_at(lost, "x", lambda *size: (40, 40, 60, 60)),
                          ops._decode_by_opencv(lost, "x")[40:60, 40:60])


def test_a_file_that_stops_early_is_refused_even_below_the_window():
    data = encode(picture(160, 160))
    for end in (len(data) - 2, len(data) * 3 // 4):
        with pytest.raises(ops.ImageError, match="Image cat/7 cannot be decoded"):
            decode_at(data[:end], "cat/7", lambda *size: (0, 0, 16, 16))


def damage(data: bytes, generator: np.random.Generator) -> bytes:
    """One of several ways in which files go bad."""
    at = int(generator.integers(2, len(data) - 2))
    return (data[:at] + bytes([data[at] ^ 1 << int(generator.integers(8))]) + data[at + 1:],
            data[:at] + bytes(8) + data[at + 8:],
            data[:at] + data[at + 5:],
            data[:at] + generator.bytes(7) + data[at:],
            data[:at] + bytes([255, int(generator.integers(192, 255))]) + data[at + 2:],
            )[int(generator.integers(5))]


@pytest.mark.parametrize("interval", [0, 1])
def test_damaged_files_give_what_opencv_gives(interval, capfd):
    generator = np.random.default_rng(interval)
    refused = 0
    for seed in range(150):
        data = damage(encode(picture(64, 80, seed), interval=interval), generator)
        try:
            expected = ops._decode_by_opencv(data, "x")
        except ops.ImageError:
            refused += 1
            continue
        if ops._jpeg_stops_early(data):
            continue
        assert np.array_equal(ops.decode(data, "x"), expected)
        half = expected.shape[0] // 2
        window = decode_at(data, "x", lambda h, w: (h // 4, w // 4, h // 2, w // 2))
        assert np.array_equal(window, expected[expected.shape[0] // 4:half,
                                               expected.shape[1] // 4:expected.shape[1] // 2])
    assert refused < 75


@pytest.mark.parametrize("interval", [0, 1])
def test_fast_windows_are_those_of_the_whole_image(interval):
    image = cv2.GaussianBlur(picture(160, 192), (0, 0), 4)
    data = encode(image, interval=interval)
    header = jpeg.read_header(data)
    whole = jpeg.decode_window(data, header, (0, 0, 160, 192), fast=True).copy()
    assert whole.shape == (160, 192, 4)
    for y0, x0, y1, x1 in make_boxes(160, 192, 12):
        window = jpeg.decode_window(data, header, (y0, x0, y1, x1), fast=True)
        np.testing.assert_array_equal(window[..., :3], whole[y0:y1, x0:x1, :3])
    blended = jpeg.decode_window(data, header, (0, 0, 160, 192))
    # Coloured noise: photographs are a tenth of a level apart.
    assert 0 < np.abs(whole[..., :3].astype(int) - blended).mean() < 2


def test_fast_windows_lie_in_memory_of_their_thread(monkeypatch):
    images = [cv2.GaussianBlur(picture(160, 192, seed), (0, 0), 4) for seed in (0, 1)]

    def decode(image):
        data = encode(image)
        return jpeg.decode_window(data, jpeg.read_header(data), (0, 0, 160, 192), fast=True)

    one = decode(images[0])
    kept = one.copy()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(decode, images[1]).result()
    assert not np.shares_memory(one, other)
    np.testing.assert_array_equal(one, kept)
    assert np.shares_memory(one, decode(images[1]))
    np.testing.assert_array_equal(one[..., :3], other[..., :3])
    monkeypatch.setattr(jpeg, "_KEPT", 4 * 160 * 192 - 1)  # too large to be kept
    own = decode(images[0])
    assert not np.shares_memory(one, own)
    np.testing.assert_array_equal(own[..., :3], kept[..., :3])


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("interval", [0, 1])
def test_smaller_windows_are_means_of_the_whole(factor, interval):
    image = cv2.GaussianBlur(picture(160, 192), (0, 0), 4)
    data = encode(image, interval=interval)
    header = jpeg.read_header(data)
    box = (40, 24, 136, 176)
    window = jpeg.decode_window(data, header, box, factor)
    assert window.shape == (96 // factor, 152 // factor, 3)
    exact = jpeg.decode_window(data, header, box)
    means = cv2.resize(exact, window.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(window.astype(int) - means).mean() < 1.5
    whole = jpeg.decode_window(data, header, (0, 0, 160, 192), factor)
    odd = jpeg.decode_window(data, header, (43, 29, 137, 178), factor)
    y0, x0, y1, x1 = (int(edge / factor + 0.5) for edge in (43, 29, 137, 178))
    assert np.array_equal(odd, whole[y0:y1, x0:x1])
