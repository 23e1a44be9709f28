"""Stores of the original: what its reader would give is what ours gives, or a clear refusal."""

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from tinyvit_jax import importing, recipe, train
from tinyvit_jax.data import augment, finder, images, ops, pipeline
from tinyvit_jax.data.order import Order, StoredOrder, follow_store
from tinyvit_jax.store import codec, microsoft, place
from tinyvit_jax.store import store as stores
from tinyvit_jax.store.manifest import StoreError

K = 2
CLASSES = ("a", "a-b", "b")  # as whole paths "a-b/..." sorts before "a/..."


def make_images(root: Path, counts: tuple[int, ...] = (14, 12, 13)) -> Path:
    """train/ and val/ of three classes; `counts` training images of each."""
    for split, number in (("train", counts), ("val", (1, 1, 1))):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(number[label]):
                picture = tiny.draw(tiny.CLASSES[label], np.random.default_rng(100 * label + i), 24)
                (root / split / name / f"{name}_{i}.png").write_bytes(ops.encode_png(picture))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def source(folder):
    return images.open_source(f"folder:{folder}", "train")


@pytest.fixture
def messages():
    """What the package logs, whoever has set up its logger."""
    kept: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: kept.append(record.getMessage())  # type: ignore[method-assign]
    importing.logger.addHandler(handler)
    level = importing.logger.level
    importing.logger.setLevel(logging.INFO)
    yield kept
    importing.logger.removeHandler(handler)
    importing.logger.setLevel(level)


def image_folder_keys(folder: Path) -> list[str]:
    """The files of train/ in the order in which torchvision's ImageFolder counts them."""
    top = folder / "train"
    return [f"{c}/{f}" for c in sorted(os.listdir(top)) for f in sorted(os.listdir(top / c))]


def name_keys(folder: Path) -> list[str]:
    return [Path(key).stem for key in image_folder_keys(folder)]


def number_keys(folder: Path) -> list[str]:
    return [str(i) for i in range(len(image_folder_keys(folder)))]


