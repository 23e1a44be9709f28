"""Teachers: one or several, softened, cut over devices, and in several processes at once."""

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import convert_checkpoint
import jax
import numpy as np
import pytest
import tiny
import tiny_clip
import tiny_plain

from tinyvit_jax import config as configs
from tinyvit_jax import mesh as meshes
from tinyvit_jax import mix, teachers, weights
from tinyvit_jax.convert import clip, files

ROOT = Path(__file__).parents[1]
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def bright(images):
    """A teacher of a user's own: how red, green and blue an image is."""
    assert images.dtype == np.uint8
    return images.reshape(len(images), -1, 3).mean(1) / 10


def wrong_shape(images):
    return np.zeros((len(images), 7))


def not_finite(images):
    return np.full((len(images), 3), np.nan)


def out_of_memory(images):
    raise MemoryError("no room for 8 images")


def strings(images):
    return [["a", "b", "c"]] * len(images)


def complex_numbers(images):
    return bright(images) + 0j


def nothing(images):
    bright(images)


def ragged(images):
    return [[1, 2, 3], [1, 2], *[[1, 2, 3]] * (len(images) - 2)]


def one_row(images):
    return bright(images)[0]


def fails_in_one(images):
    return bright(images) if jax.process_index() == 0 else wrong_shape(images)


def make_config(**changes):
    c = configs.default().teacher
    c.update(changes)
    return c


def make_pixels(rows=4, size=16):
    generator = np.random.default_rng(0)
    colours = generator.uniform(0, 255, (rows, 1, 1, 3))
    return (colours * generator.uniform(0, 1, (rows, size, size, 3))).astype(np.float32)


def make_teacher(config, class_names=tiny.CLASSES, temperature=1.0):
    return teachers.make_teacher(config, class_names, 16, meshes.make_mesh(), temperature)


def run(teacher, pixels):
    put = meshes.put_batch({"pixels": pixels}, meshes.make_mesh())["pixels"]
    out = teacher.log_probs(put)
    assert out.dtype == np.float32
    return np.asarray(out)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def logits_of(trained, pixels):
    return jax.jit(trained.model.apply)(trained.variables,
                                        mix.normalize(pixels, trained.mean, trained.std))


def make_trained(seed, image_size, class_names, mean, std):
    """A CLIP of one block, which compiles soonest."""
    model = tiny_clip.make_small(image_size=image_size, depths=(1,))
    return weights.Trained(model, tiny_clip.random_variables(model, seed), class_names, mean, std,
                           "center", 1.0)


@pytest.fixture(scope="module")
def first():
    return make_trained(0, 16, tiny.CLASSES, (0,) * 3, (1,) * 3)


@pytest.fixture(scope="module")
def second():
    """Of another size, with another normalisation and order of classes."""
    return make_trained(1, 24, tiny.CLASSES[::-1], MEAN, STD)


