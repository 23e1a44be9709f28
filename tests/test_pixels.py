"""augment.pixels: what "fast" and "faster" may change, and by how much."""

import io
import json

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

from tinyvit_jax import config, mix
from tinyvit_jax.data import augment, ops
from tinyvit_jax.models import create_model

SIZE = 64
QUICK = ("fast", "faster")
BARE = {"rand_augment": "", "color_jitter": 0.0, "erase": 0.0, "flip": 0.0}


def make_spec(size=SIZE, **changes) -> augment.Spec:
    settings = config.default().augment
    settings.update(changes)
    return augment.make_spec(settings, size)


def soft_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Structures of every size, the large ones the strongest, as a photograph has them."""
    total = np.zeros((height, width, 3), np.float32)
    generator = np.random.default_rng(seed)
    for sigma in (1, 2, 4, 8, 16, 32):
        noise = generator.normal(size=(height, width, 3)).astype(np.float32)
        total += cv2.GaussianBlur(noise, (0, 0), sigma) * sigma * sigma**0.5
    return cv2.normalize(total, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def encode(image: np.ndarray, *options: int) -> bytes:
    return cv2.imencode(".jpg", image, options)[1].tobytes()


@pytest.mark.parametrize("pixels", QUICK)
def test_it_is_of_imagenet_alone_and_absent_where_it_is_exact(pixels):
    fast = make_spec(pixels=pixels)
    assert fast.pixels == pixels
    assert augment.from_dict(json.loads(json.dumps(augment.to_dict(fast)))) == fast
    assert make_spec(pixels=pixels, spec="small").pixels == "exact"
    assert make_spec(pixels=pixels, spec="none", rand_augment="").pixels == "exact"
    # Stores written before there was a choice have no such field.
    exact = make_spec(pixels="exact")
    assert "pixels" not in augment.to_dict(exact)
    assert augment.from_dict(augment.to_dict(exact)) == exact
    with pytest.raises(augment.SpecError, match=r"augment\.pixels=best is unknown: .*fast, faster"):
        make_spec(pixels="best")


def mean_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other).mean())


@pytest.mark.parametrize(("size", "bound", "worst"), [(224, 2.0, 4.0), (SIZE, 3.0, 9.0)],
                         ids=["bilinear", "decoded at a fraction"])
@pytest.mark.parametrize("pixels", QUICK)
def test_fast_views_are_near_the_exact(pixels, size, bound, worst):
    data = encode(soft_image(400, 500))
    exact, fast = (make_spec(size, pixels=name, **BARE) for name in ("exact", pixels))
    apart = [mean_difference(augment.replay(data, "x", seed, exact),
                             augment.replay(data, "x", seed, fast)) for seed in range(60)]
    assert 0 < np.mean(apart) < bound
    assert max(apart) < worst


def test_fast_geometry_is_near_the_exact():
    image = soft_image(224, 224)
    for name, argument in (("Rotate", 20.0), ("ShearX", 0.2), ("ShearY", -0.2)):
        one, other = (table[name](image, argument, (124, 116, 104))
                      for table in (augment.rand_augment.OPERATIONS, augment.rand_augment.FAST))
        assert 0 < mean_difference(one, other) < 1.5
    assert augment.rand_augment.FAST["Invert"] is augment.rand_augment.OPERATIONS["Invert"]


def test_faster_moves_by_whole_pixels():
    image = soft_image(224, 224)
    tables = augment.rand_augment.BY_PIXELS
    for name in ("TranslateXRel", "TranslateYRel"):
        # 0.3 of the width is 67.2 pixels: "faster" reads from 67.
        whole = tables["exact"][name](image, 67 / 224, (124, 116, 104))
        assert mean_difference(tables["fast"][name](image, 0.3, (124, 116, 104)), whole) > 0
        np.testing.assert_array_equal(tables["faster"][name](image, 0.3, (124, 116, 104)), whole)
    same = set(tables["fast"]) - {"TranslateXRel", "TranslateYRel"}
    assert all(tables["faster"][name] is tables["fast"][name] for name in same)


@pytest.mark.parametrize(("options", "bound"), [
    ((), 2.0), ((cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444), 0.0)],
    ids=["shared colours", "a colour for each pixel"])
@pytest.mark.parametrize("pixels", QUICK)
def test_a_plain_file_and_its_decoded_image_give_one_fast_view(pixels, options, bound):
    """But for colours that pixels share, and at a fraction of the size, which is not taken here."""
    spec = make_spec(224, pixels=pixels, **BARE)
    data = encode(soft_image(300, 400), *options)
    apart = [mean_difference(augment.replay(data, "x", seed, spec),
                             augment.apply_view(ops.decode(data, "x"),
                                                augment.sample_view(seed, spec), spec))
             for seed in range(20)]
    assert max(apart) <= bound
    assert any(apart) == (bound > 0)


@pytest.mark.parametrize("changes", [
    {"pixels": "faster"}, {"pixels": "fast"}, {"pixels": "exact"}, {"spec": "small"},
    {"spec": "microsoft"}, {"spec": "none", "rand_augment": ""}],
    ids=lambda changes: "-".join(changes.values()))
def test_a_batch_is_its_views_one_by_one(changes):
    """Of files of every kind and size, all views kept until the last is there."""
    spec = make_spec(**changes)
    large, small = soft_image(500, 700), soft_image(90, 120, 1)
    files = [encode(large), encode(small), ops.encode_png(small), ops.encode_jpeg(large, 1),
             encode(small, cv2.IMWRITE_JPEG_PROGRESSIVE, 1), ops.encode_jpeg(small)] * 3
    images = [(data, f"{i}") for i, data in enumerate(files)]
    seeds = [7 * i for i in range(len(images))]
    views = list(augment.replay_batch(images, seeds, spec))
    assert len(views) == len(images)
    for image, seed, view in zip(images, seeds, views, strict=True):
        np.testing.assert_array_equal(view, augment.replay(*image, seed, spec))
    broken = [*images[:4], (files[0][:-9], "cat/7.jpg"), *images[4:]]
    with pytest.raises(ops.ImageError, match=r"Image cat/7\.jpg cannot be decoded"):
        list(augment.replay_batch(broken, [*seeds, 1], spec))


def test_a_window_that_cannot_be_cut_is_the_same_view(monkeypatch):
    spec = make_spec(pixels="exact")
    data = encode(soft_image(120, 160))
    expected = [augment.replay(data, "x", seed, spec) for seed in range(8)]
    monkeypatch.setattr(ops.jpeg, "decode_window", lambda *_: None)  # as for a damaged file
    for seed, view in enumerate(expected):
        np.testing.assert_array_equal(augment.replay(data, "x", seed, spec), view)


def resize_in_float64(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear between the centres of pixels, the edge's beyond it; not rounded."""
    out = image.astype(float)
    for axis, size in ((0, height), (1, width)):
        old = out.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.minimum(at.astype(int), max(old - 2, 0))
        part = np.expand_dims(at - low, (1, 2) if axis == 0 else (0, 2))
        out = (1 - part) * out.take(low, axis) + part * out.take(low + 1, axis)
    return out


