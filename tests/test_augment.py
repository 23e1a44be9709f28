"""Views and mixing: frozen draws and pixels, the rules of the recipe, and their statistics."""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import platform

import cv2
import numpy as np
import pytest

from tinyvit_jax import config
from tinyvit_jax.data import augment, images, ops

SEEDS = range(4000)


def make_spec(size: int = 224, **changes) -> augment.Spec:
    settings = config.default().augment
    settings.update(changes)
    return augment.make_spec(settings, size)


def wave_image(height: int, width: int) -> np.ndarray:
    """A picture from integer arithmetic alone, the same everywhere."""
    y, x = np.mgrid[:height, :width]
    planes = [(x * x // 37 + y * 3) % 256, (y * y // 23 + x * 2) % 256, (x * y // 19) % 256]
    return np.stack(planes, -1).astype(np.uint8)


SPECS = {
    "imagenet": make_spec(),
    "imagenet 64": make_spec(64),
    "jitter": make_spec(64, rand_augment="", erase=0.5),
    "small": make_spec(28, spec="small", pad=2),
    "small jitter": make_spec(32, spec="small", rand_augment=""),
}


def make_pixels(name: str) -> np.ndarray:
    """Eight views after one another: of a generated image, or of embedded ones for "small"."""
    spec = SPECS[name]
    if spec.spec == "small":
        source = images.open_source("embedded", "train")
        pictures = [ops.decode(e.image, e.key) for e in source.read(range(8))]
    else:
        pictures = [wave_image(375, 500)] * 8
    return np.stack([augment.apply_view(picture, augment.sample_view(seed, spec), spec)
                     for seed, picture in enumerate(pictures)])


def hash_pixels(name: str) -> str:
    return hashlib.sha256(make_pixels(name).tobytes()).hexdigest()[:16]


# Pixels: mean of each channel, and the hash where they were recorded. Without AVX2, rotation and
# shear round a few of 150,000 values to the next level.
CPU_AVX2 = 11  # OpenCV's number of it, which its Python module does not name
RECORDED_WITH = ("5.0.0", "x86_64", True)
PIXELS = {
    "imagenet": ((125.21, 124.39, 122.52), "743ca896e997fb99"),
    "imagenet 64": ((126.8, 126.07, 124.17), "9054b294a91c58c9"),
    "jitter": ((122.76, 122.75, 122.17), "9340892580694af4"),
    "small": ((92.49, 91.25, 89.49), "e72c8c30be63aeb8"),
    "small jitter": ((79.01, 78.64, 78.22), "28da1447e4e62a3c"),
}
# The numbers of a view: the hash of the views of seeds 0 to 999 as JSON.
VIEWS = {
    "imagenet": "7fef2816f36966a1",
    "imagenet 64": "3416f8fcd09b9937",
    "jitter": "09d241dc0575cae8",
    "small": "7e2dba3063a79ddc",
    "small jitter": "98904cdb97577fc8",
}
MIXES = "30a35f5501197bf4"


@pytest.mark.parametrize("name", SPECS)
def test_views_are_frozen(name):
    views = [augment.sample_view(seed, SPECS[name]) for seed in range(1000)]
    digest = hashlib.sha256(json.dumps(views).encode()).hexdigest()[:16]
    assert digest == VIEWS[name]


def test_mixes_are_frozen():
    spec = make_spec(mixup=0.8, cutmix=1.0)
    mixes = [augment.sample_mix(seed, seed + 1000, spec) for seed in range(1000)]
    assert hashlib.sha256(json.dumps(mixes).encode()).hexdigest()[:16] == MIXES


@pytest.mark.parametrize("name", SPECS)
def test_pixels_are_near_the_recorded_ones(name):
    means = make_pixels(name).mean((0, 1, 2))
    assert means == pytest.approx(PIXELS[name][0], abs=0.25)


@pytest.mark.parametrize("name", SPECS)
def test_pixels_are_frozen(name):
    here = (cv2.__version__, platform.machine(), cv2.checkHardwareSupport(CPU_AVX2))
    if here != RECORDED_WITH:
        pytest.skip(f"recorded with OpenCV, machine, AVX2 = {RECORDED_WITH}; this is {here}")
    assert hash_pixels(name) == PIXELS[name][1]


def test_pixels_do_not_depend_on_threads_processes_or_order():
    names = list(SPECS)
    here = {name: hash_pixels(name) for name in names}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert dict(zip(names, pool.map(hash_pixels, names), strict=True)) == here
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        assert list(pool.map(hash_pixels, names[::-1])) == [here[name] for name in names[::-1]]


def test_view_is_plain_numbers():
    view = augment.sample_view(5, SPECS["imagenet"])
    as_lists = json.loads(json.dumps(view))
    assert as_lists[0] == [list(pair) for pair in view.crop]
    assert type(view.top) is float
    assert type(view.flip) is bool


def test_apply_view_keeps_its_input():
    image = wave_image(50, 40)
    before = image.copy()
    for name, spec in SPECS.items():
        for seed in range(10):
            out = augment.apply_view(image, augment.sample_view(seed, spec), spec)
            assert out.shape == (spec.image_size, spec.image_size, 3), name
            assert out.dtype == np.uint8
            assert out.flags.c_contiguous
    assert np.array_equal(image, before)


def test_no_draw_shifts_another():
    """Switching one thing off leaves the draws of all the others as they were."""
    whole = make_spec(erase=1.0)
    for field, off in {"rand_augment": "", "erase": 0.0, "flip": 0.0}.items():
        other = make_spec(**{"erase": 1.0, "color_jitter": 0.0, field: off})
        for seed in range(50):
            a = augment.sample_view(seed, whole)._asdict()
            b = augment.sample_view(seed, other)._asdict()
            changed = {"rand_augment": {"ops"}, "erase": {"erase", "noise"}, "flip": {"flip"}}
            for key in set(a) - changed[field]:
                assert a[key] == b[key], (field, key)


def test_crops_follow_their_distribution():
    spec = make_spec()
    attempts = np.array([augment.sample_view(seed, spec).crop for seed in SEEDS[:1000]])
    area, ratio = attempts.reshape(-1, 2).T
    assert 0.08 <= area.min() < 0.081
    assert 0.999 < area.max() <= 1
    assert abs(area.mean() - 0.54) < 0.01
    assert ratio.min() >= 0.75
    assert ratio.max() <= 4 / 3
    assert abs(np.log(ratio).mean()) < 0.007
    assert abs(np.log(ratio).std() - np.log(16 / 9) / np.sqrt(12)) < 0.003


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (28, 28), (1, 1), (2, 900)])
def test_crop_boxes_lie_in_the_image(height, width):
    spec = make_spec()
    for seed in SEEDS[:500]:
        y0, x0, y1, x1 = augment.crop_box(augment.sample_view(seed, spec), spec, height, width)
        assert 0 <= y0 < y1 <= height
        assert 0 <= x0 < x1 <= width


