import importlib.util
from pathlib import Path

import pytest

from tinyvit_jax import config as configs
from tinyvit_jax import stages

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_default_is_valid():
    configs.check(configs.default())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(path):
    module = load(path)
    for stage in getattr(module, "DROP_PATH", {None: 0}):
        config = module.get_config(stage) if stage else module.get_config()
        assert isinstance(config, type(configs.default()))
        configs.check(config)
        assert set(config.keys()) == set(configs.default().keys())


def test_unknown_stage_names_the_stages():
    with pytest.raises(configs.ConfigError, match="22k_distill, 22kto1k, 1k"):
        load(ROOT / "configs" / "5m.py").get_config("384")


@pytest.mark.parametrize(("stage", "rates", "batch", "accumulate", "epochs"), [
    ("22k_distill", (2.5e-4, 5e-7, 5e-6, 0.01), 4096, 1, 90),
    ("22kto1k", (2.5e-4, 5e-7, 1e-5, 1e-8), 1024, 1, 30),
    ("1k", (5e-4, 5e-7, 5e-6, 0.05), 1024, 1, 300),
    ("384", (2e-5, 2e-8, 2e-7, 1e-8), 1024, 4, 30),
    ("512", (2e-5, 2e-8, 2e-7, 1e-8), 1024, 4, 30),
])
def test_stages_hold_the_original_values(stage, rates, batch, accumulate, epochs):
    c = stages.make_config(stage, "tiny_vit_21m_224", {stage: 0.1})
    p = c.optim
    found = (p.learning_rate, p.warmup_learning_rate, p.min_learning_rate, p.weight_decay)
    assert found == rates
    assert (c.train.batch_size, c.train.accumulate, c.train.epochs) == (batch, accumulate, epochs)
    assert c.optim.warmup_epochs == (20 if stage == "1k" else 5)
    assert c.optim.layer_decay == (0.8 if stage == "22kto1k" else 1.0)
    assert c.model.freeze_norm == (stage in ("22kto1k", "384", "512"))
    assert (c.augment.mixup, c.augment.cutmix) == ((0.8, 1.0) if stage == "1k" else (0, 0))
    assert c.eval.crop == ("square" if stage in ("384", "512") else "center")
    assert c.model.drop_path == 0.1


@pytest.mark.parametrize(("key", "value"), [
    ("objective.name", "magic"), ("augment.spec", "huge"), ("train.batch_size", 0),
    ("train.accumulate", 3), ("augment.erase", 1.5), ("model.dtype", "float64"),
    ("store.block_views", 3), ("store.shard_views", 300), ("optim.learning_rate", 0.0),
    ("eval.crop", "round"), ("optim.layer_decay", 0.0), ("augment.mixup", -1.0),
])
def test_what_cannot_work_is_named(key, value):
    c = configs.default()
    section, _, name = key.partition(".")
    c[section][name] = value
    with pytest.raises(configs.ConfigError, match=f"--config.{section}|train.batch_size"):
        configs.check(c)