# Half a level of rounding; on each axis what weights of 8 or 11 bits are off, 255 / 2**(bits + 1);
# and of the second kernel, two quarters of a level that are cut off before its rows are summed.
@pytest.mark.parametrize(("pixels", "least", "bound"), [
    ("fast", 2, 0.5 + 255 / 2**8), ("faster", 3, 0.5 + 255 / 2**11 + 0.5)])
@pytest.mark.parametrize("channels", [3, 4])
def test_bilinear_is_that_of_float64_and_has_an_end(pixels, least, bound, channels):
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (120, 120, channels), np.uint8)
    for height, width in ((224, 150), (120, 90), (90, 121), (120 // least, 70), (60, 60)):
        error = ops.resize(noise, height, width, pixels) - resize_in_float64(noise, height, width)
        assert np.abs(error).max() <= bound, (height, width)
    beyond = 120 // least - 1
    for height, width in ((beyond, 100), (100, beyond), (beyond, beyond)):
        np.testing.assert_array_equal(ops.resize(noise, height, width, pixels),
                                      ops.resize(noise, height, width))


def test_logits_move_as_little_as_between_two_libraries():
    """Fast against exact, beside PIL's bicubic resize of the same crops against exact."""
    specs = {pixels: make_spec(SIZE, pixels=pixels, **BARE) for pixels in ("exact", *QUICK)}
    views: dict[str, list] = {name: [] for name in (*specs, "pil")}
    for seed in range(24):
        image = soft_image(120, 160, seed)
        data = encode(image)
        for name, spec in specs.items():
            views[name].append(augment.replay(data, "x", seed, spec))
        whole = Image.open(io.BytesIO(data)).convert("RGB")
        view = augment.sample_view(seed, specs["exact"])
        y0, x0, y1, x1 = augment.crop_box(view, specs["exact"], 120, 160)
        views["pil"].append(np.asarray(whole.resize((SIZE, SIZE), Image.Resampling.BICUBIC,
                                                    box=(x0, y0, x1, y1))))
    model = create_model("tiny_vit", num_classes=10, image_size=SIZE, depths=(1, 1, 1, 1),
                         embed_dims=(16, 32, 48, 64), num_heads=(1, 1, 2, 2),
                         window_sizes=(4, 4, 4, 2))
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32))
    apply = jax.jit(model.apply)
    logits = {name: np.asarray(apply(variables, mix.normalize(
        np.stack(pixels), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))))
        for name, pixels in views.items()}
    spread = logits["exact"].std(0).mean()
    moved = {name: np.abs(logits[name] - logits["exact"]).mean() / spread
             for name in (*QUICK, "pil")}
    for name in QUICK:
        assert 0 < moved[name] < 0.1
        assert moved[name] < 4 * moved["pil"]