def test_crop_boxes_take_the_first_attempt_that_fits():
    spec = make_spec()
    view = augment.sample_view(0, spec)._replace(
        crop=((1.0, 1.0), (0.25, 1.0), (0.1, 1.0)), top=0.0, left=0.999999)
    # 100 x 200: a square of the whole area has side 141, of a quarter 71.
    assert augment.crop_box(view, spec, 100, 200) == (0, 129, 71, 200)


@pytest.mark.parametrize(("height", "width", "box"), [
    (100, 300, (0, 83, 100, 216)),  # 4 : 3, the widest allowed, from the middle
    (300, 100, (83, 0, 216, 100)),
    (90, 100, (0, 0, 90, 100)),
])
def test_crop_boxes_fall_back_to_the_centre(height, width, box):
    spec = make_spec()
    view = augment.sample_view(0, spec)._replace(crop=((2.0, 1.0),) * 10)
    assert augment.crop_box(view, spec, height, width) == box


def test_flips_are_as_frequent_as_asked():
    spec = make_spec(flip=0.3)
    flips = [augment.sample_view(seed, spec).flip for seed in SEEDS]
    assert abs(np.mean(flips) - 0.3) < 0.03


def test_rand_augment_follows_its_distribution():
    spec = make_spec()
    views = [augment.sample_view(seed, spec).ops for seed in SEEDS]
    counts = np.bincount([len(v) for v in views], minlength=3) / len(SEEDS)
    assert np.abs(counts - [0.25, 0.5, 0.25]).max() < 0.03
    chosen = [op for view in views for op in view]
    for name in ops.RAND_AUGMENT:
        share = np.mean([n == name for n, _ in chosen])
        assert abs(share - 1 / 15) < 0.016, name
    # Drawn with replacement: a fifteenth of the double ones repeat.
    repeats = np.mean([v[0][0] == v[1][0] for v in views if len(v) == 2])
    assert 0.03 < repeats < 0.11


