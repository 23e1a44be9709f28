"""The eleven recipes against the original's configuration files, value by value.

`ORIGINAL` is what configs/*/tiny_vit_*.yaml of microsoft/Cream set over the defaults of its
config.py; what the values then mean (schedule, factors, masks) is worked out here once more, from
the original's rules and on its own key names.
"""

import importlib.util
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvit_jax import config as configs
from tinyvit_jax import models, optim, stages, train
from tinyvit_jax.convert import tinyvit

ROOT = Path(__file__).parents[1]

DEFAULTS = {"EPOCHS": 300, "WARMUP_EPOCHS": 20, "WEIGHT_DECAY": 0.05, "BASE_LR": 5e-4,
            "WARMUP_LR": 5e-7, "MIN_LR": 5e-6, "LAYER_LR_DECAY": 1.0,
            "EVAL_BN_WHEN_TRAINING": False, "MIXUP": 0.8, "CUTMIX": 1.0, "TEST_CROP": True,
            "IMG_SIZE": 224, "GPUS": 8, "BATCH_SIZE": 128, "ACCUMULATION_STEPS": 1}
UNMIXED = {"MIXUP": 0.0, "CUTMIX": 0.0}
DISTILL = {"EPOCHS": 90, "WARMUP_EPOCHS": 5, "BASE_LR": 2.5e-4, "WEIGHT_DECAY": 0.01, "GPUS": 32,
           **UNMIXED}
TO_1K = {"EPOCHS": 30, "WARMUP_EPOCHS": 5, "BASE_LR": 2.5e-4, "WEIGHT_DECAY": 1e-8, "MIN_LR": 1e-5,
         "LAYER_LR_DECAY": 0.8, "EVAL_BN_WHEN_TRAINING": True, **UNMIXED}
LARGER = {"EPOCHS": 30, "WARMUP_EPOCHS": 5, "WEIGHT_DECAY": 1e-8, "BASE_LR": 2e-5,
          "WARMUP_LR": 2e-8, "MIN_LR": 2e-7, "EVAL_BN_WHEN_TRAINING": True, "TEST_CROP": False,
          "BATCH_SIZE": 32, "ACCUMULATION_STEPS": 4, **UNMIXED}
SHAPES = {"5m": ((64, 128, 160, 320), (2, 4, 5, 10)), "11m": ((64, 128, 256, 448), (2, 4, 8, 14)),
          "21m": ((96, 192, 384, 576), (3, 6, 12, 18))}
ORIGINAL = {
    ("5m", "1k"): {"DROP_PATH_RATE": 0.0},
    ("11m", "1k"): {"DROP_PATH_RATE": 0.1},
    ("21m", "1k"): {"DROP_PATH_RATE": 0.2},
    ("5m", "22k_distill"): {"DROP_PATH_RATE": 0.0, **DISTILL},
    ("11m", "22k_distill"): {"DROP_PATH_RATE": 0.0, **DISTILL},
    ("21m", "22k_distill"): {"DROP_PATH_RATE": 0.1, **DISTILL},
    ("5m", "22kto1k"): {"DROP_PATH_RATE": 0.0, **TO_1K},
    ("11m", "22kto1k"): {"DROP_PATH_RATE": 0.0, **TO_1K},
    ("21m", "22kto1k"): {"DROP_PATH_RATE": 0.1, **TO_1K},
    ("21m", "384"): {"DROP_PATH_RATE": 0.1, "IMG_SIZE": 384, **LARGER},
    ("21m", "512"): {"DROP_PATH_RATE": 0.1, "IMG_SIZE": 512, **LARGER},
}
WINDOWS = {224: (7, 7, 14, 7), 384: (12, 12, 24, 12), 512: (16, 16, 32, 16)}
IMAGES = {"22k_distill": 14_197_086}  # of ImageNet-22k; ImageNet-1k else


def load(name, stage):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(stage)


@pytest.fixture(params=ORIGINAL, ids="-".join)
def recipe(request):
    """(config, the original's values) of each recipe."""
    name, stage = request.param
    return load(name, stage), DEFAULTS | ORIGINAL[request.param] | {"NAME": name, "STAGE": stage}


def global_batch(o):
    return o["BATCH_SIZE"] * o["GPUS"] * o["ACCUMULATION_STEPS"]


def test_there_are_eleven_recipes():
    files = {path.stem for path in (ROOT / "configs").glob("*m.py")}
    assert files == {name for name, _ in ORIGINAL}
    assert len(ORIGINAL) == 11
    for name in files:
        with pytest.raises(configs.ConfigError, match="has no stage"):
            load(name, "nothing")


def test_training_values(recipe):
    c, o = recipe
    assert c.train.epochs == o["EPOCHS"]
    assert c.train.batch_size == global_batch(o)
    assert c.train.batch_size // c.train.accumulate == o["BATCH_SIZE"] * o["GPUS"]
    assert c.train.batch_size == {"22k_distill": 4096}.get(o["STAGE"], 1024)
    assert c.optim.weight_decay == o["WEIGHT_DECAY"]
    assert c.optim.clip_norm == 5.0
    assert (*c.optim.betas, c.optim.eps) == (0.9, 0.999, 1e-8)
    assert c.optim.layer_decay == o["LAYER_LR_DECAY"]
    assert c.optim.ema == 0
    assert c.objective.smoothing == 0.1
    assert c.objective.name == ("stored_logits" if o["STAGE"] == "22k_distill" else "supervised")
    assert c.model.freeze_norm == o["EVAL_BN_WHEN_TRAINING"]
    assert c.model.trainable == "all"
    if o["STAGE"] == "22k_distill":
        assert (c.store.passes, c.store.top_k) == (90, 100)
        assert c.teacher.name == "clip_vit_large14_224"


