"""The original's writer and reader, held against the package's own reader of such files."""

import numpy as np
import pytest
from reference import original_logits

from tinyvit_jax.store import microsoft

K, CLASSES = 5, 21841


def make_targets(views: int, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Keys, seeds int32 [n], classes int32 [n, K] and probabilities float32 [n, K]."""
    g = np.random.default_rng(seed)
    index = np.stack([g.choice(CLASSES, K, replace=False) for _ in range(views)]).astype(np.int32)
    prob = -np.sort(-g.dirichlet(np.full(K + 1, 0.5), views)[:, :K], axis=1).astype(np.float32)
    return [f"n{7 * i:08d}_{i}" for i in range(views)], g.integers(
        0, 1 << 31, views).astype(np.int32), index, prob


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with one epoch of two ranks, rows [0, 40) and [40, 70), and what went in."""
    folder = tmp_path_factory.mktemp("original")
    targets = make_targets(70)
    for rank, rows in enumerate((slice(0, 40), slice(40, 70))):
        writer = original_logits.Writer(original_logits.epoch_folder(folder, K, 0), rank)
        writer.write_batch(*(part[rows] for part in targets))
        writer.write_batch(*(part[rows][:3] for part in targets))  # seen already: left out
        writer.close()
    return folder, targets


def test_the_package_reads_what_the_writer_wrote(written):
    folder, (keys, seed, index, prob) = written
    top_k, epochs = microsoft.choose_epochs(folder, K)
    ranks = microsoft.open_ranks(epochs[0], top_k)
    assert [rank.lines for rank in ranks] == [40, 30]
    assert [key.decode() for rank in ranks for key in rank.read_keys()] == keys
    for rank, rows in zip(ranks, (slice(0, 40), slice(40, 70)), strict=True):
        again = rank.read(np.arange(rank.lines), CLASSES)
        np.testing.assert_array_equal(again[0], seed[rows])
        np.testing.assert_array_equal(again[1], index[rows])
        np.testing.assert_array_equal(again[2], prob[rows].astype(np.float16))
    assert ranks[0].values_file.stat().st_size == 40 * original_logits.item_bytes(K)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("order", ["file", "other"])
def test_every_view_comes_back(written, rank, order):
    folder, (keys, seed, index, prob) = written
    views = original_logits.Views(folder, keys, K, rank)
    numbers = np.arange(70) if order == "file" else np.random.default_rng(1).permutation(70)
    for i in numbers:
        one_seed, classes, values = views.read(int(i))
        assert one_seed == seed[i]
        assert (classes.dtype, values.dtype) == (np.int16, np.float16)
        assert classes.flags.writeable
        assert values.flags.writeable
        np.testing.assert_array_equal(classes, index[i])
        np.testing.assert_array_equal(values, prob[i].astype(np.float16))


def test_keys_are_loaded_rank_by_rank_and_again_each_epoch(written):
    folder, (keys, *_) = written
    views = original_logits.Views(folder, keys, K, rank=1)
    views.read(69)
    first = views._open[1]
    assert len(first._places) == 30  # its own rank's alone
    views.read(0)
    assert len(first._places) == 70
    views.set_epoch(0)
    views.read(69)
    assert views._open[1] is not first
    assert len(views._open[1]._places) == 30


def test_a_key_of_nobody(written):
    with pytest.raises(KeyError, match="n99999999_0"):
        original_logits.Views(written[0], ["n99999999_0"], K).read(0)


def test_a_writer_that_fails_is_heard(tmp_path):
    (tmp_path / "taken").write_text("a file where the folder should be")
    writer = original_logits.Writer(tmp_path / "taken", 0)
    with pytest.raises(RuntimeError, match="exit code 1"):
        writer.close()
