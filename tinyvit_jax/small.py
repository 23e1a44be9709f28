"""Recipes for CIFAR-10, CIFAR-100 and STL-10: the slides', value by value, and two of ours.

The slides are Crainic's "TinyViT: A Small Vision Transformer" (Sapienza, 2024/25): a plain ViT of
1.2 M parameters on labels. They name no learning rate schedule, no strength of the colour jitter
and no patch for 96 pixels: cosine to 0, 0.2 and 12 pixels, which keeps the 64 tokens, are ours.
"""

from typing import NamedTuple

import ml_collections

from tinyvit_jax import config as configs

STAGES = ("modern", "slides", "laptop")


class ImageSet(NamedTuple):
    """What recipes need to know of a set of images.

    Attributes:
        source: where its binary files are looked for, if the command line says nothing else.
        side: of an image in pixels.
        pad: of the slides' crop.
        color_jitter, greyscale: the slides'.
        mean, std: of all pixels of the training images, scaled to [0, 1].
        epochs: of the modern recipe and of the laptop's.
    """

    source: str
    side: int
    pad: int
    color_jitter: float
    greyscale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    epochs: dict[str, float]


SETS = {
    "cifar10": ImageSet(
        "binary:data/cifar-10-batches-bin", 32, 4, 0.0, 0.0, (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616), {"modern": 200.0, "laptop": 10.0}),
    "cifar100": ImageSet(
        "binary:data/cifar-100-binary", 32, 4, 0.0, 0.0, (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762), {"modern": 200.0, "laptop": 10.0}),
    "stl10": ImageSet(
        "binary:data/stl10_binary", 96, 12, 0.2, 0.1, (0.4467, 0.4398, 0.4066),
        (0.2603, 0.2566, 0.2713), {"modern": 600.0, "laptop": 60.0}),
}


def make_config(stage: str, name: str) -> ml_collections.ConfigDict:
    """The config of one recipe for one set.

    Args:
        stage: "modern", "slides" or "laptop".
        name: a key of SETS.
    """
    if stage not in STAGES:
        raise configs.ConfigError(f"This config has no stage {stage!r}. Write one of "
                                  f"{', '.join(STAGES)} behind the file, as in "
                                  f"--config=configs/{name}.py:slides.")
    own = SETS[name]
    c = configs.default()
    c.data.source, c.data.mean, c.data.std = own.source, own.mean, own.std
    c.augment.update({"spec": "small", "pad": own.pad, "rand_augment": "", "erase": 0.0,
                      "color_jitter": own.color_jitter, "greyscale": own.greyscale})
    c.model.image_size = own.side
    c.objective.smoothing = 0.1
    c.optim.update({"scale_by_batch": False, "weight_decay": 0.05})
    c.eval.update({"crop_ratio": 1.0, "batch_size": 500})  # the images as they are
    c.checkpoint.every_epochs = 5.0
    {"modern": _set_modern, "slides": _set_slides, "laptop": _set_laptop}[stage](c, own)
    return c


def _set_slides(c: ml_collections.ConfigDict, own: ImageSet) -> None:
    """The recipe of the slides, "Models Training Setup" and "Parameters"."""
    c.data.resident = True
    c.model.name, c.model.patch_size = "vit_mini_patch4_32", own.side // 8
    c.train.batch_size, c.train.epochs = 64, 100.0
    c.optim.update({"learning_rate": 3e-4, "warmup_epochs": 0.0, "warmup_learning_rate": 3e-4,
                    "min_learning_rate": 0.0, "clip_norm": 0.0})


def _set_modern(c: ml_collections.ConfigDict, own: ImageSet) -> None:
    """TinyViT-5M with what has become usual since DeiT: strong views, mixing, averaged weights."""
    c.model.name, c.model.drop_path = f"tiny_vit_5m_{own.side}", 0.1
    c.augment.update({"rand_augment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "color_jitter": 0.0,
                      "mixup": 0.8, "cutmix": 1.0})
    c.train.batch_size, c.train.epochs = 256, own.epochs["modern"]
    c.optim.update({"learning_rate": 1e-3, "warmup_epochs": 10.0, "warmup_learning_rate": 1e-6,
                    "min_learning_rate": 1e-5, "ema": 0.9995})
    if own.side > 32:  # 5,000 images: smaller batches and more different views of each
        c.augment.update({"spec": "imagenet", "scale": (0.3, 1.0)})
        c.train.batch_size = 128
        c.optim.ema = 0.999


def _set_laptop(c: ml_collections.ConfigDict, own: ImageSet) -> None:
    """The modern model small and short enough for a CPU, with the slides' simple views."""
    c.data.resident = True
    c.model.name = "tiny_vit_1m_32"
    if own.side > 32:
        c.model.stem_strides = (2, 2)
    c.train.batch_size, c.train.epochs = 128, own.epochs["laptop"]
    c.optim.update({"learning_rate": 2e-3, "warmup_epochs": 1.0, "warmup_learning_rate": 1e-5,
                    "min_learning_rate": 1e-5})