def test_magnitudes_follow_their_distribution():
    spec = make_spec()
    turned = np.array([argument for seed in range(12_000)
                       for name, argument in augment.sample_view(seed, spec).ops
                       if name in ("Rotate", "ShearX", "ShearY")
                       for argument in [argument / (3 if name == "Rotate" else 0.03)]])
    levels = np.abs(turned)
    assert levels.max() == 10
    assert abs(levels.mean() - 9) < 0.05
    assert abs(levels.std() - 0.49) < 0.04  # half a level, less what is cut off at 10
    assert abs((turned > 0).mean() - 0.5) < 0.05
    assert abs((levels == 10).mean() - 0.0228) < 0.01


@pytest.mark.parametrize(("text", "expected"), [
    ("rand-m9-mstd0.5-inc1", (9, 0.5, 2)), ("rand-m7-n3-inc1", (7, 0, 3)), ("", (0, 0, 0)),
    ("rand-inc1-m10", (10, 0, 2))])
def test_rand_augment_strings_are_read(text, expected):
    assert augment._parse_rand_augment(text) == expected


@pytest.mark.parametrize("text", [
    "rand-m9-mstd0.5", "rand-m9-inc0", "rand-m9-inc1-p0.3", "rand-m9-inc1-w0", "augmix-m3-inc1",
    "rand-m11-inc1", "rand-m9-n0-inc1", "rand-m9.5-inc1", "rand-m9-inc1-", "3a"])
def test_rand_augment_strings_outside_the_family_are_refused(text):
    with pytest.raises(augment.SpecError, match=r"augment\.rand_augment.*rand-m9-mstd0\.5-inc1"):
        make_spec(rand_augment=text)


def test_jitter_runs_only_without_rand_augment():
    assert SPECS["imagenet"].color_jitter == 0
    views = [augment.sample_view(seed, SPECS["jitter"]).ops for seed in SEEDS]
    names = {tuple(name for name, _ in view) for view in views}
    assert len(names) == 6
    factors = np.array([[dict(view)[name] for name in sorted(dict(view))] for view in views])
    assert factors.shape == (len(SEEDS), 3)
    assert (factors.min(0) < 0.605).all()
    assert (factors.max(0) > 1.395).all()
    assert factors.min() >= 0.6
    assert factors.max() <= 1.4
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.08


def test_erased_boxes_follow_their_distribution():
    spec = make_spec()
    boxes = np.array([augment.sample_view(seed, spec).erase for seed in SEEDS])
    drawn = boxes[(boxes != 0).any(1)]
    assert abs(len(drawn) / len(boxes) - 0.25) < 0.03
    height, width = drawn[:, 2] - drawn[:, 0], drawn[:, 3] - drawn[:, 1]
    area, ratio = height * width / 224**2, height / width
    assert area.min() > 0.019
    assert area.max() < 0.335
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.015
    assert 0.28 < ratio.min() < 0.36
    assert 2.8 < ratio.max() < 3.5
    assert abs(np.log(ratio).mean()) < 0.1
    assert drawn[:, :2].min() >= 0
    assert drawn[:, 2:].max() <= 224
    assert drawn[:, 2:].max() > 215


