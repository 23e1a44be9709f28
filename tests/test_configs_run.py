"""One update of every shipped config, at the smallest shapes its own settings allow."""

import importlib.util
from pathlib import Path

import pytest
import tiny

from tinyvit_jax import config as configs
from tinyvit_jax import recipe

ROOT = Path(__file__).parents[1]
# Every stage once. Slow are those that differ from another by their sizes alone, which are replaced
# here, and runs that train their teacher first, as those of test_recipe.py do.
RUNS = [("5m", "22k_distill"), *(("21m", stage) for stage in ("22kto1k", "1k", "384")),
        *(pytest.param(name, stage, marks=pytest.mark.slow) for name, stage in (
            ("quickstart", None), ("quickstart", "live"), ("teachers", None),
            ("11m", "22k_distill"), ("21m", "22k_distill"), ("21m", "512")))]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images"), images=6, size=40)


@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_one_update(name, stage, folder, tmp_path):
    config = load(name).get_config(*([stage] if stage else []))
    config.data.update({"source": f"folder:{folder}", "eval_source": "", "threads": 2,
                        "train_split": "train", "eval_split": "eval"})
    shape = {"image_size": 32, "embed_dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1),
             "num_heads": (1, 1, 1, 1)}
    config.model.update({**shape, "init_from": ""})
    config.teacher.update({**shape, "epochs": min(config.teacher.epochs, 1), "batch_size": 8})
    if not config.teacher.epochs:
        config.teacher.update({"name": "test_capture:bright", "weights": ""})
    config.store.update({"path": "", "passes": 1, "top_k": 2, "shard_views": 16,
                         "block_views": 8, "capture": True})
    config.train.batch_size = 2 * config.train.accumulate
    config.train.epochs = config.train.batch_size / 17  # one update
    config.eval.batch_size = 8
    configs.check(config)
    result = recipe.run(config, tmp_path)
    assert result["steps"] == 1
    assert result["count"] == 1
    assert result["loss"] > 0
    assert (tmp_path / "views.png").exists()


def test_a_preset_for_one_card_changes_nothing_but_micro_batches():
    get_config = load("21m").get_config
    for stage, views in (("384", 16), ("512", 8)):
        plain, small = get_config(stage), get_config(f"{stage}_16gb")
        assert small.train.batch_size == views * small.train.accumulate
        small.train.accumulate = plain.train.accumulate
        assert small.to_dict() == plain.to_dict()
        configs.check(small)
    with pytest.raises(configs.ConfigError, match=r"1k_16gb\. .*384_16gb, 512_16gb"):
        get_config("1k_16gb")