@pytest.fixture(scope="module")
def workdirs(first, second, tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    for name, trained in (("first", first), ("second", second)):
        weights.save_trained(trained, root / name)
    return root


def enlarge(pixels):
    return np.clip(jax.image.resize(pixels, (len(pixels), 24, 24, 3), "cubic"), 0, 255)


def test_a_workdir_brings_its_size_normalisation_and_classes(second, workdirs):
    teacher = make_teacher(make_config(weights=str(workdirs / "second")), temperature=2.0)
    assert teacher.description == {
        "name": "second", "weights": weights.hash_weights(second.variables), "image_size": 24,
        "mean": list(MEAN), "std": list(STD), "dtype": "float32"}
    pixels = make_pixels()
    expected = log_softmax(logits_of(second, enlarge(pixels))[:, ::-1] / 2)
    np.testing.assert_allclose(run(teacher, pixels), expected, atol=1e-5)
    assert np.ptp(expected, 0).min() > 0.01  # a teacher that tells images apart


def test_a_model_takes_onednn_where_it_is_on(workdirs, given_to_onednn):
    run(make_teacher(make_config(weights=str(workdirs / "first"))), make_pixels())
    assert given_to_onednn == {"log_probs"}


def test_a_teacher_without_all_classes(workdirs):
    path = str(workdirs / "second")
    for config in (make_config(weights=path),
                   make_config(name="test_teachers:bright", ensemble=(path,))):
        with pytest.raises(teachers.TeacherError, match=rf"{path} lacks 1 of the 3 .*: birds; its"):
            make_teacher(config, ("blobs", "birds", "checks"))


def test_weights_without_a_classifier(first, tmp_path):
    model = first.model.copy(num_classes=0)
    bare = first._replace(model=model, variables=tiny_clip.random_variables(model), class_names=())
    weights.save_trained(bare, tmp_path / "bare")
    weights.write_file(tmp_path / "bare.safetensors", bare)
    for name in ("bare", "bare.safetensors"):
        with pytest.raises(teachers.TeacherError, match=rf"{name} has no classifier.*finetune\.py"):
            make_teacher(make_config(weights=str(tmp_path / name)))


def test_weights_of_another_shape_than_the_section_names(tmp_path):
    """All that weights cannot be used otherwise with counts; how positions were made does not."""
    plain = tiny_plain.make_small("class")
    weights.save_trained(weights.Trained(plain, tiny_clip.random_variables(plain), tiny.CLASSES,
                                         MEAN, STD, "center", 1.0), tmp_path / "plain")
    path = str(tmp_path / "plain")
    same = {**tiny_plain.SHAPE, "name": "vit", "mlp_dims": (128,), "token_layout": "class"}
    assert make_teacher(make_config(weights=path, **same, positions="sincos")).description
    for key, value in (("token_layout", "distilled"), ("patch_size", 8), ("num_heads", (2,)),
                       ("mlp_dims", (64,)), ("norm_order", "post"), ("stem_strides", (2, 2))):
        with pytest.raises(teachers.TeacherError, match=rf"are not those of .*: {key} .*expected"):
            make_teacher(make_config(weights=path, **{**same, key: value}))
    with pytest.raises(teachers.TeacherError, match=r"expected \(192,\).*token"):
        make_teacher(make_config(weights=path, name="deit_tiny_distilled_patch16_224"))


def test_classes_that_names_cannot_tell_apart(first, tmp_path):
    names = ("blobs", "checks", "blobs")
    weights.save_trained(first._replace(class_names=names), tmp_path / "twice")
    config = make_config(weights=str(tmp_path / "twice"))
    assert make_teacher(config, names).description["name"] == "twice"  # equal: nothing to match
    with pytest.raises(teachers.TeacherError, match=r"of the teacher .*twice cannot.*stand twice"):
        make_teacher(config, ("blobs", "checks", "blobs", "checks"))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_a_function_is_softened(temperature):
    teacher = make_teacher(make_config(name="test_teachers:bright"), temperature=temperature)
    pixels = make_pixels()
    expected = log_softmax(bright(pixels.round().astype(np.uint8)) / temperature)
    np.testing.assert_allclose(run(teacher, pixels), expected, atol=1e-5)
    assert teacher.description == {
        "name": "test_teachers:bright", "image_size": 16, "mean": [], "std": [],
        "weights": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"name": "test_teachers:wrong_shape"}, teachers.TeacherError,
     r"teachers:wrong_shape gave .*shape \(4, 7\).*expected finite logits of shape \(4, 3\)"),
    ({"name": "test_teachers:not_finite"}, teachers.TeacherError, "not_finite gave .*not finite"),
    ({"name": "test_teachers:out_of_memory"}, teachers.TeacherError,
     r"failed with uint8 images of shape \(4, 16, 16, 3\): MemoryError: no room for 8 images\."),
    ({"name": "test_teachers:strings"}, teachers.TeacherError, r"gave an array of <U1 of shape"),
    ({"name": "test_teachers:complex_numbers"}, teachers.TeacherError, "gave an array of complex"),
    ({"name": "test_teachers:nothing"}, teachers.TeacherError, "nothing gave None for"),
    ({"name": "test_teachers:ragged"}, teachers.TeacherError, "ragged failed with .*ValueError"),
    ({"name": "test_teachers:one_row"}, teachers.TeacherError, r"gave an array of shape \(3,\)"),
    ({"name": "test_teachers:MEAN"}, teachers.TeacherError, "MEAN is a tuple; expected a function"),
    ({"name": "broken_teacher:f"}, teachers.TeacherError,
     "broken_teacher:f: ZeroDivisionError: division by zero. Expected module:function"),
    ({"name": "test_teachers:absent"}, teachers.TeacherError, "test_teachers:absent: .*PYTHONPATH"),
    ({"name": "no_such_module:f"}, teachers.TeacherError, "no_such_module"),
    ({"name": "tiny_vit"}, teachers.TeacherError, "tiny_vit has no weights"),
    ({"name": "regnety_16O", "weights": "x.pth"}, teachers.TeacherError,
     "teacher.name=regnety_16O is no model of ours"),
    ({"name": "test_teachers:bright", "weights": "x.pth"}, teachers.TeacherError,
     r"weights=x\.pth cannot work beside the function .*test_teachers:bright"),
    ({"name": "test_teachers:bright", "ensemble": ("no_such_module:f",)}, teachers.TeacherError,
     "no_such_module:f"),
    ({"name": "test_teachers:bright", "ensemble": ("test_teachers:not_finite",)},
     teachers.TeacherError, "test_teachers:not_finite gave"),
    ({"name": "test_teachers:bright", "ensemble": ("runs/none",)}, weights.WeightsError,
     "runs/none does not exist"),
    ({"name": "test_teachers:bright", "shard": True}, teachers.TeacherError,
     r"shard=True cannot work: test_teachers:bright is a function"),
])
def test_a_teacher_that_cannot_be_used(changes, error, message, tmp_path, monkeypatch):
    (tmp_path / "broken_teacher.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=message):
        run(make_teacher(make_config(**changes)), make_pixels())


def test_the_mean_of_teachers_is_that_of_their_probabilities(first, second, workdirs):
    """Each with its own size, normalisation and order of classes; in float64 as written down."""
    config = make_config(
        weights=str(workdirs / "first"), mean=(0.4,) * 3, std=(0.3,) * 3,
        ensemble=("test_teachers:bright", str(workdirs / "second")))
    teacher, pixels = make_teacher(config, temperature=3.0), make_pixels()
    members = [
        logits_of(first._replace(mean=(0.4,) * 3, std=(0.3,) * 3), pixels),
        bright(pixels.round().astype(np.uint8)),
        logits_of(second, enlarge(pixels))[:, ::-1],
    ]
    parts = [log_softmax(np.asarray(logits, np.float64) / 3) for logits in members]
    expected = np.log(np.mean(np.exp(parts), 0))
    np.testing.assert_allclose(run(teacher, pixels), expected, atol=1e-5)
    assert min(np.abs(part - expected).max() for part in parts) > 0.1  # all three count

    description = teacher.description
    own = [d["weights"] for d in description["members"]]
    assert description["name"] == "first+test_teachers:bright+second"
    assert description["weights"] == hashlib.sha256("".join(own).encode()).hexdigest()
    assert own[2] == weights.hash_weights(second.variables)
    assert [d["image_size"] for d in (description, *description["members"])] == [16, 16, 16, 24]
    assert [d["mean"] for d in description["members"]] == [[0.4] * 3, [], list(MEAN)]
    assert teachers.hash_teacher(config) == description["weights"]
    config.ensemble = ()
    assert teachers.hash_teacher(config) == own[0]


def test_a_mean_of_vanishing_probabilities():
    parts = np.array([[[0.0, -2000.0, -5000.0]], [[-1e-3, -7.0, -5000.0]]], np.float32)
    found = np.asarray(teachers.average_log_probs(list(parts)))
    expected = [[np.log((1 + np.exp(-1e-3)) / 2), -7 - np.log(2), -5000]]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_files_and_how_to_give_one_its_own_normalisation(first, workdirs, tmp_path, monkeypatch):
    """A file takes the section's; converted with its own it keeps that, whatever stands there."""
    monkeypatch.setattr(convert_checkpoint, "check", lambda *_, **__: [])
    file, folder, names = (tmp_path / name for name in ("w.safetensors", "own", "names.txt"))
    files.write_state(file, weights.convert_to(first.model, first.variables))
    names.write_text("\n".join(tiny.CLASSES))

    def convert(target, *arguments):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", f"--from={file}",
                                          f"--to={target}", f"--classes={names}", *arguments])
        convert_checkpoint.main()

    convert(folder, "--mean", *map(str, MEAN), "--std", *map(str, STD))
    config = make_config(weights=str(workdirs / "first"), mean=(0.4,) * 3, std=(0.3,) * 3,
                         ensemble=(str(file), str(folder)))
    members = make_teacher(config).description["members"]
    assert [m["mean"] for m in members] == [[0.4] * 3, [0.4] * 3, list(MEAN)]
    assert [m["std"] for m in members] == [[0.3] * 3, [0.3] * 3, list(STD)]
    config.mean = config.std = ()
    assert make_teacher(config).description["members"][1]["mean"] == list(clip.MEAN)

    for target, arguments in ((tmp_path / "n", ("--mean", ".5", ".5", ".5")),
                              (tmp_path / "n.pth", ("--mean", *"555", "--std", *"555")),
                              (tmp_path / "n", ("--mean", *"555", "--std", *"550"))):
        with pytest.raises(SystemExit, match="expected both or neither, std above 0, and --to a"):
            convert(target, *arguments)
        assert not target.exists()