def test_noise_differs_from_view_to_view():
    spec = make_spec(erase=1.0)
    assert len({augment.sample_view(seed, spec).noise for seed in range(100)}) == 100


def test_small_pads_and_crops_without_resizing():
    spec = make_spec(28, spec="small", pad=2, flip=0.0, rand_augment="", color_jitter=0.0, erase=0)
    image = wave_image(28, 28) // 2 + 1
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y:y + 28, x:x + 28].tobytes() for y in range(5) for x in range(5)}
    seen = {augment.apply_view(image, augment.sample_view(seed, spec), spec).tobytes()
            for seed in range(400)}
    assert seen == windows


def test_small_resizes_other_sizes():
    spec = make_spec(28, spec="small", pad=0, flip=0.0, rand_augment="", color_jitter=0.0, erase=0)
    out = augment.apply_view(wave_image(40, 60), augment.sample_view(0, spec), spec)
    assert np.array_equal(out, ops.resize(wave_image(40, 60), 28, 28))


def test_none_is_the_evaluation_view():
    spec = make_spec(64, spec="none")
    image = wave_image(100, 150)
    out = augment.apply_view(image, augment.sample_view(3, spec), spec)
    assert np.array_equal(out, augment.eval_view(image, 64, "center", 224 / 256))


def test_spec_survives_json():
    for spec in SPECS.values():
        assert augment.from_dict(json.loads(json.dumps(augment.to_dict(spec)))) == spec


def test_spec_forgets_settings_without_effect():
    assert make_spec(color_jitter=0.1, pad=9) == make_spec()
    assert make_spec(spec="small", scale=(0.5, 1)) == make_spec(spec="small")
    assert make_spec(mix_prob=0.3, mix_switch=0.1) == make_spec()
    assert make_spec(mixup=0.8, mix_switch=0.1) == make_spec(mixup=0.8)
    assert make_spec(mixup=0.8, mix_prob=0.0) == make_spec()
    assert make_spec(spec="none", rand_augment="?", flip=0.1) == make_spec(spec="none")


@pytest.mark.parametrize("change", [
    {"flip": 0.4}, {"erase": 0.1}, {"rand_augment": ""}, {"scale": (0.1, 1)}, {"ratio": (1, 1)},
    {"mixup": 0.1}, {"cutmix": 0.1}, {"spec": "small"}])
def test_spec_remembers_settings_with_effect(change):
    assert make_spec(**change) != make_spec()


def test_spec_from_another_version_is_refused():
    fields = augment.to_dict(make_spec()) | {"version": 99, "new": 1}
    with pytest.raises(augment.SpecError, match=r"version 99.*replays version 1"):
        augment.from_dict(fields)


def test_spec_with_wrong_fields_is_refused():
    fields = augment.to_dict(make_spec())
    del fields["flip"]
    with pytest.raises(augment.SpecError, match=r"missing \['flip'\], unknown \['zoom'\]"):
        augment.from_dict(fields | {"zoom": 1})


def test_unknown_names_are_refused():
    with pytest.raises(augment.SpecError, match=r"augment\.spec=cifar"):
        make_spec(spec="cifar")
    with pytest.raises(augment.SpecError, match=r"eval\.crop=corner"):
        augment.eval_view(wave_image(30, 30), 20, "corner", 1.0)


def mixes(**changes) -> list[tuple[float, augment.Box]]:
    spec = make_spec(**changes)
    return [augment.sample_mix(seed, 2**31 + seed * 7, spec) for seed in SEEDS]


