"""Pixels as files: a PPM that other programs read, and that is never decoded here."""

import cv2
import numpy as np
import pytest

from tinyvit_jax.data import augment, ops, ppm

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def test_a_ppm_is_its_pixels():
    data = ppm.encode(PIXELS)
    assert data == b"P6 7 5 255\n" + PIXELS.tobytes()
    found = ops.decode(data, "x")
    assert np.array_equal(found, PIXELS)
    assert np.shares_memory(found, np.frombuffer(data, np.uint8))


def test_other_programs_read_it():
    data = ppm.encode(PIXELS)
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), 1)[..., ::-1], PIXELS)
    image = pytest.importorskip("PIL.Image")
    import io

    assert np.array_equal(np.asarray(image.open(io.BytesIO(data))), PIXELS)


def test_another_writers_ppm_is_read_by_either_way():
    plain = cv2.imencode(".ppm", PIXELS[..., ::-1])[1].tobytes()
    noted = plain.replace(b"P6\n", b"P6\n# a comment\n")
    assert ppm.decode(noted) is None
    for data in (plain, noted):
        assert np.array_equal(ops.decode(data, "x"), PIXELS)


@pytest.mark.parametrize("data", [
    ppm.encode(PIXELS)[:-1], ppm.encode(PIXELS) + b"x", b"P6", b"P6 7 5 255", b"P6 0 0 255\n",
    b"P6 999999 999999 255\n" + bytes(100)])
def test_what_is_not_whole_is_no_ppm(data):
    assert ppm.decode(data) is None


@pytest.mark.parametrize("cut", [1, 50, 105])
def test_a_cut_off_ppm_is_refused(cut):
    with pytest.raises(ops.ImageError, match="x cannot be decoded"):
        ops.decode(ppm.encode(PIXELS)[:-cut], "x")


@pytest.mark.parametrize("changes", [
    {"spec": "small"}, {"spec": "imagenet"}, {"spec": "imagenet", "pixels": "exact"},
    {"spec": "microsoft"}, {"spec": "none"}])
def test_views_are_those_of_the_png(changes):
    from tinyvit_jax import config

    settings = config.default().augment
    settings.update({**changes, "erase": 0.5})
    spec = augment.make_spec(settings, 6)
    for seed in range(20):
        assert np.array_equal(augment.replay(ppm.encode(PIXELS), "x", seed, spec),
                              augment.replay(ops.encode_png(PIXELS), "x", seed, spec))
