"""RandAugment: the family of strings, levels, and the statistics of what is drawn in both specs.

Distributions are held to closed forms at a confidence of 99.9 %; the seeds are fixed, so a test
passes always or never.
"""

import hashlib
import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from tinyvit_jax import config
from tinyvit_jax.data import augment, microsoft, ops, rand_augment

FILL = (124, 116, 104)
CONFIDENCE = 0.001  # smallest probability of a statistic as far off as the one found
BOTH = pytest.mark.parametrize("spec", ["imagenet", "microsoft"])
WEIGHTS = {"Rotate": 0.3, "ShearX": 0.2, "ShearY": 0.2, "TranslateXRel": 0.1, "TranslateYRel": 0.1,
           "Color": 0.025, "Sharpness": 0.025, "AutoContrast": 0.025, "Solarize": 0.005,
           "SolarizeAdd": 0.005, "Contrast": 0.005, "Brightness": 0.005, "Equalize": 0.005,
           "Posterize": 0.0, "Invert": 0.0}


def make_spec(**changes) -> augment.Spec:
    settings = config.default().augment
    settings.update(changes)
    return augment.make_spec(settings, 224)


def draw(spec_name: str, text: str, views: int) -> list[rand_augment.Applied]:
    """The operations of the views of seeds 0, 1, 2 ..."""
    spec = make_spec(spec=spec_name, rand_augment=text)
    if spec_name == "microsoft":
        return [microsoft.sample_view(seed, 300, 400, spec).ops for seed in range(views)]
    return [augment.sample_view(seed, spec).ops for seed in range(views)]


def find_levels(views: list[rand_augment.Applied]) -> np.ndarray:
    """Magnitudes, with their signs, of the operations whose argument tells them."""
    full = {"Rotate": 30, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45,
            "TranslateYRel": 0.45}
    return np.array([10 * argument / full[name] for view in views for name, argument in view
                     if name in full])


@pytest.mark.parametrize(("text", "magnitude", "std", "limit", "operations", "applied"), [
    ("rand-m9-mstd0.5-inc1", 9, 0.5, 10, 2, 0.5),
    ("rand-inc1-mstd0.5-m9", 9, 0.5, 10, 2, 0.5),
    ("rand-m7-n3-inc1", 7, 0, 10, 3, 0.5),
    ("rand-inc1", 10, 0, 10, 2, 0.5),
    ("rand-m9-inc0", 9, 0, 10, 2, 0.5),
    ("rand-m15-mmax20-mstd1-inc1", 15, 1, 20, 2, 0.5),
    ("rand-m9-mmax0-inc1", 9, 0, 10, 2, 0.5),
    ("rand-m9-mstd101-inc1", 9, math.inf, 10, 2, 0.5),
    ("rand-m9-mstd100-inc1", 9, 100, 10, 2, 0.5),
    ("rand-m9-mstdinf-inc1", 9, math.inf, 10, 2, 0.5),
    ("rand-m9-p0.3-inc1", 9, 0, 10, 2, 0.3),
    ("rand-m9-n1-p1-inc1", 9, 0, 10, 1, 1.0),
])
def test_strings_are_read(text, magnitude, std, limit, operations, applied):
    assert rand_augment.parse(text) == rand_augment.RandAugment(
        magnitude, std, limit, operations, applied, rand_augment.INCREASING, False)


def test_plain_strings_are_read():
    plain = rand_augment.RandAugment(10, 0, 10, 2, 0.5, rand_augment.PLAIN, False)
    assert rand_augment.parse("rand") == plain
    assert rand_augment.parse("rand-w0") == plain._replace(weighted=True)
    assert rand_augment.parse("rand-mstd1-w0") == plain._replace(weighted=True, std=1)
    assert rand_augment.parse("").operations == 0


@pytest.mark.parametrize(("text", "found"), [
    ("augmix-m3", "it begins with augmix"),
    ("3a", "it begins with 3a"),
    ("rand-m9-inc1-", "the section after the last dash is unknown"),
    ("rand-m9-tweights", "the section tweights is unknown"),
    ("rand-m9-inc", "the section inc is unknown"),
    ("rand-m-1", "the section m is unknown"),
    ("rand-m9-mstd.5", "the section mstd.5 is unknown"),
    ("rand-m9.5-inc1", "m9.5 has no number that can be used; expected a whole number"),
    ("rand-m9-mstd1.2.3", "mstd1.2.3 has no number that can be used; expected a number"),
    ("rand-minf", "minf has no number"),
    ("rand-m9-m8", "the section m is there twice"),
    ("rand-w1", "weights w1; expected w0"),
    ("rand-n0", "n0 operations; expected 1 to 100"),
    ("rand-n101", "n101 operations; expected 1 to 100"),
    ("rand-w0-n14", "n14 operations; expected 1 to 13, as many as have a weight"),
])
@BOTH
def test_other_strings_are_refused(spec, text, found):
    with pytest.raises(augment.SpecError) as caught:
        make_spec(spec=spec, rand_augment=text)
    assert f"--config.augment.rand_augment={text} is not understood" in str(caught.value)
    assert found in str(caught.value)