def test_mix_is_off_by_default():
    assert set(mixes()) == {(1.0, augment.NO_BOX)}
    assert set(mixes(mixup=0.8, mix_prob=0.0)) == {(1.0, augment.NO_BOX)}


def test_mix_does_not_depend_on_the_order_of_the_pair():
    spec = make_spec(mixup=0.8, cutmix=1.0)
    for seed in range(100):
        assert augment.sample_mix(seed, 999, spec) == augment.sample_mix(999, seed, spec)


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.8, 1.0, 3.0])
def test_mixup_follows_the_beta_distribution(alpha):
    drawn = mixes(mixup=alpha)
    lam = np.array([lam for lam, _ in drawn])
    assert {box for _, box in drawn} == {augment.NO_BOX}
    assert lam.min() >= 0
    assert lam.max() <= 1
    assert abs(lam.mean() - 0.5) < 0.03
    assert abs(lam.var() - 1 / (4 * (2 * alpha + 1))) < 0.012
    # Fourth central moment of Beta(alpha, alpha).
    fourth = 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
    assert abs(((lam - 0.5) ** 4).mean() - fourth) < 0.003


def test_cutmix_boxes_and_their_weights():
    drawn = mixes(cutmix=1.0)
    boxes = np.array([box for _, box in drawn])
    lam = np.array([lam for lam, _ in drawn])
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes.max() <= 224
    assert np.array_equal(lam, 1 - height * width / 224**2)
    # Before clipping the box is a square, so only a clipped one has other proportions.
    inside = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < 224).all(1)
    assert np.array_equal(height[inside], width[inside])
    # Unclipped lam is uniform, and clipping leaves 11/18 of it on average inside: E[lam] = 0.62.
    assert 0.55 < lam.mean() < 0.72


def test_mix_probability_and_switch():
    drawn = mixes(mixup=0.8, cutmix=1.0, mix_prob=0.6, mix_switch=0.25)
    mixed = [(lam, box) for lam, box in drawn if lam < 1]
    assert abs(len(mixed) / len(drawn) - 0.6) < 0.03
    assert abs(np.mean([box != augment.NO_BOX for _, box in mixed]) - 0.25) < 0.03


def pil_view(image: np.ndarray, size: int, ratio: float) -> np.ndarray:
    """torchvision's Resize(floor(size / ratio)) and CenterCrop(size), written over PIL."""
    pil_image = pytest.importorskip("PIL.Image")
    pil = pil_image.fromarray(image)
    short, (w, h) = int(size / ratio), pil.size
    new = (int(short * w / h), short) if h <= w else (short, int(short * h / w))
    left, top = round((new[0] - size) / 2.0), round((new[1] - size) / 2.0)
    resized = pil.resize(new, pil_image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (100, 100), (47, 301), (30, 20)])
@pytest.mark.parametrize(("size", "ratio"), [(64, 224 / 256), (48, 0.95), (63, 1.0)])
def test_eval_view_is_within_one_level_of_torchvision(shape, size, ratio):
    image = wave_image(*shape)
    ours = augment.eval_view(image, size, "center", ratio).astype(int)
    assert np.abs(ours - pil_view(image, size, ratio)).max() <= 1


def test_eval_view_square_shows_the_whole_image():
    image = wave_image(60, 90)
    assert np.array_equal(augment.eval_view(image, 32, "square", 0.5),
                          ops.resize_bicubic(image, 32, 32))


@pytest.mark.parametrize("crop", ["center", "square"])
def test_eval_view_leaves_an_image_of_its_size_alone(crop):
    image = wave_image(28, 28)
    assert np.array_equal(augment.eval_view(image, 28, crop, 0.875), image)


def test_fields_of_the_spec_are_those_of_the_config():
    fields = {field.name for field in dataclasses.fields(augment.Spec)}
    assert fields - {"version", "image_size", "mean", "std"} == set(config.default().augment)
