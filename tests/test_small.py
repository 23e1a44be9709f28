"""The recipes for small images, value by value, and a few updates of each."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from test_binary import few, make_set  # noqa: F401  (few: the layouts with a few images)

from tinyvit_jax import config as configs
from tinyvit_jax import models, optim, recipe, small
from tinyvit_jax.data import augment

ROOT = Path(__file__).parents[1]
NAMES = ("cifar10", "cifar100", "stl10")
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
}


def load(name, *stage):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*stage)


EVERY = pytest.mark.parametrize(("name", "stage"), [(n, s) for n in NAMES for s in small.STAGES])


def flat(config):
    return {f"{section}.{key}": value for section, values in config.to_dict().items()
            if isinstance(values, dict) for key, value in values.items()}


# What every recipe of a kind sets over tinyvit_jax/config.py, beside the set's own values.
COMMON = {"objective.smoothing": 0.1, "optim.scale_by_batch": False, "optim.weight_decay": 0.05,
          "eval.crop_ratio": 1.0, "eval.batch_size": 500, "checkpoint.every_epochs": 5.0}
SMALL = {"augment.spec": "small", "augment.rand_augment": "", "augment.erase": 0.0}
SLIDES = COMMON | SMALL | {
    "data.resident": True,
    "model.name": "vit_mini_patch4_32", "train.batch_size": 64, "train.epochs": 100.0,
    "optim.learning_rate": 3e-4, "optim.warmup_epochs": 0.0, "optim.warmup_learning_rate": 3e-4,
    "optim.min_learning_rate": 0.0, "optim.clip_norm": 0.0}
MODERN = COMMON | {
    "augment.rand_augment": "rand-m9-mstd0.5-inc1", "augment.erase": 0.25, "augment.mixup": 0.8,
    "augment.cutmix": 1.0, "augment.color_jitter": 0.0, "model.drop_path": 0.1,
    "optim.learning_rate": 1e-3, "optim.warmup_epochs": 10.0, "optim.warmup_learning_rate": 1e-6,
    "optim.min_learning_rate": 1e-5}
LAPTOP = COMMON | SMALL | {
    "data.resident": True,
    "model.name": "tiny_vit_1m_32", "train.batch_size": 128, "optim.learning_rate": 2e-3,
    "optim.warmup_epochs": 1.0, "optim.warmup_learning_rate": 1e-5,
    "optim.min_learning_rate": 1e-5}
CIFAR = {"augment.pad": 4, "augment.color_jitter": 0.0, "augment.greyscale": 0.0,
         "model.image_size": 32}
STL = {"augment.pad": 12, "augment.color_jitter": 0.2, "augment.greyscale": 0.1,
       "model.image_size": 96}
CIFAR_MODERN = {"augment.spec": "small", "model.name": "tiny_vit_5m_32", "train.batch_size": 256,
                "train.epochs": 200.0, "optim.ema": 0.9995}
RECIPES = {
    ("cifar", "slides"): {**SLIDES, **CIFAR, "model.patch_size": 4},
    ("cifar", "modern"): {**CIFAR, **MODERN, **CIFAR_MODERN},
    ("cifar", "laptop"): {**LAPTOP, **CIFAR, "train.epochs": 10.0},
    ("stl", "slides"): {**SLIDES, **STL, "model.patch_size": 12},
    ("stl", "modern"): {**STL, **MODERN, "augment.scale": (0.3, 1.0),
                        "model.name": "tiny_vit_5m_96", "train.batch_size": 128,
                        "train.epochs": 600.0, "optim.ema": 0.999},
    ("stl", "laptop"): {**LAPTOP, **STL, "train.epochs": 60.0, "model.stem_strides": (2, 2)},
}
SOURCES = {"cifar10": "binary:data/cifar-10-batches-bin",
           "cifar100": "binary:data/cifar-100-binary", "stl10": "binary:data/stl10_binary"}


@EVERY
def test_every_value_of_a_recipe(name, stage):
    mean, std = STATISTICS[name]
    wanted = flat(configs.default()) | RECIPES[name.rstrip("0123456789"), stage] | {
        "data.mean": mean, "data.std": std, "data.source": SOURCES[name]}
    found = flat(load(name, stage))
    assert {k: (v, wanted[k]) for k, v in found.items() if v != wanted[k]} == {}


@EVERY
def test_recipes_are_valid(name, stage):
    config = load(name, stage)
    configs.check(config)
    augment.make_spec(config.augment, config.model.image_size)


def test_modern_is_what_one_gets_without_asking():
    for name in NAMES:
        assert load(name).to_dict() == load(name, "modern").to_dict()
    with pytest.raises(configs.ConfigError, match=r"no stage 'fast'.*modern, slides, laptop"
                                                  r".*configs/stl10\.py:slides"):
        load("stl10", "fast")


def test_the_slides_rate_falls_by_a_cosine_from_its_first_update():
    c = load("cifar10", "slides")
    schedule = optim.make_schedule(c.optim, 64, 1000, 10.0)
    assert float(schedule(0)) == float(schedule(1)) == pytest.approx(3e-4)
    assert float(schedule(501)) == pytest.approx(1.5e-4)
    assert float(schedule(1001)) == pytest.approx(0.0, abs=1e-9)


def test_the_slides_views_of_stl():
    spec = augment.make_spec(load("stl10", "slides").augment, 96)
    views = [augment.sample_view(seed, spec).ops for seed in range(500)]
    assert {len(v) for v in views} == {3, 4}
    assert 0.06 < np.mean([len(v) == 4 for v in views]) < 0.14
    factors = [factor for v in views for _, factor in v[:3]]
    assert 0.8 <= min(factors) < 0.81
    assert 1.19 < max(factors) <= 1.2


@pytest.mark.parametrize(("name", "title", "stage"), [
    pytest.param("cifar100", "CIFAR-100", "modern", marks=pytest.mark.slow),
    ("stl10", "STL-10", "slides")])
def test_a_few_updates_from_binary_files(name, title, stage, tmp_path):
    """A whole run, evaluation and report, of a model with one block, or one in each stage."""
    make_set(tmp_path / "set", title)
    c = load(name, stage)
    c.data.update({"source": f"binary:{tmp_path / 'set'}", "threads": 2})
    if stage == "slides":
        c.model.update({"embed_dims": (16,), "depths": (1,), "num_heads": (2,), "mlp_dims": (32,)})
    else:
        c.model.update({"embed_dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1),
                        "num_heads": (1, 1, 1, 1), "stem_strides": (2, 2)})
    c.train.update({"batch_size": 6, "epochs": 1.0})
    c.eval.batch_size = 6
    configs.check(c)
    result = recipe.run(c, tmp_path / "run")
    assert result["steps"] >= 1
    assert np.isfinite(result["loss"])
    made = recipe.run_eval(c, tmp_path / "run")
    assert made["source"] == c.data.source
    card = json.loads((tmp_path / "run" / "model.json").read_text())
    assert tuple(card["mean"]) == STATISTICS[name][0]
    place = tmp_path / "run" / "eval" / "set"
    rows = (place / "classes.csv").read_text().splitlines()
    assert rows[0] == "name,count,precision,recall,f1,top1,top5"
    assert len(rows) == 1 + len(made["per_class"])
    assert (place / "confusion.png").stat().st_size > 10_000


@pytest.mark.parametrize(("name", "tokens"), [("cifar10", 65), ("cifar100", 65), ("stl10", 65)])
def test_the_slides_model_can_be_made(name, tokens):
    c = load(name, "slides")
    model = models.create_model(c.model.name, 10, c.model.image_size, patch_size=c.model.patch_size)
    assert (model.depths, model.embed_dims, model.num_heads) == ((6,), (128,), (8,))
    assert model.variable_shapes()["params"]["pos_embed"].shape == (1, tokens, 128)


@pytest.mark.parametrize("stage", ["modern", "laptop"])
@pytest.mark.parametrize("name", NAMES)
def test_our_models_can_be_made(name, stage):
    c = load(name, stage)
    model = models.create_model(c.model.name, 10, c.model.image_size,
                                stem_strides=tuple(c.model.stem_strides))
    side, maps = c.model.image_size, []
    for strides in (np.prod(model.stem_strides), 2, 2, 2):
        side //= int(strides)
        maps.append(side)
    assert all(m % w == 0 for m, w in zip(maps[1:], model.window_sizes[1:], strict=True))