def test_augmentation_and_evaluation_values(recipe):
    c, o = recipe
    a = c.augment
    assert (a.mixup, a.cutmix, a.mix_prob, a.mix_switch) == (o["MIXUP"], o["CUTMIX"], 1.0, 0.5)
    assert a.rand_augment == "rand-m9-mstd0.5-inc1"
    assert (a.spec, a.erase, a.flip, a.color_jitter) == ("imagenet", 0.25, 0.5, 0.4)
    assert (*a.scale, *a.ratio) == (0.08, 1.0, 3 / 4, 4 / 3)
    assert c.data.mean == (0.485, 0.456, 0.406)
    assert c.data.std == (0.229, 0.224, 0.225)
    assert c.eval.crop == ("center" if o["TEST_CROP"] else "square")
    if o["TEST_CROP"]:
        assert int(o["IMG_SIZE"] / c.eval.crop_ratio) == int(256 / 224 * o["IMG_SIZE"])


def test_models(recipe):
    c, o = recipe
    model = models.create_model(c.model.name, 1000, c.model.image_size,
                                drop_path=c.model.drop_path)
    dims, heads = SHAPES[o["NAME"]]
    assert (model.embed_dims, model.num_heads, model.depths) == (dims, heads, (2, 2, 6, 2))
    assert model.image_size == o["IMG_SIZE"]
    assert model.window_sizes == WINDOWS[o["IMG_SIZE"]]
    rates = [stage.drop_path for stage in model.bind({}).layers]
    assert np.concatenate(rates) == pytest.approx(
        [o["DROP_PATH_RATE"] * i / 11 for i in range(12)])


def rate_of_the_original(o, update, steps, per_epoch):
    """Its scaled rates through timm's cosine schedule, which is set after each update."""
    scale = o["BATCH_SIZE"] * o["GPUS"] / 512.0 * o["ACCUMULATION_STEPS"]
    base, start, low = (scale * o[key] for key in ("BASE_LR", "WARMUP_LR", "MIN_LR"))
    warmup = int(o["WARMUP_EPOCHS"] * per_epoch)
    t = max(update - 1, 0)
    if t < warmup:
        return start + t * (base - start) / warmup
    return low + 0.5 * (base - low) * (1 + math.cos(math.pi * t / steps))


def test_learning_rates(recipe):
    c, o = recipe
    images = IMAGES.get(o["STAGE"], 1_281_167)
    steps, per_epoch = train.count_steps(c, images)
    # The original drops an epoch's last, smaller batch; ours go on across the boundary.
    assert steps == pytest.approx(o["EPOCHS"] * (images // global_batch(o)), rel=1e-3)
    schedule = optim.make_schedule(c.optim, c.train.batch_size, steps, per_epoch)
    warmup = int(o["WARMUP_EPOCHS"] * per_epoch)
    for update in (0, 1, 2, warmup // 2, warmup, warmup + 1, warmup + 2, steps // 2, steps - 1):
        expected = rate_of_the_original(o, update, steps, per_epoch)
        assert float(schedule(jnp.asarray(update))) == pytest.approx(expected, rel=2e-5), update
    peak = max(float(schedule(jnp.asarray(u))) for u in (warmup, warmup + 1, warmup + 2))
    # The cosine is not shifted: when the warmup ends it has already run for as long.
    assert peak < o["BASE_LR"] * c.train.batch_size / 512


def factor_of_the_original(key, decay):
    """The factor by which it multiplies a parameter's rate, by its own name."""
    ends = np.cumsum((0, 2, 2, 6, 2))
    found = re.match(r"layers\.(\d)\.(?:blocks\.(\d)|(downsample))", key)
    if key.startswith("patch_embed."):
        block = 0
    elif found:
        stage = int(found[1])
        block = ends[stage + 1] - 1 if found[3] else ends[stage] + int(found[2])
    else:
        block = 11
    return decay ** (11 - block)


def test_layer_decay_and_weight_decay_of_every_parameter(recipe):
    c, o = recipe
    params = models.create_model(c.model.name, 1000).variable_shapes()["params"]
    scales = dict(jax.tree_util.tree_leaves_with_path(
        optim.layer_scales(params, c.optim.layer_decay, (2, 2, 6, 2))))
    decayed = dict(jax.tree_util.tree_leaves_with_path(optim.decay_mask(params)))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert len(leaves) == len(scales) == len(decayed) > 150
    for path, leaf in leaves:
        key = tinyvit.torch_key(("params", *(part.key for part in path)), "microsoft")
        assert scales[path] == pytest.approx(factor_of_the_original(key, o["LAYER_LR_DECAY"])), key
        spared = len(leaf.shape) == 1 or key.endswith(".bias") or "attention_biases" in key
        assert decayed[path] == (not spared), key


def test_stage_names_are_those_of_the_table():
    assert set(stages._TABLE) == {stage for _, stage in ORIGINAL}
