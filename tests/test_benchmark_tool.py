"""tools/benchmark.py input, step, end_to_end and live: they measure what they say they do."""

import json
import shutil

import benchmark
import numpy as np
import pytest
from reference import (
    bench_end_to_end,
    bench_images,
    bench_input,
    bench_live,
    bench_report,
    bench_resident,
    bench_step,
    bench_timing,
    original_input,
)

from tinyvit_jax import onednn
from tinyvit_jax.data import microsoft
from tinyvit_jax.data.spec import NO_BOX
from tinyvit_jax.models import create_model

SHAPE = {"embed_dims": (8, 16, 16, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}


def are_tables(text: str, count: int) -> None:
    """Fails unless a text has so many Markdown tables of even lines."""
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == count
    for table in tables:
        lines = table.splitlines()
        assert len({len(line) for line in lines}) == 1
        assert set(lines[1]) <= set("|-:")


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(2 * bench_input.CHUNK):
        picture = bench_images.make_image(i, 160, 120)
        (folder / f"{i}.JPEG").write_bytes(bench_images.encode(picture, i))
    return folder


def test_input_is_whole(jpegs, tmp_path, capsys):
    benchmark.main(["input", f"--images={jpegs}", f"--files={2 * bench_input.CHUNK}",
                    "--seconds=0.01", "--stream_seconds=0", "--image_size=32", f"--out={tmp_path}"])
    result = json.loads((tmp_path / "input.json").read_text())
    assert (tmp_path / "input.md").read_text() + "\n" == capsys.readouterr().out
    are_tables((tmp_path / "input.md").read_text(), 2)
    found = result["images"]
    assert (found["count"], found["width"], found["height"]) == (2 * bench_input.CHUNK, 160, 120)
    race = {row["what"]: row for row in result["race"]}
    assert set(race) == {bench_input.ORIGINAL, bench_input.PLAIN, *(
        name + label for name in (bench_input.FILES, bench_input.PACK, bench_input.SHORT)
        for label in ("", ", no RandAugment", ", fast pixels", ", exact pixels"))}
    for row in race.values():
        assert 0 < row["low"] <= row["median"] <= row["high"]
        assert row["rounds"] >= 5
    assert race[bench_input.ORIGINAL]["against"][bench_input.ORIGINAL]["median"] == 1
    assert [row["what"] for row in result["stages"]] == [
        bench_input.ORIGINAL, bench_input.FILES, bench_input.PACK, bench_input.SHORT]
    for row in result["stages"]:
        assert all(row[stage] > 0 for stage in original_input.STAGES)


def test_a_pipeline_is_read_in_a_process_of_its_own(jpegs, tmp_path):
    settings = bench_input.Settings(str(jpegs), 2 * bench_input.CHUNK, image_size=32)
    bench_input.make_sources(settings, tmp_path, print)
    run = bench_input.run_probe(f"probe_stream({str(tmp_path)!r}, 'pack', 32, 8, 1, 0, 0.05)")
    assert run["speed"] > 0
    assert run["views"] % 8 == 0
    rows = [{"source": "pack", "threads": 1, "workers": 0, "median": 3.0, "low": 2.0, "high": 4.0,
             "first_mib": None, "last_mib": 10.0, "views": 8, "rounds": 1}]
    assert bench_input._format_streams(rows).count(" - ") == 1


@pytest.mark.parametrize("seed", range(8))
def test_the_original_is_the_one_that_is_replayed(seed):
    """Up to the tensor, which has the pixels' values; the erased part is noise beyond them."""
    spec = bench_input.make_spec("microsoft", 64)
    data = bench_images.encode(bench_images.make_image(seed, 160, 120), seed)
    view = microsoft.sample_view(seed, 120, 160, spec)
    tensor = np.asarray(original_input.make_view(data, seed, spec)).transpose(1, 2, 0)
    pixels = (tensor * spec.std + spec.mean) * 255
    replayed = microsoft.replay(data, "", seed, spec).astype(np.float64)
    difference = np.abs(np.clip(pixels, 0, 255) - replayed)
    # One resize and two in turn round differently, and RandAugment can magnify a level.
    assert np.median(difference) < 0.51
    if view.erase != NO_BOX:
        y0, x0, y1, x1 = view.erase
        assert difference[y0:y1, x0:x1].max() <= 0.51
    plain = original_input._normalise_numpy(original_input.decode(data), spec)
    assert plain.dtype == np.float32
    assert plain.shape == (3, 120, 160)


def test_both_tensors_are_equal():
    pytest.importorskip("torch")
    spec = bench_input.make_spec("microsoft", 64)
    image = original_input.decode(bench_images.encode(bench_images.make_image(1, 40, 30), 1))
    np.testing.assert_allclose(original_input._normalise_torch(image, spec).numpy(),
                               original_input._normalise_numpy(image, spec), atol=1e-6)


def test_images_are_of_the_size_of_real_ones():
    assert np.array_equal(bench_images.make_image(3, 50, 40), bench_images.make_image(3, 50, 40))
    sizes = [len(bench_images.encode(bench_images.make_image(i), i)) for i in range(8)]
    assert 0.4 < np.mean(sizes) / (bench_images.WIDTH * bench_images.HEIGHT) < 0.75


def test_a_race_is_by_turns():
    order = []
    speeds, busy = bench_timing.race({"a": lambda: order.append("a") or 1,
                                      "b": lambda: order.append("b") or 1}, 0, 3)
    assert order == ["a", "b"] * 3
    assert [len(values) for values in (*speeds.values(), *busy.values())] == [3] * 4
    row, _ = bench_timing.race_rows({"a": [2.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, ("b",))
    assert row["against"]["b"]["median"] == 2


def test_resident_is_whole(tmp_path, capsys, monkeypatch):
    load = bench_resident.load_config

    def load_small(name):
        config = load(name)
        config.model.update({"embed_dims": (8,), "depths": (1,), "num_heads": (1,),
                             "mlp_dims": (8,), "patch_size": 8})
        return config

    monkeypatch.setattr(bench_resident, "load_config", load_small)
    monkeypatch.setattr(bench_resident, "_TURN", 0.01)
    benchmark.main(["resident", "--images=50", "--batch=8", "--seconds=0", f"--out={tmp_path}"])
    result = json.loads((tmp_path / "resident.json").read_text())
    are_tables(capsys.readouterr().out, 2)
    assert (result["batch"], result["side"], result["images"]) == (8, 32, 50)
    for name, whats in (("views", (bench_resident.HOST, bench_resident.DEVICE)),
                        ("training", (bench_resident.TRAINED, bench_resident.RESIDENT))):
        assert tuple(row["what"] for row in result[name]) == whats
        assert result[name][0]["against"][whats[0]]["median"] == 1
        assert result[name][1]["against"][whats[0]]["median"] > 0


def test_resident_wants_two_sides_that_do_the_same(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["resident", "--config=configs/cifar10.py:modern", f"--out={tmp_path}"])
    assert ended.value.code
    assert "augment.erase=0.25: set it to 0" in capsys.readouterr().err + str(ended.value.code)


@pytest.fixture
def shallow(monkeypatch):
    """Variants of one block a stage."""
    from tinyvit_jax import models

    make = models.create_model
    monkeypatch.setattr(models, "create_model", lambda *args, dtype: make(
        *args, dtype=dtype, **SHAPE))


@pytest.mark.torch
@pytest.mark.parametrize("sizes", [  # test_ratios.py races a training step in the default suite
    ("--batch_sizes=2", "--train_batches=0"),
    pytest.param(("--batch_sizes=0", "--train_batches=2"), marks=pytest.mark.slow)])
def test_step_is_whole(shallow, tmp_path, capsys, sizes):
    pytest.importorskip("torch")
    benchmark.main(["step", "--image_size=32", "--classes=10", *sizes, "--eager", "--seconds=0.01",
                    "--peak_tflops=0.5", f"--out={tmp_path}"])
    result = json.loads((tmp_path / "step.json").read_text())
    are_tables(capsys.readouterr().out, len(result["cases"]))
    assert result["dtype"] == "float32"
    assert [(case["train"], case["batch"]) for case in result["cases"]] == (
        [(True, 2)] if sizes[0].endswith("=0") else [(False, 2)])
    for case in result["cases"]:
        rows = {row["what"]: row for row in case["rows"]}
        assert set(rows) == {bench_step.OURS, "PyTorch, plain", "PyTorch, channels_last"}
        others = {name: row["median"] for name, row in rows.items() if name != bench_step.OURS}
        assert case["best"] == max(others, key=others.get)
        assert set(case["ours_against"]) == set(others)
        ours = rows[bench_step.OURS]
        flops = ours["median"] * result["macs"] * 2 * (3 if case["train"] else 1)
        assert ours["utilisation"] == pytest.approx(flops / 0.5e12)


@pytest.mark.slow
@pytest.mark.torch
def test_weights_that_are_built_in_on_both_sides_are_for_inference_alone(shallow, tmp_path):
    pytest.importorskip("torch")
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    benchmark.main(["step", "--image_size=32", "--classes=10", "--batch_sizes=2",
                    "--train_batches=2", "--frozen", "--seconds=0.01", f"--out={tmp_path}"])
    result = json.loads((tmp_path / "step.json").read_text())
    raced = [{row["what"] for row in case["rows"]} for case in result["cases"]]
    assert raced[0] - raced[1] == {"PyTorch, torch.compile, frozen"}
    assert raced[1] < raced[0]


def test_the_step_with_onednn_needs_it(monkeypatch):
    monkeypatch.setattr(onednn, "turn_on", lambda wanted=True: False)
    with pytest.raises(ValueError, match="--onednn needs a CPU"):
        benchmark.main(["step", "--onednn", "--batch_sizes=1"])


@pytest.mark.torch
@pytest.mark.parametrize("size", [64, 80])
def test_the_fast_rival_is_the_same_network(size):
    torch = pytest.importorskip("torch")
    from reference.torch_fast import FastTinyViT
    from reference.torch_tinyvit import TorchTinyViT, randomize

    model = create_model("tiny_vit", 5, size, window_sizes=(4, 4, 4, 2), **SHAPE)
    plain = randomize(TorchTinyViT(model))
    fast = FastTinyViT(model).eval()
    fast.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = plain(images)
    torch.testing.assert_close(fast(images), expected, atol=1e-5, rtol=1e-5)
    last = fast.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(images.contiguous(memory_format=torch.channels_last)),
                               expected, atol=1e-5, rtol=1e-5)


@pytest.mark.torch
def test_a_rival_learns():
    torch = pytest.importorskip("torch")
    from reference import bench_torch
    from reference.torch_tinyvit import randomize

    model = create_model("tiny_vit", 5, 32, window_sizes=(4, 4, 2, 1), **SHAPE)
    rival = bench_torch.Rival("PyTorch", bfloat16=True)
    module = randomize(bench_torch.make_module(rival, model)).train()
    before = {name: value.clone() for name, value in module.named_parameters()}
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    bench_torch._make_training(module, images, labels, rival)(1)
    moved = [name for name, value in module.named_parameters() if not value.equal(before[name])]
    assert moved == list(before)


@pytest.mark.parametrize(("kind", "peak"), [
    ("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("TPU v5 lite", 197), ("TPU v5", 459), ("cpu", None)])
def test_peaks_by_name(kind, peak):
    assert bench_step.find_peak(kind) == peak


@pytest.mark.parametrize(("command", "message"), [
    ("input --files=8", "--files=8: expected 32 or more"),
    ("input --images=/nowhere", "--images=/nowhere has 0 JPEG files: expected --files=192 or more"),
    ("step --model=vit", "--model=vit: expected one of tiny_vit_5m_224, "),
    ("step --dtype=float16", "--dtype=float16: expected float32 or bfloat16"),
    ("step --batch_sizes=0,8", "--batch_sizes=0,8: expected whole numbers above 0"),
    ("end_to_end --batch=3", "--batch=3: expected an even number"),
    ("end_to_end --config=configs/none.py", "there is no such file"),
    ("live --batch=3", "--batch=3: expected an even number"),
    ("live --top_k=0", "--top_k=0: expected 1 or more"),
    ("live --config=configs/none.py:live", "there is no such file"),
    ("end_to_end --top_k=9 --classes=9", "--top_k=9: expected less than --classes=9"),
])
def test_what_cannot_be_measured_is_named(command, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(command.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_filled_store_has_every_view(tmp_path):
    store = bench_end_to_end.fill_store(tmp_path / "store", 600, 10, 5)
    assert not store.missing()
    index, prob = store.read(0, 0, 600)
    assert all(len(set(row)) == 5 for row in index.tolist())
    assert prob.sum(1) == pytest.approx(0.9, abs=1e-2)


def test_tables_of_end_to_end():
    three = {"median": 1.0, "low": 0.5, "high": 2.0}
    side = {bench_end_to_end.SUPERVISED: three, bench_end_to_end.DISTILLED: three}
    machine = bench_report.describe_machine(("numpy",)) | {"load": [0.0, None]}
    result = {"settings": bench_end_to_end.Settings()._asdict(), "machine": machine,
              "import": [{"what": "nothing", **three}], "first_step": [{"what": "empty", **three}],
              "training": {"images_per_second": three, "data_wait": 0.01, "most_data_wait": 0.2,
                           "steps": 10, "seconds": 1.0},
              "distillation": [{"what": "student", "batch": 4, "top_k": 2, "classes": 10,
                                "cost": three, "cpu_cost": three, "rounds": 7, **side}]}
    are_tables(bench_end_to_end.format_result(result), 4)


def test_waiting_is_weighed_by_time():
    """Five updates at 50 views a second take as long as ten at 100; the first line is left out."""
    rows = (1, 1.0, 0.9), (11, 100.0, 0.1), (16, 50.0, 0.3), (46, 100.0, 0.0)
    lines = [dict(zip(("step", "images_per_second", "data_wait"), row, strict=True))
             for row in rows]
    found = bench_end_to_end.summarise(lines)
    assert found["data_wait"] == pytest.approx((0.1 + 0.3 + 3 * 0.0) / 5)
    assert (found["most_data_wait"], found["steps"]) == (0.3, 46)
    assert found["images_per_second"]["median"] == 100


@pytest.mark.slow
def test_end_to_end_is_whole(tmp_path, capsys):
    benchmark.main(["end_to_end", "--repeats=1", "--epochs=0.4", "--seconds=1", "--batch=2",
                    "--image_size=32", "--classes=50", "--top_k=5", f"--out={tmp_path}"])
    result = json.loads((tmp_path / "end_to_end.json").read_text())
    are_tables(capsys.readouterr().out, 4)
    took = {row["what"]: row["median"] for row in result["import"]}
    assert took["nothing"] <= took["tinyvit_jax"] <= took["tinyvit_jax.recipe"]
    assert [row["what"] for row in result["first_step"]] == ["empty", "filled"]
    assert result["training"]["steps"] == 40  # 0.4 of 10,000 images, 100 in a batch
    training = result["training"]
    assert 0 <= training["data_wait"] <= training["most_data_wait"] <= 1
    assert [row["batch"] for row in result["distillation"]] == [100, 2]


def test_table_of_live():
    three = {"median": 1.0, "low": 0.5, "high": 2.0}
    machine = bench_report.describe_machine(("numpy",)) | {"load": [0.0, None]}
    memory = {"arguments": 3 << 20, "outputs": 1 << 20, "temporaries": 8 << 20, "program": 0}
    rows = [{"what": name, "rounds": 7, "milliseconds": three, "cpu_milliseconds": three,
             "cost": three, "cpu_cost": three, "memory": own}
            for name, own in ((bench_live.LIVE, memory), (bench_live.ALONE, None))]
    text = bench_live.format_result({
        "machine": machine, "rows": rows, "batch": 4, "classes": 10, "image_size": 32,
        "parameters": [1000, 2000], "macs": [10**6, 10**7]})
    are_tables(text, 1)
    assert "|           4.0 |         8.0 |       12.0 |" in text
    assert "1,000 and 2,000 parameters, 1.0 and 10.0 million" in text


@pytest.mark.slow
def test_live_is_whole(tmp_path, capsys):
    benchmark.main(["live", "--seconds=0.1", "--batch=4", f"--out={tmp_path}"])
    are_tables(capsys.readouterr().out, 1)
    result = json.loads((tmp_path / "live.json").read_text())
    rows = {row["what"]: row for row in result["rows"]}
    assert list(rows) == [bench_live.LABELS, bench_live.STORED, bench_live.LIVE, bench_live.ALONE]
    stays = {name: row["memory"]["arguments"] for name, row in rows.items() if row["memory"]}
    weights = 4 * result["parameters"][1]
    assert stays[bench_live.LIVE] - stays[bench_live.LABELS] > weights
    assert 0 < stays[bench_live.STORED] - stays[bench_live.LABELS] < 1000  # its targets alone
    assert rows[bench_live.LIVE]["cpu_cost"]["median"] > 1
