"""Pixel operations against PIL, which the original recipe used."""

import concurrent.futures
import functools
import io
import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
from pictures import FILL, IMAGES, differ, noise_image, smooth_image

from tinyvit_jax.data import color, microsoft, ops, rand_augment, warp

PIL = pytest.importorskip("PIL", minversion="10")
from PIL import Image, ImageOps  # noqa: E402

BICUBIC = Image.Resampling.BICUBIC


def save(image: np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "options"), [
    ("PNG", {}), ("JPEG", {"quality": 90}), ("JPEG", {"progressive": True}),
    ("WEBP", {"lossless": True})])
def test_decode_gives_the_pixels_of_pil(kind, options):
    data = save(IMAGES["smooth"], kind, **options)
    pixels = ops.decode(data, "x")
    assert pixels.dtype == np.uint8
    assert differ(pixels, Image.open(io.BytesIO(data)).convert("RGB")).max() == 0


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_decode_brings_every_png_to_rgb(mode):
    grey = IMAGES["smooth"][..., 0]
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(IMAGES["smooth"]).convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG")
    expected = grey[..., None].repeat(3, 2) if mode == "I;16" else image.convert("RGB")
    assert differ(ops.decode(file.getvalue(), "x"), expected).max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_turns_an_image_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(IMAGES["smooth"], "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert differ(ops.decode(data, "x"), upright).max() == 0


@pytest.mark.parametrize("data", [
    b"", b"no image", save(IMAGES["smooth"], "JPEG")[:-300], save(IMAGES["smooth"], "JPEG")[:-2],
    save(IMAGES["smooth"], "PNG")[:2000]], ids=["empty", "text", "half", "no end", "half png"])
def test_decode_names_an_image_it_cannot_read(data, capfd):
    with pytest.raises(ops.ImageError, match=r"Image cat/7\.jpg cannot be decoded.*pack_images"):
        ops.decode(data, "cat/7.jpg")


def test_decode_is_not_deceived_by_the_end_of_a_thumbnail():
    data = save(IMAGES["smooth"], "JPEG")
    inner = b"\xff\xe1" + (2 + len(data)).to_bytes(2, "big") + data  # a whole JPEG in a segment
    assert ops.decode(data[:2] + inner + data[2:], "x").shape == (96, 80, 3)
    with pytest.raises(ops.ImageError):
        ops.decode(data[:2] + inner + data[2:-2], "x")


def test_end_of_a_jpeg_is_looked_for_whatever_opencv_does():
    # OpenCV 5 refuses half a JPEG itself; earlier ones fill the rest with grey.
    data = save(IMAGES["smooth"], "JPEG")
    assert not ops._jpeg_stops_early(data)
    assert not ops._jpeg_stops_early(data + b"trailing bytes")
    assert ops._jpeg_stops_early(data[:-2])
    assert ops._jpeg_stops_early(data[:2] + data[:-2])
    assert ops._jpeg_stops_early(data[:2] + b"thumbnail \xff\xd9" + data[2:-2])
    assert not ops._jpeg_stops_early(save(IMAGES["smooth"], "PNG"))


def test_encoders_keep_the_pixels():
    image = IMAGES["smooth"]
    assert differ(ops.decode(ops.encode_png(image), "x"), image).max() == 0
    assert differ(ops.decode(ops.encode_png(image[..., 0]), "x"), image[..., :1]).max() == 0
    assert differ(ops.decode(ops.encode_jpeg(image), "x"), image).mean() < 3


@pytest.mark.parametrize("size", [(40, 50), (96, 80), (200, 100), (64, 100), (100, 64), (3, 5)])
def test_resize_has_the_size_and_the_mean(size):
    out = ops.resize(IMAGES["smooth"], *size)
    assert out.shape == (*size, 3)
    assert out.dtype == np.uint8
    assert abs(out.mean() - IMAGES["smooth"].mean()) < 4


@pytest.mark.parametrize("size", [(96, 80), (97, 161), (192, 160), (200, 80), (150, 333)])
def test_shrinking_gives_the_pixels_of_opencv_on_bytes(size):
    for image in (noise_image(*size), noise_image(*size) // 128 * 255):
        expected = cv2.resize(image, (80, 96), interpolation=cv2.INTER_AREA)
        assert np.array_equal(ops.resize(image, 96, 80), expected)


@pytest.mark.parametrize("size", [(90, 70), (150, 130), (40, 50)], ids=["equal", "grow", "shrink"])
def test_a_fourth_byte_changes_no_pixel(size):
    image = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    four = np.dstack([image, np.full((90, 70), 7, np.uint8)])[:, ::-1][:, ::-1]
    for pixels in ("exact", "fast", "faster"):
        plain = ops.resize(image, *size, pixels)
        resized = ops.resize(four, *size, pixels)
        assert np.array_equal(ops.as_rgb(resized), plain)
        assert np.array_equal(ops.flip(resized), plain[:, ::-1])
        assert ops.as_rgb(resized).flags.c_contiguous
    assert np.array_equal(ops.as_rgb(image[::2]), image[::2])


def test_resize_does_not_alias():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 254
    assert differ(ops.resize(stripes, 16, 16), np.full((16, 16, 3), 127)).max() == 0


@pytest.mark.parametrize("size", [(256, 341), (60, 47), (96, 80), (300, 500), (40, 200), (7, 5)])
@pytest.mark.parametrize("name", ["smooth", "noise", "two levels"])
def test_resize_bicubic_is_within_one_level_of_pil(name, size):
    image = IMAGES[name]
    # In two steps, as Pillow 13 goes down before across where the height shrinks the most.
    across = Image.fromarray(image).resize((size[1], image.shape[0]), BICUBIC)
    expected = across.resize(size[::-1], BICUBIC)
    difference = differ(ops.resize_bicubic(image, *size), expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.005


def test_resize_bicubic_computes_the_window_alone():
    whole = ops.resize_bicubic(IMAGES["noise"], 50, 40)
    window = ops.resize_bicubic(IMAGES["noise"], 50, 40, top=11, left=3, rows=20, cols=30)
    assert np.array_equal(window, whole[11:31, 3:33])


def test_resize_bicubic_to_its_own_size_changes_nothing():
    assert np.array_equal(ops.resize_bicubic(IMAGES["noise"], 61, 75), IMAGES["noise"])


def test_crop_flip_and_pad():
    image = IMAGES["noise"]
    assert np.array_equal(ops.crop(image, 5, 7, 20, 30), image[5:25, 7:37])
    assert np.array_equal(ops.flip(image), image[:, ::-1])
    padded = ops.pad(image, 4)
    assert padded.shape == (69, 83, 3)
    assert np.array_equal(padded[4:-4, 4:-4], image)
    assert padded.sum() == image.sum()


PAGE = Path(__file__).parents[1] / "docs" / "augmentation.md"


def page_bounds() -> dict[str, tuple[float, float]]:
    """The table of docs/augmentation.md: operation -> (largest, mean) difference from PIL."""
    table = PAGE.read_text().split("## Operations against PIL")[1].split("##")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines()
            if line.startswith("|")][2:]
    return {name: (255.0 if largest == "any" else float(largest), float(mean))
            for names, largest, mean in rows
            for name in ([names] if names.startswith("resize") else names.split(", "))}


def operation_pairs(name: str):
    """Ours and PIL's of an operation over the levels, on the picture the page names."""
    image = smooth_image(224, 200)
    if name in ("flip", "decode"):
        yield ((ops.flip(image), image[:, ::-1]) if name == "flip" else
               (ops.decode(save(image, "JPEG"), "x"), Image.open(io.BytesIO(save(image, "JPEG")))))
    elif name.startswith("resize"):
        sides = (90, 130) if name.endswith("shrinking") else (290, 410)
        ours = ops.resize_bicubic if name.endswith("evaluation") else ops.resize
        for size in itertools.product(sides, repeat=2):
            across = Image.fromarray(image).resize((size[1], 224), BICUBIC)
            yield ours(image, *size), across.resize(size[::-1], BICUBIC)
    else:
        signs = (False, True) if name in rand_augment.SIGNED else (False,)
        for level, negative in itertools.product((0.0, 2.5, 5.0, 7.3, 9.0, 10.0, 14.0), signs):
            argument = rand_augment.make_argument(name, level, negative)
            yield (rand_augment.OPERATIONS[name](image, argument, FILL),
                   microsoft.OPERATIONS[name](Image.fromarray(image), argument, FILL))


def test_page_names_every_operation():
    assert set(page_bounds()) >= set(rand_augment.OPERATIONS)


@pytest.mark.parametrize("name", page_bounds())
def test_difference_from_pil_is_within_the_page(name):
    largest, mean = page_bounds()[name]
    apart = [differ(ours, theirs) for ours, theirs in operation_pairs(name)]
    assert max(d.max() for d in apart) <= largest
    assert max(d.mean() for d in apart) <= mean
    if largest > 1:  # the page does not exaggerate
        assert max(d.mean() for d in apart) > mean / 3


def test_erase_fills_the_box_with_gaussian_noise():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    tables = ops.make_noise_tables(mean, std)
    image = smooth_image(200, 200)
    out = ops.erase(image, (20, 30, 180, 190), 12345, tables)
    outside = np.ones((200, 200), bool)
    outside[20:180, 30:190] = False
    assert np.array_equal(out[outside], image[outside])
    noise = (out[20:180, 30:190].reshape(-1, 3) / 255 - mean) / std
    assert np.abs(noise.mean(0)).max() < 0.03
    # Pixels end at 0 and 255, some two deviations from the mean, so a little of 1 is missing.
    assert (noise.std(0) > 0.95).all()
    assert (noise.std(0) < 0.99).all()
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.04


def test_erase_is_a_function_of_its_key():
    tables = ops.make_noise_tables((0.5,) * 3, (0.25,) * 3)
    blank = np.zeros((4, 5, 3), np.uint8)
    out = ops.erase(blank, (1, 1, 3, 4), 7, tables)
    assert np.array_equal(out, ops.erase(blank, (1, 1, 3, 4), 7, tables))
    assert not np.array_equal(out, ops.erase(blank, (1, 1, 3, 4), 8, tables))
    # Frozen: the first bytes of Philox's raw stream under key 7.
    assert out[1, 1].tolist() == [151, 255, 214]


def test_noise_follows_the_quantiles_of_the_gaussian():
    table = ops.make_noise_tables((0.5,) * 3, (0.1,) * 3)[0, :, 0].astype(int)
    assert (np.diff(table) >= 0).all()
    assert table[127] == 127
    assert table[128] == 128
    assert abs(table[40] - 255 * (0.5 - 0.1)) < 1  # 15.9 % lie below one deviation


def test_results_outlive_the_arrays_that_a_thread_works_in():
    image, other = IMAGES["smooth"], 255 - IMAGES["smooth"]
    calls = [functools.partial(color.saturation, factor=1.7),
             functools.partial(color.sharpness, factor=1.7),
             functools.partial(warp.rotate, degrees=20.0, fill=FILL),
             functools.partial(warp.translate_x, fraction=0.3, fill=FILL)]
    results = [call(image) for call in calls]
    before = [result.copy() for result in results]
    for call in calls:  # the same arrays, other pixels; then larger ones
        call(other)
        call(np.tile(other, (2, 2, 1)))
    for result, kept in zip(results, before, strict=True):
        assert np.array_equal(result, kept)


def test_opencv_runs_on_the_calling_thread_alone():
    assert cv2.getNumThreads() == 1


def test_closed_kernels_stay_off_in_every_thread():
    image = IMAGES["noise"]
    calls = [functools.partial(color.sharpness, image, 1.5),
             functools.partial(ops.resize, image, 90, 90)]
    calls += [functools.partial(move, image, 0.2, FILL) for move in
              (warp.rotate, warp.shear_x, warp.shear_y, warp.translate_x, warp.translate_y)]

    def run(call) -> bool:
        cv2.ipp.setUseIPP(True)
        call()
        return cv2.ipp.useIPP()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert not any(pool.map(run, calls))
