"""What the statistics of a store say is what its targets are."""

import json

import cv2
import numpy as np
import pytest
from test_edit import Images, make_manifest, make_store, read_views, targets

from tinyvit_jax import plots
from tinyvit_jax.store import blocks, edit, stats
from tinyvit_jax.store import store as stores
from tinyvit_jax.store.manifest import StoreError


@pytest.fixture
def source():
    return Images(range(45))


def test_everything_of_a_small_store(source, tmp_path):
    store = make_store(tmp_path / "a", source)
    found = stats.compute(store, source)
    assert found["views"] == 90
    seen = [read_views(store, p) for p in range(2)]
    seed = np.array([s for views in seen for _, s in views])
    label = np.array([i % 20 for views in seen for i, _ in views])
    index, prob = targets(seed)
    assert [k["k"] for k in found["kept"]] == [1, 2, 3]
    for k in found["kept"]:
        mass = prob[:, :k["k"]].sum(1, dtype=np.float64)
        assert k["mean"] == pytest.approx(mass.mean(), rel=1e-5)
        assert k["q25"] == pytest.approx(np.quantile(mass, 0.25), rel=1e-5)
    dense = np.repeat((1 - prob.sum(1, dtype=np.float64)) / 17, 20).reshape(90, 20)
    np.put_along_axis(dense, index.astype(int), prob, 1)
    entropy = -(dense * np.log(dense)).sum(1)
    assert found["entropy"]["mean"] == pytest.approx(entropy.mean(), rel=1e-5)
    assert found["entropy"]["q95"] == pytest.approx(np.quantile(entropy, 0.95), rel=1e-5)
    assert sum(found["entropy"]["histogram"]["views"]) == 90
    assert found["agreement"]["top1"] == pytest.approx((index[:, 0] == label).mean(), rel=1e-5)
    assert found["agreement"]["topk"] == pytest.approx((index == label[:, None]).any(1).mean(),
                                                       rel=1e-5)
    assert [p["pass"] for p in found["agreement"]["by_pass"]] == [0, 1]
    counts = np.bincount(index[:, 0], minlength=20)
    assert found["classes"]["never_on_top"] == (counts == 0).sum()
    assert found["classes"]["never_in_top_k"] == 20 - len(np.unique(index))
    assert found["classes"]["most_frequent"][0] == {
        "name": f"class {counts.argmax()}", "share": pytest.approx(counts.max() / 90, rel=1e-5)}
    assert found["shards"] == {"there": 6, "missing": 0}
    assert json.loads(json.dumps(found)) == found


def test_either_label_of_a_mixed_pair_counts(source, tmp_path):
    store = make_store(tmp_path / "a", source, mixed=True, passes=1)
    agreement = stats.compute(store, source)["agreement"]
    views = read_views(store, 0)
    top = targets(np.array([s for _, s in views]))[0][:, 0]
    right = [top[i] in (views[i][0] % 20, views[i ^ 1][0] % 20) for i in range(len(views))]
    assert agreement["top1"] == pytest.approx(np.mean(right), rel=1e-5)
    assert agreement["rule"] == "either label of a mixed pair"


def test_bytes_add_up_to_the_files(tmp_path):
    source = Images(range(2000))
    store = make_store(tmp_path / "a", source, passes=1, shard_views=1024, block_views=256)
    found = stats.compute(store)["bytes"]
    assert found["a_view"] == pytest.approx(store.bytes_per_view(), rel=1e-5)
    parts = sum(found[k] for k in ("values", "keys", "padding", "sidecars"))
    assert parts == pytest.approx(found["a_view"], rel=1e-4)
    assert 5 < found["values"] < 20  # three classes of 20, float16
    assert found["keys"] == pytest.approx(1 / 8 + 8 / 256)
    assert found["padding"] > 40  # files of 1,024 views are little else


def test_keys_of_an_edited_store_are_counted(source, tmp_path):
    whole = make_store(tmp_path / "a", source)
    cut = edit.subset(whole, tmp_path / "b", passes=[1])
    plain, stored = (stats.compute(s)["bytes"]["keys"] for s in (whole, cut))
    assert plain == pytest.approx(1 / 8 + 8 / 4)
    assert stored == pytest.approx(blocks.key_bytes(cut.manifest) + 8 / 4)
    assert stats.compute(cut)["views"] == 45