def test_unknown_section_lists_what_exists():
    with pytest.raises(augment.SpecError) as caught:
        make_spec(rand_augment="rand-m9-zoom3")
    for section in ("m (", "mstd (", "mmax (", "n (", "p (", "inc1 (", "w0 ("):
        assert section in str(caught.value)


def test_mstdinf_is_refused_where_the_original_ignored_it():
    with pytest.raises(augment.SpecError, match=r"passes over mstdinf.*mstd101"):
        make_spec(spec="microsoft", rand_augment="rand-m9-mstdinf-inc1")


@pytest.mark.parametrize(("name", "level", "negative", "expected"), [
    ("AutoContrast", 9, False, 0), ("Equalize", 9, True, 0), ("Invert", 9, False, 0),
    ("Rotate", 9, False, 27), ("Rotate", 9, True, -27), ("Rotate", 20, True, -60),
    ("Posterize", 9, False, 3), ("Posterize", 2.4, False, 0), ("Posterize", 20, False, 8),
    ("PosterizeIncreasing", 9, False, 1), ("PosterizeIncreasing", 10, False, 0),
    ("PosterizeIncreasing", 7.4, True, 2), ("PosterizeIncreasing", 15, False, -2),
    ("Solarize", 9, False, 230), ("Solarize", 0, True, 0), ("Solarize", 12, False, 307),
    ("SolarizeIncreasing", 9, False, 26), ("SolarizeIncreasing", 0, False, 256),
    ("SolarizeIncreasing", 12, False, -51),
    ("SolarizeAdd", 9, False, 99), ("SolarizeAdd", 10, False, 110), ("SolarizeAdd", 15, False, 165),
    ("Color", 0, False, 0.1), ("Contrast", 5, True, 1.0), ("Brightness", 10, False, 1.9),
    ("Sharpness", 9, False, 1.72),
    ("ColorIncreasing", 9, False, 1.81), ("ContrastIncreasing", 9, True, 0.19),
    ("BrightnessIncreasing", 10, True, 0.1), ("SharpnessIncreasing", 5, False, 1.45),
    ("BrightnessIncreasing", 15, True, 0.1), ("ColorIncreasing", 20, False, 2.8),
    ("ShearX", 9, True, -0.27), ("ShearY", 9, False, 0.27),
    ("TranslateXRel", 9, False, 0.405), ("TranslateYRel", 9, True, -0.405),
])
def test_arguments_follow_the_level(name, level, negative, expected):
    assert rand_augment.make_argument(name, level, negative) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", rand_augment.OPERATIONS)
def test_every_operation_keeps_shape_and_its_input(name):
    image = np.random.default_rng(0).integers(20, 250, (40, 56, 3), dtype=np.uint8)
    before = image.copy()
    for negative in (False, True):
        argument = rand_augment.make_argument(name, 9.2, negative)
        out = rand_augment.OPERATIONS[name](image, argument, FILL)
        assert out.shape == image.shape
        assert out.dtype == np.uint8
        assert not np.array_equal(out, before)
    assert np.array_equal(image, before)


def test_order_of_the_sets_is_frozen():
    assert rand_augment.PLAIN == (
        "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd",
        "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel",
        "TranslateYRel")
    assert rand_augment.INCREASING == (
        "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing",
        "SolarizeIncreasing", "SolarizeAdd", "ColorIncreasing", "ContrastIncreasing",
        "BrightnessIncreasing", "SharpnessIncreasing", "ShearX", "ShearY", "TranslateXRel",
        "TranslateYRel")
    assert set(rand_augment.OPERATIONS) == set(rand_augment.PLAIN + rand_augment.INCREASING)
    assert set(microsoft.OPERATIONS) == set(rand_augment.OPERATIONS)


def test_weights_are_the_originals():
    weights = rand_augment.parse("rand-w0").weights
    assert dict(zip(rand_augment.PLAIN, weights, strict=True)) == pytest.approx(WEIGHTS, abs=1e-15)
    assert rand_augment.parse("rand").weights is None


# The operations of the views of seeds 0 to 499 of "imagenet" as JSON.
DRAWN = {
    "rand": "1b2d176bcfd3687e",
    "rand-m5-n3-mstd101": "c01e92dff6a77368",
    "rand-m9-n3-w0-p0.7": "7ec6c4a304c0cf89",
    "rand-m15-mmax20-mstd3-inc1": "3e73a937c60fc991",
}


@pytest.mark.parametrize("text", DRAWN)
def test_draws_are_frozen(text):
    digest = hashlib.sha256(json.dumps(draw("imagenet", text, 500)).encode()).hexdigest()
    assert digest[:16] == DRAWN[text]


@BOTH
@pytest.mark.parametrize(("text", "operations", "applied"), [
    ("rand-m9-mstd0.5-inc1", 2, 0.5), ("rand-n4-p0.3", 4, 0.3)])