_ON_MESH = """
import sys
import jax, numpy as np
from test_teachers import make_config, make_pixels, meshes, teachers, tiny
from tinyvit_jax import team

file, out, port, process = sys.argv[1:]
if port != "0":
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
config = make_config(weights=file, shard=True, ensemble=("test_teachers:bright",))
mesh, pixels = meshes.make_mesh(), make_pixels(8)
own = np.split(pixels, jax.process_count())[jax.process_index()]
given = meshes.put_batch({"pixels": own}, mesh)["pixels"]
teacher = teachers.make_teacher(config, tiny.CLASSES, 16, mesh, 2.0)
held = {}
for array in jax.live_arrays():
    for part in array.addressable_shards if array is not given else ():
        held[part.device.id] = held.get(part.device.id, 0) + part.data.nbytes
found = teacher.log_probs(given)
assert found.sharding.is_equivalent_to(meshes.sharded(mesh), 2), found.sharding
np.testing.assert_allclose(
    np.concatenate([np.asarray(p.data) for p in found.addressable_shards]),
    meshes.local_rows(found))
whole = jax.jit(lambda x: x, out_shardings=meshes.replicated(mesh))(found)
np.savez(out, log_probs=np.asarray(whole), held=list(held.values()),
         shape=[jax.process_count(), jax.device_count()])
if port != "0":
    try:
        teachers.make_teacher(make_config(name="test_teachers:fails_in_one"), tiny.CLASSES, 16,
                              mesh).log_probs(given)
    except (teachers.TeacherError, team.TeamError) as error:
        print(error)
"""