def test_a_sample_is_of_whole_blocks_of_every_pass(tmp_path, monkeypatch):
    source = Images(range(400))
    store = make_store(tmp_path / "a", source, passes=3)
    asked = []
    read = stores.Store.read
    monkeypatch.setattr(stores.Store, "read", lambda s, p, a, b, keys=None: (
        asked.append((p, a, b)), read(s, p, a, b, keys))[1])
    assert stats.compute(store, views=60)["views"] == 60
    assert [p for p, _, _ in asked] == [0] * 5 + [1] * 5 + [2] * 5
    assert all(a % 4 == 0 and b == a + 4 for _, a, b in asked)
    first = list(asked)
    asked.clear()
    stats.compute(store, views=60)
    assert asked == first
    asked.clear()
    stats.compute(store, views=60, seed=1)
    assert asked != first


def test_a_sample_is_filled_from_the_passes_that_have_more(tmp_path):
    """Asked for 300 views of 16 and 400, it has all of the one and the rest of the other."""
    store = make_store(tmp_path / "a", Images(range(400)))
    for shard in store.shards()[1:25]:
        (store.path / f"{shard.name}.array_record").unlink()
    assert stats.compute(store, views=300)["views"] == 300
    assert stats.compute(store, views=10_000)["views"] == 416
    assert stats.compute(store, views=1)["views"] == 8


def test_a_store_that_is_not_whole(source, tmp_path):
    store = make_store(tmp_path / "a", source)
    for shard in store.shards()[2:5]:
        (store.path / f"{shard.name}.array_record").unlink()
    found = stats.compute(store)
    assert found["shards"] == {"there": 3, "missing": 3}
    assert found["agreement"] is None
    assert found["views"] == 45
    with pytest.raises(StoreError, match="are not those of synthetic"):
        stats.compute(store, Images(range(44)))
    with pytest.raises(StoreError, match="has no shard yet"):
        stats.compute(stores.create_store(tmp_path / "b", make_manifest(source)))


def test_entropy_of_the_tails():
    prob = np.array([[0.5, 0.25], [1.0, 0.0], [0.25, 0.25]], np.float32)
    spread = stats.measure_entropy(prob, 4)
    np.testing.assert_allclose(spread, [
        0.5 * np.log(2) + 0.25 * np.log(4) + 0.25 * np.log(8), 0, np.log(4)], atol=1e-12)
    none = stats.measure_entropy(prob, 4, "none")
    third = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    np.testing.assert_allclose(none, [third, 0, np.log(2)], atol=1e-12)
    everything = np.array([[0.5, 0.3, 0.2]], np.float32)
    np.testing.assert_allclose(stats.measure_entropy(everything, 3), [1.0296530140645737],
                               rtol=1e-6)
    rounded = everything.astype(np.float16).astype(np.float64) * [1, 1, 0.99]
    np.testing.assert_allclose(stats.measure_entropy(rounded, 3),
                               -(rounded * np.log(rounded)).sum(1))


def test_the_kept_mass_is_told_for_round_numbers():
    prob = np.full((3, 120), 1 / 240, np.float32)
    kept = stats.measure_kept(prob)
    assert [k["k"] for k in kept] == [1, 2, 3, 5, 10, 20, 50, 100, 120]
    assert kept[-1]["mean"] == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("labelled", [True, False])
def test_the_table_and_the_picture(source, tmp_path, labelled):
    store = make_store(tmp_path / "a", source)
    found = stats.compute(store, source if labelled else None)
    table = stats.format_table(found)
    for words in ("2 passes of 45 views", "kept by top 3", "entropy, nats", "bytes a view"):
        assert words in table
    assert ("top class is the image's label" in table) == labelled
    plots.plot_stats(found, tmp_path / "stats.png")
    picture = cv2.imread(str(tmp_path / "stats.png")).astype(int)
    assert picture.shape[1] > 1.3 * picture.shape[0]
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    panels = [picture[y:y + height, x:x + width] for y in (0, height) for x in (0, width)]
    # What each panel draws its values with; the entropy's bars are translucent.
    assert [has_colour(panel, *drawn) for panel, drawn in zip(panels, (
        ("1f5fa8", 1), ("d1732f", 0.8), ("3f8f58", 1), ("8a4f9e", 1)), strict=True)] == [
            True, True, labelled, True]


def has_colour(panel, colour, opacity):
    """Whether some pixels of a BGR picture have a colour over white."""
    wanted = opacity * np.array([*bytes.fromhex(colour)][::-1]) + (1 - opacity) * 255
    return (abs(panel - wanted).max(-1) < 6).sum() > 20
