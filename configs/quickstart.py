"""A teacher, a distilled student and its label-only twin, in minutes on a laptop CPU.

Data     10,000 + 2,000 images of Fashion-MNIST, shipped inside the package
Command  python -m tinyvit_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
Cost     about four minutes on two cores, 1 MB of store
Result   top-1 over three seeds (README.md): teacher 87.9, distilled 82.5, labels only 81.9

The student learns from a store of the teacher's answers; --config=configs/quickstart.py:live lets
the teacher run beside it instead, softened, and mixes in the labels (not run in full).
"""

from tinyvit_jax import config as configs


def get_config(stage: str = "stored"):
    """The quickstart; every key it does not set is the default of tinyvit_jax/config.py."""
    if stage not in ("stored", "live"):
        raise configs.ConfigError(f"The quickstart has no stage {stage!r}. Write stored or live "
                                  f"behind the file, as in --config=configs/quickstart.py:live.")
    c = configs.default()
    c.data.source = "embedded"
    c.data.mean, c.data.std = (0.286,) * 3, (0.353,) * 3
    c.augment.spec = "small"
    c.augment.pad = 2
    c.augment.rand_augment = ""
    c.augment.color_jitter = 0.0

    # At 32 pixels the stages see maps of 8, 4, 2 and 1 tokens: each is one window.
    shape = {"name": "tiny_vit", "image_size": 32, "depths": (1, 1, 2, 1),
             "window_sizes": (8, 4, 2, 1)}
    c.model.update({**shape, "embed_dims": (16, 32, 64, 96), "num_heads": (1, 2, 4, 6)})
    c.teacher.update({**shape, "embed_dims": (32, 64, 96, 128), "num_heads": (2, 4, 6, 8)})
    c.teacher.epochs = 10
    c.teacher.learning_rate = 3e-3

    c.objective.name = "stored_logits"
    c.store.passes = 5
    c.store.top_k = 10
    c.store.shard_views = 12288
    c.store.capture = True
    if stage == "live":
        c.objective.update({"name": "live_teacher", "alpha": 0.9, "temperature": 2.0})

    c.train.batch_size = 100
    c.train.epochs = 5.0
    c.optim.scale_by_batch = False
    c.optim.learning_rate = 3e-3
    c.optim.warmup_learning_rate = 1e-5
    c.optim.min_learning_rate = 1e-5
    c.optim.warmup_epochs = 1.0
    c.eval.crop_ratio = 1.0
    c.eval.every_epochs = 1.0
    c.checkpoint.every_epochs = 1.0
    c.log_every = 25
    c.label_only_twin = True
    c.export_torch = "student.safetensors"
    return c