def test_applied_operations_are_binomial_and_evenly_chosen(spec, text, operations, applied):
    views = draw(spec, text, 4000)
    counts = np.bincount([len(view) for view in views], minlength=operations + 1)
    expected = stats.binom.pmf(range(operations + 1), operations, applied) * len(views)
    assert stats.chisquare(counts, expected).pvalue > CONFIDENCE
    chosen = [name for view in views for name, _ in view]
    assert stats.chisquare([chosen.count(name) for name in
                            rand_augment.parse(text).names]).pvalue > CONFIDENCE
    # With replacement: where two of two are applied, a fifteenth of them are the same.
    pairs = [view[0][0] == view[1][0] for view in views if len(view) == 2]
    assert stats.binomtest(sum(pairs), len(pairs), 1 / 15).pvalue > CONFIDENCE


@BOTH
@pytest.mark.parametrize("names", [rand_augment.PLAIN, rand_augment.INCREASING])
def test_weighted_operations_are_drawn_without_repetition(spec, names):
    text = "rand-w0-p1" if names == rand_augment.PLAIN else "rand-w0-p1-inc1"
    pairs = [tuple(name for name, _ in view) for view in draw(spec, text, 4000)]
    weights = dict(zip(names, (WEIGHTS[name] for name in rand_augment.PLAIN), strict=True))
    expected = {(a, b): weights[a] * weights[b] / (1 - weights[a]) * len(pairs)
                for a, b in itertools.permutations(names, 2)}
    often = [pair for pair, count in expected.items() if count >= 10]
    found = [pairs.count(pair) for pair in often]
    rest = len(pairs) - sum(expected[pair] for pair in often)
    assert all(expected[pair] > 0 for pair in pairs)  # which a repetition is not
    assert stats.chisquare([*found, len(pairs) - sum(found)],
                           [*(expected[pair] for pair in often), rest]).pvalue > CONFIDENCE


@BOTH
@pytest.mark.parametrize(("text", "mean", "std", "limit"), [
    ("rand-m9-mstd0.5-inc1-n6-p1", 9, 0.5, 10), ("rand-m15-mmax20-mstd3-inc1-n6-p1", 15, 3, 20)])
def test_magnitudes_are_normal_and_cut_at_their_limit(spec, text, mean, std, limit):
    levels = np.abs(find_levels(draw(spec, text, 2000)))
    cut = np.isclose(levels, limit)
    normal = stats.norm(mean, std)
    assert levels.max() <= limit + 1e-9
    assert stats.binomtest(cut.sum(), len(cut), normal.sf(limit)).pvalue > CONFIDENCE
    below = stats.kstest(levels[~cut], lambda x: normal.cdf(x) / normal.cdf(limit))
    assert below.pvalue > CONFIDENCE


@BOTH
def test_magnitudes_are_uniform_where_their_spread_is_over_100(spec):
    levels = np.abs(find_levels(draw(spec, "rand-m8-mstd101-n6-p1", 2000)))
    assert stats.kstest(levels, stats.uniform(0, 8).cdf).pvalue > CONFIDENCE


@BOTH
def test_magnitudes_without_spread_are_one_number(spec):
    assert np.abs(find_levels(draw(spec, "rand-m8", 200))) == pytest.approx(8)
    assert np.abs(find_levels(draw(spec, "rand-m14", 200))) == pytest.approx(10)


@BOTH
def test_directions_are_as_frequent(spec):
    views = draw(spec, "rand-m9-inc1-n6-p1", 1000)
    for name in rand_augment.SIGNED:
        middle = 1 if name.endswith("Increasing") else 0
        signs = [argument > middle for view in views for found, argument in view if found == name]
        assert stats.binomtest(sum(signs), len(signs), 0.5).pvalue > CONFIDENCE, name


def test_operations_of_a_view_are_independent():
    # Which operation, applied or not, magnitude and direction come from slots of their own.
    views = [view for view in draw("imagenet", "rand-m9-mstd0.5-inc1-p1", 6000)
             if {name for name, _ in view} <= {"Rotate", "ShearX", "ShearY", "TranslateXRel",
                                               "TranslateYRel"}]
    levels = find_levels(views).reshape(-1, 2)
    assert len(levels) > 500
    for one, other in ((np.abs(levels[:, 0]), np.abs(levels[:, 1])), np.sign(levels).T,
                       (np.sign(levels[:, 0]), np.abs(levels[:, 0]))):
        assert stats.spearmanr(one, other).pvalue > CONFIDENCE


@pytest.mark.parametrize("text", ["rand-m18-mmax20-mstd3", "rand-m18-mmax20-mstd3-inc1"])
def test_views_over_level_ten_have_pixels(text):
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    png = ops.encode_png(image)
    for name in ("imagenet", "microsoft"):
        spec = make_spec(spec=name, rand_augment=text + "-n4-p1", erase=0.0)
        for seed in range(20):
            assert augment.replay(png, "it", seed, spec).shape == (224, 224, 3)
