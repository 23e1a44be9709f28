"""The training stages of the original's recipes, value by value (microsoft/Cream, TinyViT/configs).

Rates are the original's, before its scaling by global batch / 512.
"""

import ml_collections

from tinyvit_jax import config as configs

_FIELDS = ("epochs", "warmup_epochs", "learning_rate", "warmup_learning_rate", "min_learning_rate",
           "weight_decay", "batch_size", "accumulate")
_TABLE = {
    "22k_distill": (90.0, 5.0, 2.5e-4, 5e-7, 5e-6, 0.01, 4096, 1),
    "22kto1k": (30.0, 5.0, 2.5e-4, 5e-7, 1e-5, 1e-8, 1024, 1),
    "1k": (300.0, 20.0, 5e-4, 5e-7, 5e-6, 0.05, 1024, 1),
    "384": (30.0, 5.0, 2e-5, 2e-8, 2e-7, 1e-8, 1024, 4),
    "512": (30.0, 5.0, 2e-5, 2e-8, 2e-7, 1e-8, 1024, 4),
}


def make_config(stage: str, variant: str, drop_path: dict[str, float], init_from: str = ""
                ) -> ml_collections.ConfigDict:
    """The config of one stage for one variant.

    Args:
        stage: one of those that drop_path names.
        variant: a name of tinyvit_jax.models.VARIANTS.
        drop_path: the variant's rate in each stage that it has.
        init_from: the workdir or file of the stage before.
    """
    if stage not in drop_path:
        raise configs.ConfigError(f"This config has no stage {stage!r}. Write one of "
                                  f"{', '.join(drop_path)} behind the file, as in "
                                  f"--config=configs/21m.py:22kto1k.")
    c = configs.default()
    values = dict(zip(_FIELDS, _TABLE[stage], strict=True))
    c.train.update({k: values.pop(k) for k in ("epochs", "batch_size", "accumulate")})
    c.optim.update(values)
    c.model.name, c.model.drop_path, c.model.init_from = variant, drop_path[stage], init_from
    c.model.dtype = "bfloat16"
    c.data.source = "tfds:imagenet2012"
    if stage == "22k_distill":
        # Teacher and student see the same views: RandAugment and erasing, no mixing.
        c.data.source, c.data.eval_source = "pack:data/imagenet22k", "tfds:imagenet2012"
        c.objective.name = "stored_logits"
        c.store.update({"path": "data/imagenet22k_store", "passes": 90, "top_k": 100})
        c.teacher.update({"name": "clip_vit_large14_224", "dtype": "bfloat16",
                          "weights": "data/clip_vit_large_patch14_22k.pth"})
    elif stage == "22kto1k":
        c.optim.layer_decay, c.model.freeze_norm = 0.8, True
    elif stage == "1k":
        c.augment.mixup, c.augment.cutmix = 0.8, 1.0
    else:
        c.model.freeze_norm = True
        c.eval.crop = "square"
    return c
