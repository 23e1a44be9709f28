"""A whole run at the smallest size: images of three classes, a teacher and a student of seconds."""

import threading
from pathlib import Path

import cv2
import jax
import numpy as np
from jax._src import array

from tinyvit_jax import config as configs
from tinyvit_jax import meter
from tinyvit_jax.data import pipeline

CLASSES = ("blobs", "checks", "stripes")


def draw(name: str, generator: np.random.Generator, size: int) -> np.ndarray:
    """One uint8 [size, size, 3] picture of a class."""
    y, x = np.mgrid[:size, :size]
    period, shift = generator.integers(4, 8), generator.integers(0, 8)
    pattern = {"stripes": (x + shift) // period % 2,
               "checks": ((x + shift) // period + y // period) % 2,
               "blobs": ((x - size / 2) ** 2 + (y - size / 2) ** 2) < (3 + period) ** 2}[name]
    colour = generator.integers(60, 256, 3)
    noise = generator.integers(0, 40, (size, size, 3))
    return np.clip(pattern[..., None] * colour + noise, 0, 255).astype(np.uint8)


# In place of make_config's TinyViT where any student will do: it compiles in a third of the time.
STUDENT = {"name": "resnet", "embed_dims": (8, 16), "depths": (1, 2), "num_heads": (),
           "window_sizes": (), "stem_strides": (1, 1)}


def make_folder(root: Path, images: int = 12, size: int = 24) -> Path:
    """A class-per-folder tree of JPEG and PNG files."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(images):
            picture = draw(name, np.random.default_rng(1000 * label + i), size)
            suffix = ("jpg", "png")[i % 2]
            cv2.imwrite(str(root / name / f"{i:03d}.{suffix}"), picture)
    return root


def make_config(folder: Path, mixed: bool = True):
    """A distillation run over `folder` in a few updates."""
    c = configs.default()
    c.data.source = f"folder:{folder}"
    c.data.threads = 2
    c.augment.spec, c.augment.pad = "small", 2
    if mixed:
        c.augment.mixup, c.augment.cutmix = 0.8, 1.0
    shape = {"name": "tiny_vit", "image_size": 16, "stem_strides": (2, 1), "depths": (1, 1, 1, 1),
             "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2),
             "window_sizes": (4, 4, 4, 4)}
    c.model.update(shape)
    c.model.drop_path = 0.1
    c.teacher.update(shape)
    c.teacher.epochs, c.teacher.batch_size = 2, 8
    c.objective.name = "stored_logits"
    c.store.update({"passes": 2, "top_k": 2, "shard_views": 16, "block_views": 8, "capture": True})
    c.train.batch_size, c.train.epochs = 8, 2.0
    c.eval.batch_size, c.eval.crop_ratio = 8, 1.0
    c.optim.update({"learning_rate": 0.05, "warmup_epochs": 0.5})
    c.log_every = 2
    return c


class Killed(BaseException):
    """What a test raises where the process would die."""


def kill_after(monkeypatch, batches):
    """Makes the stream of training batches die, as the process would, after so many."""
    whole = pipeline.batch_stream

    def stream(source, start=0, **options):
        for number, batch in enumerate(whole(source, start, **options)):
            if isinstance(source, pipeline.TrainBatches) and number == batches:
                raise Killed
            yield batch

    monkeypatch.setattr(pipeline, "batch_stream", stream)


def watch_reads(monkeypatch) -> set[int]:
    """After how many updates of a run this thread reads arrays of a device; fills as it goes."""
    updates, seen = [], set()
    value, asarray, add = array.ArrayImpl._value, np.asarray, meter.Meter.add
    here = threading.get_ident()

    def note(x):
        if threading.get_ident() == here and isinstance(x, jax.Array):
            seen.add(len(updates))

    monkeypatch.setattr(meter.Meter, "add", lambda *a: (updates.append(1), add(*a)))
    monkeypatch.setattr(array.ArrayImpl, "_value",
                        property(lambda x: (note(x), value.fget(x))[1]))
    monkeypatch.setattr(np, "asarray", lambda x, *a, **k: (note(x), asarray(x, *a, **k))[1])
    return seen


def get_config(folder: str):
    """For --config=tests/tiny.py:FOLDER."""
    return make_config(Path(folder))