def sample_shares(count: int, world: int, epoch: int, paired: bool) -> list[list[int]]:
    """What each process sees in an epoch: a permutation, padded by its beginning, dealt out."""
    unit = 2 if paired else 1
    order = np.random.default_rng(epoch).permutation(count)
    total = -(-count // (unit * world)) * unit * world
    padded = np.concatenate([order, order[:total - count]]).reshape(-1, unit)
    return [padded[rank::world].reshape(-1).tolist() for rank in range(world)]


def make_value(generator, classes: int, top_k: int) -> bytes:
    """A seed, and the top K of a softmax, more or less peaked, in float16."""
    logits = generator.normal(0, generator.choice([1.0, 3.0, 15.0]), classes)
    prob = np.exp(logits - logits.max())
    prob = (prob / prob.sum()).astype(np.float32)
    top = np.argsort(-prob, kind="stable")[:top_k]
    return (np.int32(generator.integers(0, 1 << 31)).tobytes() + top.astype(np.int16).tobytes()
            + prob[top].astype(np.float16).tobytes())


def write_original(root: Path, keys: list[str], epochs=(0, 1), world: int = 2, paired: bool = True,
                   classes: int = 3, top_k: int = K) -> Path:
    """Writes a store as the original does: every rank writes each key once, as it comes."""
    for epoch in epochs:
        generator = np.random.default_rng(epoch + 50)
        path = root / f"logits_top{top_k}_epoch{epoch}"
        path.mkdir(parents=True)
        for rank, share in enumerate(sample_shares(len(keys), world, epoch, paired)):
            written: dict[str, bytes] = {}
            for i in share:
                value = make_value(generator, classes, top_k)
                written.setdefault(keys[i], value)
            (path / f"rank{rank}-keys.txt").write_text("".join(f"{k}\n" for k in written))
            (path / f"rank{rank}-values.bin").write_bytes(b"".join(written.values()))
    return root


def read_original(path: Path, top_k: int) -> dict[str, bytes]:
    """What the original's reader of rank 0 finds for each key: the first file that has it."""
    found: dict[str, bytes] = {}
    size = 4 + 4 * top_k
    names = sorted(path.glob("rank*-values.bin"), key=lambda p: int(p.name[4:].split("-")[0]))
    for name in names:
        data = name.read_bytes()
        keys = (name.parent / name.name.replace("values.bin", "keys.txt")).read_text().split()
        for i, key in enumerate(keys):
            found.setdefault(key, data[i * size:(i + 1) * size])
    return found


def dense_target(seed_index_prob, classes: int) -> np.ndarray:
    """The target at every class as the original's training builds it, float32 [C]."""
    index, prob = seed_index_prob
    target = np.full(classes, (np.float32(1) - prob.sum()) / np.float32(classes - len(prob)),
                     np.float32)
    target[index] = prob
    return target


def make_config(folder: Path, mixed: bool):
    config = tiny.make_config(folder, mixed)
    config.augment.spec = "microsoft"
    config.data.threads = 1
    return config


def make_settings(folder: Path = Path("unused"), paired: bool = True, **changes):
    spec = augment.make_spec(make_config(folder, paired).augment, 16)
    return importing.Settings(spec, paired, K, shard_views=16, block_views=8)._replace(**changes)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("make_keys", [name_keys, number_keys])
def test_targets_and_seeds_are_the_originals_to_the_bit(folder, source, tmp_path, make_keys, world,
                                                        paired):
    keys = make_keys(folder)
    original = write_original(tmp_path / "theirs", keys, (3, 4), world, paired)
    store = importing.import_store(original, tmp_path / "ours", source,
                                   make_settings(paired=paired))
    assert store.missing() == []
    assert store.verify() == []
    assert store.manifest.origin == {"format": "microsoft", "first_epoch": 3}
    listed = image_folder_keys(folder)
    views = store.manifest.views_per_pass
    for number in range(2):
        theirs = read_original(original / f"logits_top{K}_epoch{number + 3}", K)
        image, seed = store.keys(number, 0, views)
        index, prob = store.read(number, 0, views, (image, seed))
        assert len(set(image.tolist())) == views == (38 if paired else 39)
        for row in range(views):
            value = theirs[keys[listed.index(source[int(image[row])].key)]]
            assert seed[row] == np.frombuffer(value, np.int32, 1)[0]
            expected = (np.frombuffer(value, np.int16, K, 4).astype(np.int64),
                        np.frombuffer(value, np.float16, K, 4 + 2 * K).astype(np.float32))
            assert dense_target((index[row], prob[row]), 3).tobytes() == dense_target(
                expected, 3).tobytes()


def test_many_classes_to_the_bit(source, folder, tmp_path):
    """100 of 21,841 classes, with probabilities that tie and vanish in float16."""
    path = write_original(tmp_path, name_keys(folder), (0,), 1, False, classes=21841, top_k=100)
    rank, = microsoft.open_ranks(path / "logits_top100_epoch0", 100)
    seed, index, prob = rank.read(np.arange(rank.lines), 21841)
    raw = np.fromfile(rank.values_file, np.uint8).reshape(-1, 404)
    assert (prob[:, -1] == prob[:, -2]).any()
    assert (prob[:, -1] == 0).any()
    block = codec.encode(index, prob, num_classes=21841, mode="float16")
    stored = [dense_target(pair, 21841) for pair in zip(*codec.decode(block), strict=True)]
    for row in range(rank.lines):
        assert seed[row] == raw[row, :4].view("<i4")[0]
        theirs = raw[row, 4:204].view("<i2"), raw[row, 204:].view("<f2").astype(np.float32)
        assert stored[row].tobytes() == dense_target(theirs, 21841).tobytes()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_pairs_are_lines_that_the_teacher_saw_together(folder, source, tmp_path, world):
    original = write_original(tmp_path / "theirs", name_keys(folder), world=world)
    store = importing.import_store(original, tmp_path / "ours", source, make_settings())
    together = set()
    for path in original.glob("logits_top2_epoch1/*keys.txt"):
        lines = path.read_text().split()
        together |= set(zip(lines[::2], lines[1::2], strict=False))
    image, _ = store.keys(1, 0, store.manifest.views_per_pass)
    names = [Path(source[int(i)].key).stem for i in image]
    assert set(zip(names[::2], names[1::2], strict=True)) <= together


@pytest.mark.parametrize(("world", "paired", "counts"), [
    # 39 images. One rank: the 40th view is the first image again and not written, so the last is
    # alone. Two: 40 views, the last pair is a new image and an old one. Three: 42 views, dealt in
    # pairs, three of them an old image.
    (1, True, {"lines": 39, "duplicates": 0, "unpaired": 1, "views": 38}),
    (2, True, {"lines": 40, "duplicates": 1, "unpaired": 1, "views": 38}),
    (3, True, {"lines": 42, "duplicates": 3, "unpaired": 1, "views": 38}),
    (1, False, {"lines": 39, "duplicates": 0, "unpaired": 0, "views": 39}),
    (2, False, {"lines": 40, "duplicates": 1, "unpaired": 0, "views": 39}),
    (5, False, {"lines": 40, "duplicates": 1, "unpaired": 0, "views": 39}),
])
def test_what_is_left_out_is_counted(folder, source, tmp_path, messages, world, paired, counts):
    original = write_original(tmp_path / "theirs", name_keys(folder), (0,), world, paired)
    importing.import_store(original, tmp_path / "ours", source, make_settings(paired=paired))
    entry, = json.loads((tmp_path / "ours" / "import.json").read_text())
    assert entry == {"epoch": 0, "ranks": world, **counts}
    assert any(f"{counts['duplicates']} left out as duplicates and {counts['unpaired']} for want"
               in m for m in messages)


def test_a_pass_is_the_rank_files_in_the_order_of_their_numbers(folder, source, tmp_path):
    original = write_original(tmp_path / "theirs", name_keys(folder), (0,), 12, False)
    store = importing.import_store(original, tmp_path / "ours", source,
                                   make_settings(paired=False))
    lines = [line for rank in range(12) for line in (
        original / "logits_top2_epoch0" / f"rank{rank}-keys.txt").read_text().split()]
    image, _ = store.keys(0, 0, 39)
    assert [Path(source[int(i)].key).stem for i in image] == list(dict.fromkeys(lines))


def test_a_killed_import_goes_on_where_it_was(folder, source, tmp_path, monkeypatch, messages):
    original = write_original(tmp_path / "theirs", name_keys(folder))
    whole = importing.import_store(original, tmp_path / "a", source, make_settings(processes=2))
    assert len(whole.shards()) == 6
    write, written = stores.Store.write_shard, []

    def die_at_the_fifth(self, shard, contents):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(str(shard))
        write(self, shard, contents)

    monkeypatch.setattr(stores.Store, "write_shard", die_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        importing.import_store(original, tmp_path / "b", source, make_settings())
    assert [e["epoch"] for e in json.loads((tmp_path / "b/import.json").read_text())] == [0]
    again = written.copy()
    written.clear()
    store = importing.import_store(original, tmp_path / "b", source, make_settings())
    assert len(again) == 4
    assert written == [str(s) for s in store.shards()][4:]
    for file in (tmp_path / "a").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    written.clear()
    messages.clear()
    importing.import_store(original, tmp_path / "b", source, make_settings())
    assert written == []
    assert "is complete: 2 passes of 38 views" in messages[-1]


def test_epochs_that_come_later_are_added(folder, source, tmp_path):
    original = write_original(tmp_path / "theirs", name_keys(folder), (5,))
    importing.import_store(original, tmp_path / "ours", source, make_settings())
    before = (tmp_path / "ours/pass-00000/shard-00000.array_record").read_bytes()
    write_original(original, name_keys(folder), (6,))
    store = importing.import_store(original, tmp_path / "ours", source, make_settings())
    assert store.manifest.passes == 2
    assert store.verify() == store.missing() == []
    assert (tmp_path / "ours/pass-00000/shard-00000.array_record").read_bytes() == before
    with pytest.raises(StoreError, match=r"origin.first_epoch is 5 in the store, 4 here"):
        write_original(original, name_keys(folder), (4,))
        importing.import_store(original, tmp_path / "ours", source, make_settings())


def test_training_follows_the_store(tmp_path):
    """A few updates with mixed pairs of the original's views, from the imported store alone."""
    folder = make_images(tmp_path / "images", (11, 11, 11))
    config = make_config(folder, mixed=True)
    config.model.update(tiny.STUDENT)
    original = write_original(tmp_path / "theirs", number_keys(folder))
    data = train.open_data(config)
    store = importing.import_store(original, tmp_path / "ours", data.train, make_settings(folder))
    data = data._replace(order=follow_store(data.order, store))
    assert isinstance(data.order, StoredOrder)
    config.store.update({"path": str(store.path), "capture": False})
    result = recipe.run(config, tmp_path / "run")
    assert result["steps"] == 8
    assert (tmp_path / "run" / "views.png").exists()
    assert np.isfinite(result["loss"])

    spec = augment.make_spec(config.augment, 16)
    views = pickle.loads(pickle.dumps(pipeline.Views(data.train, spec, data.order, store)))
    batch = views.read(np.arange(28, 36))  # across the end of the first pass of 32
    image, seed = (np.concatenate(part) for part in zip(
        store.keys(0, 28, 32), store.keys(1, 0, 4), strict=True))
    for row, (i, s) in enumerate(zip(image, seed, strict=True)):
        example = data.train[int(i)]
        np.testing.assert_array_equal(
            batch["image"][row], augment.replay(example.image, example.key, int(s), spec))
        assert batch["label"][row] == example.label
    lams = [augment.sample_mix(int(a), int(b), spec)[0] for a, b in seed.reshape(-1, 2)]
    np.testing.assert_array_equal(batch["lam"], np.array(lams, np.float32))
    np.testing.assert_array_equal(batch["prob"][:4], store.read(0, 28, 32)[1])


def test_a_run_that_does_not_follow_the_store_is_refused(folder, source, tmp_path):
    original = write_original(tmp_path / "theirs", name_keys(folder), (0,))
    store = importing.import_store(original, tmp_path / "ours", source, make_settings())
    views = pipeline.Views(source, make_settings().spec, Order(0, 38, True), store)
    with pytest.raises(StoreError, match=r"pass 0, shard 0, block 0 .*other views.*follow_store"):
        views.read(np.arange(8))


def test_one_changed_byte_is_named(folder, source, tmp_path):
    original = write_original(tmp_path / "theirs", name_keys(folder), (0,))
    store = importing.import_store(original, tmp_path / "ours", source, make_settings())
    file = tmp_path / "ours/pass-00000/shard-00001.array_record"
    good = bytearray(file.read_bytes())
    at = int(np.flatnonzero(np.frombuffer(good, np.uint8))[-40])
    good[at] ^= 1
    file.write_bytes(good)
    problems = stores.open_store(store.path).verify()
    assert problems
    assert all("pass 0, shard 1" in str(p) for p in problems)


def cut(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def set_value(path: Path, line: int, field: str, place: int, value: float) -> None:
    values = np.fromfile(path, microsoft._item(K))
    if field == "seed":
        values[field][line] = value
    else:
        values[field][line, place] = value
    values.tofile(path)


KEYS, VALUES = "rank1-keys.txt", "rank1-values.bin"


@pytest.mark.parametrize(("damage", "message"), [
    (lambda e: cut(e / VALUES, lambda b: b[:-4]),
     r"rank1-values.bin has 236 bytes: expected 240, that is 4 \+ 4 \* 2 .* 20 lines"),
    (lambda e: cut(e / VALUES, lambda b: b * 2), "expected 240.*K = 5 would fit 480 bytes"),
    (lambda e: cut(e / KEYS, lambda b: b[:-1]), r"rank1-keys.txt, line 20: .*cut short"),
    (lambda e: cut(e / KEYS, lambda b: b.split(b"\n", 1)[1]), "expected 228.*19 lines"),
    (lambda e: cut(e / KEYS, lambda b: b""), "rank1-keys.txt is empty"),
    (lambda e: cut(e / VALUES, lambda b: b""), "rank1-values.bin is empty"),
    (lambda e: cut(e / KEYS, lambda b: b[:-2] + b"\xff\n"),
     r"rank1-keys.txt, line 20: expected a key in UTF-8"),
    (lambda e: cut(e / KEYS, lambda b: b"\0" + b[1:]), r"line 1: expected a key in UTF-8"),
    (lambda e: cut(e / KEYS, lambda b: b"\n" + b[b.index(b"\n") + 1:]), "line 1: .*found one of 0"),
    (lambda e: cut(e / KEYS, lambda b: b"x" * 2000 + b), "line 1: .*1 to 1024 bytes"),
    (lambda e: (e / VALUES).unlink(), "rank1-values.bin is missing"),
    (lambda e: [(e / n).rename(e / n.replace("1", "2")) for n in (KEYS, VALUES)],
     "rank1-keys.txt is missing, and there are files of ranks up to 2"),
    (lambda e: [f.unlink() for f in e.iterdir()], "has no rank0-keys.txt"),
    (lambda e: [(e / n).unlink() for n in (KEYS, VALUES)],
     r"logits_top2_epoch1: 19 of the 39 images .* have no key in it, the first: .*png"),
    (lambda e: cut(e / KEYS, lambda b: b"zebra_1\n" + b[b.index(b"\n") + 1:]),
     r"1 of its 40 keys have no image .*zebra_1 \(.*rank1-keys.txt, line 1\)"),
    (lambda e: cut(e / KEYS, lambda b: (lambda s: b"\n".join([s[0], s[2], *s[2:]]))(
        b.split(b"\n"))), "rank1-keys.txt, line 3: the key of line 2 again"),
    (lambda e: set_value(e / VALUES, 4, "seed", 0, -3), r"line 5: expected a seed .*found -3"),
    (lambda e: set_value(e / VALUES, 4, "index", 1, -3), "line 5: .*above 32,767 classes.*-3"),
    (lambda e: set_value(e / VALUES, 4, "index", 1, 3), "line 5: expected classes below 3.*3"),
    (lambda e: [set_value(e / VALUES, 4, "index", i, 1) for i in range(2)],
     r"line 5: expected no class twice; found \[1 1\]"),
    (lambda e: set_value(e / VALUES, 4, "prob", 1, np.nan), "line 5: expected finite"),
    (lambda e: set_value(e / VALUES, 4, "prob", 1, np.inf), "line 5: expected finite"),
    (lambda e: set_value(e / VALUES, 4, "prob", 1, -1e-3), "line 5: .*0 or more; found -0.001"),
    (lambda e: set_value(e / VALUES, 4, "prob", 1, -0.0), "line 5: .*of 0 or more"),
    (lambda e: set_value(e / VALUES, 4, "prob", 0, 1.002), "line 5: .*at most 1.0004"),
    (lambda e: [set_value(e / VALUES, 4, "prob", i, 0) for i in range(2)],
     "line 5: .*more than 0.*found 0.0"),
])
def test_files_that_cannot_be_are_refused(folder, source, tmp_path, damage, message):
    original = write_original(tmp_path / "theirs", name_keys(folder))
    damage(original / "logits_top2_epoch1")
    with pytest.raises(StoreError, match=message) as error:
        importing.import_store(original, tmp_path / "ours", source, make_settings())
    assert "\n" not in str(error.value)
    assert "logits_top2_epoch1" in str(error.value)


def test_rounding_to_float16_is_no_damage(folder, source, tmp_path):
    original = write_original(tmp_path / "theirs", name_keys(folder))
    path = original / "logits_top2_epoch1" / VALUES
    set_value(path, 4, "prob", 0, 1.0)
    set_value(path, 4, "prob", 1, 4.6e-4)
    store = importing.import_store(original, tmp_path / "ours", source, make_settings())
    expected = np.array([1.0, 4.6e-4]).astype(np.float16)
    assert (store.read(1, 0, 38)[1] == expected).all(1).any()


@pytest.mark.parametrize(("names", "top_k", "message"), [
    ([], 10, "no folder named like logits_top100_epoch0. Give the folder that holds them"),
    (["logits_top2_epoch0", "logits_top2_epoch3"], 2, "but not 1, 2: .*logits_top2_epoch1"),
    (["logits_top2_epoch0", "logits_top3_epoch0"], 10, "K = 2, 3 classes.*store.top_k=K; it is 10"),
])
def test_folders_that_are_no_store_are_explained(tmp_path, names, top_k, message):
    for name in [*names, "logits_topX_epoch0"]:
        (tmp_path / name).mkdir()
    with pytest.raises(StoreError, match=message):
        microsoft.choose_epochs(tmp_path, top_k)


def test_other_ways_to_name_the_folder_are_explained(tmp_path):
    (tmp_path / "logits_top2_epoch0").mkdir()
    with pytest.raises(StoreError, match=f"one epoch itself: give --from={tmp_path}"):
        microsoft.find_epochs(tmp_path / "logits_top2_epoch0")
    with pytest.raises(StoreError, match="does not exist"):
        microsoft.find_epochs(tmp_path / "none")


def test_the_wanted_k_is_chosen(tmp_path):
    for name in ("logits_top2_epoch7", "logits_top3_epoch8", "logits_top3_epoch10",
                 "logits_top3_epoch9"):
        (tmp_path / name).mkdir()
    assert list(microsoft.find_epochs(tmp_path)) == [(2, 7), (3, 8), (3, 9), (3, 10)]
    k, epochs = microsoft.choose_epochs(tmp_path, 3)
    assert (k, list(epochs)) == (3, [8, 9, 10])


def test_passes_of_another_length_are_refused_before_anything_is_written(folder, source, tmp_path):
    """The second epoch was made with other ranks, and one of its pairs is broken by hand."""
    original = write_original(tmp_path / "theirs", name_keys(folder), (0,))
    write_original(original, name_keys(folder), (1,), world=3)
    epoch = original / "logits_top2_epoch1"
    lines = (epoch / "rank0-keys.txt").read_text().split()
    with open(epoch / "rank2-keys.txt", "a") as file:
        file.write(f"{lines[0]}\n")
    with open(epoch / "rank2-values.bin", "ab") as file:
        file.write((epoch / "rank0-values.bin").read_bytes()[:12])
    lines = (epoch / "rank2-keys.txt").read_text().split()
    (epoch / "rank2-keys.txt").write_text("\n".join([lines[-1], *lines[:-1]]) + "\n")
    with pytest.raises(StoreError, match=r"logits_top2_epoch1 gives \d+ views .*store have 38"):
        importing.import_store(original, tmp_path / "ours", source, make_settings())
    assert not (tmp_path / "ours").exists()


def test_other_views_are_refused(tmp_path):
    settings = make_settings()
    other = settings._replace(spec=augment.make_spec(tiny.make_config(Path("x")).augment, 16))
    with pytest.raises(StoreError, match=r"augment.spec=small .*Set --config.augment.spec=micro"):
        importing.import_store(tmp_path, tmp_path / "ours", None, other)


def test_a_full_disk_is_said_before(folder, source, tmp_path, monkeypatch):
    original = write_original(tmp_path / "theirs", name_keys(folder))
    monkeypatch.setattr(place.Folder, "free", lambda self: 10)
    with pytest.raises(OSError, match=r"needs up to [\d,]+ more bytes, and its disk has 10 free"):
        importing.import_store(original, tmp_path / "ours", source, make_settings())


class Named:
    """A source of nothing but keys."""

    name, class_names = "named", ("a", "b")

    def __init__(self, *names: str):
        self.names = names

    def keys(self):
        return np.array([name.encode() for name in self.names])


def test_numbers_count_as_image_folder_does():
    """Classes sorted, then folders, then files: a file before a folder, "a" before "a-b"."""
    sorted_keys = ["a/2.png", "a/z.png", "a/b/1.png", "a/b-c/0.png", "a/b/c/0.png", "a-b/1.png",
                   "a.b/1.png", "ä/1.png"]
    order = [3, 1, 0, 7, 2, 6, 4, 5]
    find = finder.make_finder(Named(*(sorted_keys[i] for i in order)), b"0")
    wanted = np.array([str(i).encode() for i in range(8)])
    assert [order[i] for i in find(wanted)] == list(range(8))
    strange = np.array([b"8", b"-1", b"07", b"1.0", b"x", b"99999999999999", b"1e3", b" 1", b"3"])
    assert find(strange).tolist() == [-1] * 8 + [order.index(3)]


def test_names_are_found_without_folder_and_suffix():
    find = finder.make_finder(Named("n1/n1_2.JPEG", "n1_10.png", "x/y/n2_1.tar.png", "z/plain"),
                              b"n1_2")
    wanted = np.array([b"n1_2", b"n1_10", b"n2_1.tar", b"plain", b"n1", b"n1_2.JPEG", b"zz", b""])
    assert find(wanted).tolist() == [0, 1, 2, 3, -1, -1, -1, -1]


def test_names_and_numbers_that_mean_nothing_are_refused():
    with pytest.raises(images.SourceError, match=r"two images of one name, a/1.png and b/1.jpg"):
        finder.make_finder(Named("a/1.png", "b/1.jpg"), b"n1_2")
    with pytest.raises(images.SourceError, match=r"no names of files \(train_16399\)"):
        finder.make_finder(Named("train_16399", "train_2"), b"0")


def test_sources_list_their_keys(source):
    embedded = images.open_source("embedded", "eval")
    for one in (source, embedded):
        assert one.keys().dtype.kind == "S"
        assert [k.decode() for k in one.keys()[:50]] == [e.key for e in one.read(
            range(min(50, len(one))))]
        assert len(one.keys()) == len(one)


def test_the_tool(folder, tmp_path):
    """As a user types it: the flag that is missing is asked for, then the store is made."""
    original = write_original(tmp_path / "theirs", number_keys(folder), (0,))
    command = [sys.executable, "tools/import_store.py", f"--config=tests/tiny.py:{folder}",
               f"--from={original}", f"--workdir={tmp_path / 'run'}", "--teacher=clip"]
    root = Path(__file__).parents[1]

    def run(*more):
        return subprocess.run([*command, *more], cwd=root, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(root)}, check=False)

    refused = run()
    assert refused.returncode == 1
    assert "--config.augment.spec=microsoft" in refused.stderr
    done = run("--config.augment.spec=microsoft")
    assert done.returncode == 0, done.stderr
    assert "complete, 1 passes of 38 views" in done.stdout
    manifest = stores.open_store(tmp_path / "run/store").manifest
    assert manifest.teacher == {"name": "clip", "weights": ""}
    assert manifest.augment["spec"] == "microsoft"
