import importlib.util
from pathlib import Path

import pytest

from tinyvit_jax import config as configs

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
    for stage in getattr(module, "STAGES", getattr(module, "DROP_PATH", {None: 0})):
        config = module.get_config(stage) if stage else module.get_config()
        config.model.init_from = config.model.init_from or "weights.pth"  # finetune needs some
        assert isinstance(config, type(configs.default()))
        configs.check(config)
        assert set(config.keys()) == set(configs.default().keys())


def test_unknown_stage_names_the_stages():
    with pytest.raises(configs.ConfigError, match="22k_distill, 22kto1k, 1k"):
        load(ROOT / "configs" / "5m.py").get_config("384")


def test_the_quickstart_has_two_stages():
    get_config = load(ROOT / "configs" / "quickstart.py").get_config
    stored, live = get_config().to_dict(), get_config("live").to_dict()
    configs.check(get_config("live"))
    assert (stored.pop("objective")["name"], live.pop("objective")["name"]) == (
        "stored_logits", "live_teacher")
    assert stored == live
    with pytest.raises(configs.ConfigError, match=r"no stage 'alive'\. Write stored or live"):
        get_config("alive")


def test_finetune_asks_for_weights():
    module = load(ROOT / "configs" / "finetune.py")
    configs.check(module.get_config("frozen"))
    c = module.get_config()
    configs.check(c)  # as evaluating a run needs no more; training asks for model.init_from
    c.model.name = "tiny_vit_5m_224"
    with pytest.raises(configs.ConfigError, match=r"--config\.data\.mean=\(\).*model\.init_from"):
        configs.check(c)
    c = configs.default()
    for key, value in (("trainable", "head"), ("class_names", "names.txt")):
        c.model[key] = value
        with pytest.raises(configs.ConfigError, match=f"--config.model.{key}={value}"):
            configs.check(c)
        c.model[key] = configs.default().model[key]
    with pytest.raises(configs.ConfigError, match="Write decay or frozen"):
        module.get_config("thawed")


@pytest.mark.parametrize(("key", "value"), [
    ("objective.name", "magic"), ("augment.spec", "huge"), ("train.batch_size", 0),
    ("train.accumulate", 3), ("augment.erase", 1.5), ("model.dtype", "float64"),
    ("store.block_views", 3), ("store.shard_views", 300), ("optim.learning_rate", 0.0),
    ("eval.crop", "round"), ("optim.layer_decay", 0.0), ("augment.mixup", -1.0),
    ("augment.greyscale", 2.0),
])
def test_what_cannot_work_is_named(key, value):
    c = configs.default()
    section, _, name = key.partition(".")
    c[section][name] = value
    with pytest.raises(configs.ConfigError, match=f"--config.{section}|train.batch_size"):
        configs.check(c)


def test_settings_that_exclude_one_another():
    c = configs.default()
    c.objective.update({"name": "live_teacher", "kind": "hard"})
    c.compare.temperatures = (1.0, 4.0)
    with pytest.raises(configs.ConfigError, match=r"compare\.temperatures=\(1\.0, 4\.0\).*hard"):
        configs.check(c)
    c.compare.temperatures, c.objective.temperature = (), 2.0
    with pytest.raises(configs.ConfigError, match=r"objective\.temperature=2\.0 cannot work.*hard"):
        configs.check(c)
    c.objective.update({"kind": "soft"})
    c.data.resident = True
    with pytest.raises(configs.ConfigError, match=r"data\.resident=True.*name=live_teacher: a"):
        configs.check(c)
