"""Views and mixing: frozen draws and pixels, the rules of the recipe, and their statistics."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import platform
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from scipy import stats

from tinyvit_jax import config
from tinyvit_jax.data import augment, images, microsoft, ops

SEEDS = range(4000)
CONFIDENCE = 0.001  # smallest probability of a statistic as far off as the one found; seeds are
# fixed, so a test at it passes always or never
BOTH = pytest.mark.parametrize("spec", ["imagenet", "microsoft"])


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
    "imagenet": make_spec(pixels="exact"),
    "imagenet 64": make_spec(64, pixels="exact"),
    "jitter": make_spec(64, rand_augment="", erase=0.5, pixels="exact"),
    "fast": make_spec(pixels="fast"),
    "faster": make_spec(pixels="faster"),
    "small": make_spec(28, spec="small", pad=2),
    "small jitter": make_spec(32, spec="small", rand_augment=""),
    "grey": make_spec(64, rand_augment="", greyscale=0.5, pixels="exact"),
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
    "fast": ((126.39, 125.05, 123.63), "6f302d2beb338224"),
    "faster": ((126.35, 125.0, 123.59), "e26d8f11d12ebfc8"),
    "small": ((92.49, 91.25, 89.49), "e72c8c30be63aeb8"),
    "small jitter": ((79.01, 78.64, 78.22), "28da1447e4e62a3c"),
    "grey": ((122.96, 122.6, 122.39), "fddf023d9eaa8fc7"),
}
# The numbers of a view: the hash of the views of seeds 0 to 999 as JSON.
VIEWS = {
    "imagenet": "7fef2816f36966a1",
    "imagenet 64": "3416f8fcd09b9937",
    "jitter": "09d241dc0575cae8",
    "fast": "7fef2816f36966a1",
    "faster": "7fef2816f36966a1",
    "small": "7e2dba3063a79ddc",
    "small jitter": "98904cdb97577fc8",
    "grey": "0f17ff0180e0955c",
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


class Drawn(NamedTuple):
    """What statistics need of a view, whichever spec drew it."""

    crop: augment.Box
    flip: bool
    erase: augment.Box


@functools.lru_cache(maxsize=16)
def draw(spec: augment.Spec, height: int, width: int, seeds: int = 4000) -> list[Drawn]:
    drawn = []
    for seed in range(seeds):
        if spec.spec == "microsoft":
            view = microsoft.sample_view(seed, height, width, spec)
            drawn.append(Drawn(view.crop, view.flip, view.erase))
        else:
            view = augment.sample_view(seed, spec)
            crop = augment.crop_box(view, spec, height, width)
            drawn.append(Drawn(crop, view.flip, view.erase))
    return drawn


class Rectangles:
    """Closed form of what the first attempt that fits leaves of a uniform area and log ratio.

    Args:
        low: smallest area drawn, as a fraction of the frame.
        high: largest.
        log_ratio: of height by width, drawn from +- this.
        cap: fn(log ratio) -> largest area that fits in the frame.
    """

    def __init__(self, low, high, log_ratio, cap):
        self.low, self.t = low, np.linspace(-log_ratio, log_ratio, 4001)
        self.most = np.minimum(high, cap(self.t))

    def area_cdf(self, area):
        grid = np.linspace(self.low, self.most.max(), 1001)
        below = [np.clip(np.minimum(a, self.most) - self.low, 0, None).sum() for a in grid]
        return np.interp(area, grid, np.array(below) / below[-1])

    def log_ratio_cdf(self, log_ratio):
        weight = np.cumsum(self.most - self.low)
        return np.interp(log_ratio, self.t, weight / weight[-1])


def check_rectangles(boxes: np.ndarray, frame: tuple[int, int], law: Rectangles) -> None:
    """Area, ratio and place of drawn boxes [n, 4] against their laws."""
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, log_ratio = height * width / (frame[0] * frame[1]), np.log(height / width)
    assert stats.kstest(area, law.area_cdf).pvalue > CONFIDENCE
    assert stats.kstest(log_ratio, law.log_ratio_cdf).pvalue > CONFIDENCE
    for start, side, whole in ((boxes[:, 0], height, frame[0]), (boxes[:, 1], width, frame[1])):
        free = whole - side
        roomy = free >= 20  # fewer places than that are too few for a continuous law
        place = (start[roomy] + 0.5) / (free[roomy] + 1)
        assert stats.kstest(place, stats.uniform.cdf).pvalue > CONFIDENCE


@BOTH
@pytest.mark.parametrize(("height", "width"), [(3000, 4000), (4000, 2600)])
def test_crops_follow_the_law_of_the_first_attempt_that_fits(spec, height, width):
    boxes = np.array([drawn.crop for drawn in draw(make_spec(spec=spec), height, width)])
    shape = np.log(height / width)
    law = Rectangles(0.08, 1.0, np.log(4 / 3),
                     lambda t: np.exp(np.minimum(t - shape, shape - t)))
    check_rectangles(boxes, (height, width), law)


@BOTH
def test_flips_are_as_frequent_as_asked(spec):
    flips = [drawn.flip for drawn in draw(make_spec(spec=spec, flip=0.3), 100, 100)]
    assert stats.binomtest(sum(flips), len(flips), 0.3).pvalue > CONFIDENCE
    flips = [drawn.flip for drawn in draw(make_spec(spec=spec), 3000, 4000)]
    assert stats.binomtest(sum(flips), len(flips), 0.5).pvalue > CONFIDENCE


@BOTH
def test_erased_rectangles_are_as_frequent_as_asked(spec):
    erased = [drawn.erase != augment.NO_BOX for drawn in draw(make_spec(spec=spec), 3000, 4000)]
    assert stats.binomtest(sum(erased), len(erased), 0.25).pvalue > CONFIDENCE


@BOTH
def test_erased_rectangles_follow_the_law_of_the_first_attempt_that_fits(spec):
    drawn = draw(make_spec(spec=spec, erase=1.0, rand_augment="rand-n1"), 300, 300)
    boxes = np.array([d.erase for d in drawn if d.erase != augment.NO_BOX])
    # A side rounds to less than the frame's 224.
    law = Rectangles(0.02, 1 / 3, np.log(1 / 0.3), lambda t: (223.5 / 224) ** 2 * np.exp(-abs(t)))
    check_rectangles(boxes, (224, 224), law)
    assert len(boxes) == len(drawn)


@BOTH
def test_parts_of_a_view_are_independent(spec):
    drawn = draw(make_spec(spec=spec), 3000, 4000)
    crop = np.array([d.crop for d in drawn])
    parts = [crop[:, 2] - crop[:, 0], crop[:, 0], [d.flip for d in drawn],
             [d.erase != augment.NO_BOX for d in drawn]]
    for one, other in itertools.combinations(parts[1:], 2):
        assert stats.spearmanr(one, other).pvalue > CONFIDENCE
    assert stats.spearmanr(parts[0], parts[2]).pvalue > CONFIDENCE


def mixes(name: str, size: int = 224, **changes) -> list[tuple[float, augment.Box]]:
    spec = make_spec(size, spec=name, **changes)
    return [augment.sample_mix(seed, 2**30, spec) for seed in SEEDS]


@BOTH
@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_mixup_follows_the_beta_distribution(spec, alpha):
    drawn = mixes(spec, mixup=alpha)
    assert {box for _, box in drawn} == {augment.NO_BOX}
    lam = [lam for lam, _ in drawn]
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > CONFIDENCE


@BOTH
def test_cutmix_boxes_follow_their_law(spec):
    size = 8192  # so large that rounding to pixels does not show
    drawn = mixes(spec, size, cutmix=1.0)
    lam = np.array([lam for lam, _ in drawn])
    y0, x0, y1, x1 = np.array([box for _, box in drawn]).T
    # A box of side c, c squared uniform, keeps c - c^2 / 4 of each side on average once its edges
    # are clipped, and is clipped at a given edge with probability c / 2.
    expected = 1 - (1 / 2 - 1 / 5 + 1 / 48)
    assert abs(lam.mean() - expected) < 3.3 * lam.std() / np.sqrt(len(lam))
    for clipped in (y0 == 0, x0 == 0, y1 == size, x1 == size):
        assert stats.binomtest(clipped.sum(), len(lam), 1 / 3).pvalue > CONFIDENCE
    # Where no edge is clipped the side is c, and (1 - c)^2 of the boxes of side c are such.
    inside = (y0 > 0) & (x0 > 0) & (y1 < size) & (x1 < size)
    side = (y1 - y0)[inside] / size
    law = lambda c: 6 * c**2 - 8 * c**3 + 3 * c**4  # noqa: E731
    assert stats.kstest(side, law).pvalue > CONFIDENCE
    assert stats.binomtest(inside.sum(), len(lam), 1 / 6).pvalue > CONFIDENCE


@BOTH
def test_mix_probability_and_switch(spec):
    drawn = mixes(spec, mixup=0.8, cutmix=1.0, mix_prob=0.6, mix_switch=0.25)
    mixed = [box != augment.NO_BOX for lam, box in drawn if lam < 1]
    assert stats.binomtest(len(mixed), len(drawn), 0.6).pvalue > CONFIDENCE
    assert stats.binomtest(sum(mixed), len(mixed), 0.25).pvalue > CONFIDENCE


@BOTH
def test_mix_is_off_by_default(spec):
    assert set(mixes(spec)) == {(1.0, augment.NO_BOX)}
    assert set(mixes(spec, mixup=0.8, mix_prob=0.0)) == {(1.0, augment.NO_BOX)}


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


def test_greyscale_changes_no_other_draw():
    for changes in ({"rand_augment": ""}, {}, {"spec": "small", "rand_augment": ""}):
        plain, grey = make_spec(64, **changes), make_spec(64, **changes, greyscale=0.3)
        turned = flipped_too = 0
        for seed in range(1000):
            a, b = (augment.sample_view(seed, spec) for spec in (plain, grey))
            turned += a.ops != b.ops
            assert b._replace(ops=a.ops) == a
            assert b.ops in (a.ops, (*a.ops, ("ColorIncreasing", 0.0)))
            flipped_too += b.flip and a.ops != b.ops
        assert stats.binomtest(flipped_too, 1000, 0.15).pvalue > CONFIDENCE
        assert stats.binomtest(turned, 1000, 0.3).pvalue > CONFIDENCE


def test_a_grey_view_is_pils_grey():
    """Crop, flip, jitter, then grey: torchvision's order and PIL's pixels."""
    pil_image = pytest.importorskip("PIL.Image")
    for changes in ({"pad": 12}, {"pad": 12, "color_jitter": 0.2}):
        settings = {"spec": "small", "rand_augment": "", "erase": 0.0, "color_jitter": 0.0}
        plain, grey = (make_spec(96, **{**settings, **changes, "greyscale": p}) for p in (0.0, 1.0))
        for seed in range(5):
            colour, found = (augment.apply_view(
                wave_image(96, 96), augment.sample_view(seed, spec), spec)
                for spec in (plain, grey))
            expected = np.asarray(pil_image.fromarray(colour).convert("L"))
            assert np.array_equal(found, expected[..., None].repeat(3, 2))


def test_jitter_is_pils_in_the_drawn_order():
    enhance = pytest.importorskip("PIL.ImageEnhance")
    pil_image = pytest.importorskip("PIL.Image")
    steps = {"BrightnessIncreasing": enhance.Brightness, "ContrastIncreasing": enhance.Contrast,
             "ColorIncreasing": enhance.Color}
    spec = make_spec(32, spec="small", pad=4, rand_augment="", erase=0.0, color_jitter=0.4)
    plain = make_spec(32, spec="small", pad=4, rand_augment="", erase=0.0, color_jitter=0.0)
    for seed in range(20):
        view = augment.sample_view(seed, spec)
        expected = pil_image.fromarray(augment.apply_view(
            wave_image(32, 32), augment.sample_view(seed, plain), plain))
        for name, factor in view.ops:
            expected = steps[name](expected).enhance(factor)
        found = augment.apply_view(wave_image(32, 32), view, spec)
        assert np.array_equal(found, np.asarray(expected))


def test_a_spec_of_before_there_was_greyscale():
    fields = augment.to_dict(make_spec(32, spec="small"))
    assert "greyscale" not in fields
    assert augment.from_dict(fields) == make_spec(32, spec="small")
    assert augment.to_dict(make_spec(32, spec="small", greyscale=0.1))["greyscale"] == 0.1
    assert make_spec(spec="none", greyscale=0.1) == make_spec(spec="none")
    with pytest.raises(augment.SpecError, match=r"augment\.greyscale=0\.1 cannot be replayed"):
        make_spec(spec="microsoft", greyscale=0.1)


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
    {"mixup": 0.1}, {"cutmix": 0.1}, {"spec": "small"}, {"greyscale": 0.1}])
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


def test_mix_does_not_depend_on_the_order_of_the_pair():
    spec = make_spec(mixup=0.8, cutmix=1.0)
    for seed in range(100):
        assert augment.sample_mix(seed, 999, spec) == augment.sample_mix(999, seed, spec)


def test_cutmix_boxes_and_their_weights():
    drawn = mixes("imagenet", cutmix=1.0)
    boxes = np.array([box for _, box in drawn])
    lam = np.array([lam for lam, _ in drawn])
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes.max() <= 224
    assert np.array_equal(lam, 1 - height * width / 224**2)
    # Before clipping the box is a square, so only a clipped one has other proportions.
    inside = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < 224).all(1)
    assert np.array_equal(height[inside], width[inside])


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


def encode(image: np.ndarray, *options: int) -> bytes:
    return cv2.imencode(".jpg", image, options)[1].tobytes()


@pytest.mark.parametrize("options", [(), (cv2.IMWRITE_JPEG_RST_INTERVAL, 1),
                                     (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)],
                         ids=["plain", "restarts", "progressive"])
@pytest.mark.parametrize("name", ["imagenet", "imagenet 64", "small"])
def test_replay_gives_the_pixels_of_the_whole_image(name, options):
    data, spec = encode(wave_image(250, 330), *options), SPECS[name]
    whole = ops.decode(data, "x")
    for seed in range(40):
        view = augment.sample_view(seed, spec)
        assert np.array_equal(augment.replay(data, "x", seed, spec),
                              augment.apply_view(whole, view, spec))
