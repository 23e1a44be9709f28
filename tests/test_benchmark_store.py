"""The benchmark of the store, at a size of seconds: what it writes, reads, counts and opens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import benchmark
import numpy as np
import pytest
from reference import bench_report, bench_store, original_logits, synthetic_teachers

from tinyvit_jax.store import codec

ROOT = Path(__file__).parents[1]
FLAGS = ("--views=8192", "--top_k=5", "--classes=300", "--seconds=0.01", "--images=40000",
         "--passes=3", "--keys=2000")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The tool's own run: its process and the folder of its results."""
    out = tmp_path_factory.mktemp("benchmark") / "out"
    run = subprocess.run([sys.executable, "tools/benchmark.py", "store", *FLAGS, f"--out={out}"],
                         cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                         capture_output=True)
    assert run.returncode == 0, run.stderr
    return run, out


@pytest.fixture(scope="module")
def result(done):
    return json.loads((done[1] / "store.json").read_text())


def test_the_run_is_whole(done, result):
    run, out = done
    assert (out / "store.md").read_text() + "\n" == run.stdout
    assert "reads them" in run.stderr
    assert "reads them" not in run.stdout
    assert result["settings"] == {"views": 8192, "top_k": 5, "classes": 300, "seconds": 0.01,
                                  "images": 40000, "passes": 3, "keys": 2000}
    assert set(result["machine"]["versions"]) == {"python", "numpy", "array_record", "zstandard"}
    for row in result["read"] + result["write"]:
        assert 0 < row["low"] <= row["median"] <= row["high"]
    for row in result["read"]:
        assert row["rounds"] >= 5
    several = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1
    rows = {row["what"]: row for row in result["read"]}
    assert rows[bench_store.LOADED]["against"][bench_store.LOADED]["median"] == 1
    assert [row["what"] for row in result["write"]] == [
        "store, compact", "store, float16", "original", "original, two cores"][:3 + several]


def test_bytes_and_errors_are_those_of_the_format(result):
    assert len(result["bytes"]) == 3 * (3 + 4)
    for row in result["bytes"]:
        assert 0 <= row["kl_infinite"] <= 1
        assert 0 < row["untrained"] < 0.01
        if row["what"] == "store, compact":
            assert row["kl_infinite"] == 0
            assert 0 < row["kl"] < 1e-4
        if row["what"] == "original":  # 8,192 numbers as keys, a line each
            keys = np.mean([len(str(i)) + 1 for i in range(8192)])
            assert row["bytes"] == pytest.approx(4 + 4 * row["top_k"] + keys)
    both = {row["what"]: row for row in result["bytes"]
            if (row["teacher"], row["top_k"]) == ("peaked", 5)}
    for key in ("kl", "kl_infinite", "untrained", "trained"):  # the same roundings
        assert both["store, float16"][key] == both["original"][key]


def test_opening_counts_what_is_there(result):
    ours, original = result["open"]
    assert (ours["views"], ours["shards"]) == (120_000, 6)
    assert ours["manifest_bytes"] > 300 * len("n00004475")
    assert original["keys"] == 2000
    for row in (ours, original):
        assert row["seconds"] > 0
    if sys.platform == "linux":
        assert 0 < original["stays"] <= original["peak"]


def test_tables_are_markdown(done):
    tables = [part for part in done[0].stdout.split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        lines = table.splitlines()
        assert len({len(line) for line in lines}) == 1
        assert len({line.count("|") for line in lines}) == 1
        assert set(lines[1]) <= set("|-:")


def test_both_sides_read_the_views_that_were_written(tmp_path):
    teacher = synthetic_teachers.make_teacher("flat", 512, 300, 5)
    keys = np.arange(12288), np.arange(12288).astype(np.uint32)
    names = bench_store.image_names(keys[0], 300)
    stores = {mode: bench_store.make_store(tmp_path / mode, teacher, views, mode)
              for mode, views in (("compact", 12288), ("float16", 4096))}
    rows = bench_store.race_writers(stores, tmp_path, teacher, keys, names, set())
    assert [row["rounds"] for row in rows] == [1, 1, 1]
    views = original_logits.Views(tmp_path / "original", names, 5)
    ours = stores["compact"].read(0, 0, 12288, keys)
    for i in range(12288):
        _, index, prob = views.read(i)
        np.testing.assert_array_equal(index, teacher.index[i % 512])
        assert set(ours[0][i]) == set(index)
        np.testing.assert_allclose(ours[1][i].sum(), prob.sum(dtype=np.float64), rtol=0.01)
    assert not stores["compact"].missing()


@pytest.mark.parametrize("kind", synthetic_teachers.KINDS)
def test_teachers_are_targets(kind):
    teacher = synthetic_teachers.make_teacher(kind, 600, 300, 5)
    again = synthetic_teachers.make_teacher(kind, 600, 300, 5)
    np.testing.assert_array_equal(teacher.prob, again.prob)
    assert (teacher.index.dtype, teacher.prob.dtype) == (np.int32, np.float32)
    assert (np.diff(teacher.prob, axis=1) <= 0).all()
    assert codec.decode(codec.encode(teacher.index, teacher.prob, num_classes=300)
                        )[0].shape == (600, 5)
    assert len(teacher.trained) == synthetic_teachers.STUDIED
    assert (teacher.trained.sum() < teacher.untrained.sum()) == (kind != "flat")


def test_errors_are_those_of_the_dense_targets():
    teacher = synthetic_teachers.make_teacher("prototypes", 40, 300, 5)
    stored = teacher.prob * np.random.default_rng(0).uniform(0.9, 1, (40, 1)).astype(np.float32)
    dense = []
    for prob in (teacher.prob, stored):
        left = (1 - prob.sum(1, dtype=np.float64)) / 295
        dense.append(np.repeat(left[:, None], 300, axis=1))
        np.put_along_axis(dense[-1], teacher.index, prob, 1)
    p, q = dense
    found = synthetic_teachers.measure_error(teacher, teacher.index[:, ::-1], stored[:, ::-1])
    assert found["kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert found["untrained"] == pytest.approx(
        np.linalg.norm(p - q) / np.linalg.norm(p - 1 / 300))
    assert found["kl_infinite"] == 0
    stored[3, 4] = 0
    stored[5] /= stored[5].sum() * 0.99
    assert synthetic_teachers.measure_error(teacher, teacher.index, stored)["kl_infinite"] == \
        pytest.approx(2 / 40)
    with pytest.raises(ValueError, match="classes that were read"):
        synthetic_teachers.measure_error(teacher, teacher.index + 1, stored)


def test_names_are_unique_and_like_the_originals():
    names = bench_store.image_names(np.arange(100_000), 21841)
    assert len(set(names)) == 100_000
    assert names[0] == "n00004475_0"
    assert bench_store.image_names(np.arange(3), 1000) == ["0", "1", "2"]


@pytest.mark.parametrize(("flag", "message"), [
    ("--views=100", "--views=100: expected 4096 or more"),
    ("--top_k=30", "--top_k=30: expected less than --classes=30"),
    ("--passes=0", "--passes=0: expected 1 or more"),
])
def test_what_cannot_be_measured_is_named(flag, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["store", "--classes=30", "--top_k=5", flag])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_proc_has_no_figure_of_memory():
    row = {"seconds": 0.1, "busy": 0.1, "stays": None, "peak": None}
    rows = [row | {"what": "store", "views": 9, "shards": 1, "manifest_bytes": 2048},
            row | {"what": "original", "keys": 9}]
    assert bench_report._format_opening(rows).count(" - ") == 5