def start(devices, *arguments):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tools")))
    return subprocess.Popen(
        [sys.executable, "-c", _ON_MESH, *map(str, arguments)], text=True, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path})


def finish(*processes):
    out = [p.communicate(timeout=300) for p in processes]
    assert not any(p.returncode for p in processes), "\n".join(err[-2000:] for _, err in out)
    return [text.splitlines()[-1] if text else "" for text, _ in out]


def test_cut_over_four_devices_of_one_and_of_two_processes(first, tmp_path):
    """Weights in quarters, rows with their process, a function of one's own among them."""
    file = tmp_path / "w.safetensors"
    files.write_state(file, weights.convert_to(first.model, first.variables))
    config = make_config(weights=str(file), ensemble=("test_teachers:bright",))
    expected = run(make_teacher(config, temperature=2.0), make_pixels(8))
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    one, *two = (tmp_path / f"{name}.npz" for name in ("one", "two0", "two1"))
    finish(start(4, file, one, 0, 0))
    said = finish(*(start(2, file, out, port, i) for i, out in enumerate(two)))
    assert "Process 1 of 2 stopped" in said[0]
    assert r"fails_in_one gave an array of shape (4, 7)" in said[1]

    whole = sum(x.nbytes for x in jax.tree.leaves(first.variables))
    for file, shape in ((one, [1, 4]), *((f, [2, 4]) for f in two)):
        found = np.load(file)
        assert found["shape"].tolist() == shape
        np.testing.assert_allclose(found["log_probs"], expected, atol=1e-5)
        assert len(found["held"]) == 4 // shape[0]
        assert found["held"].max() < 0.3 * whole
        assert found["held"].min() > 0.24 * whole
