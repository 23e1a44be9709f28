"""Fine-tunes any weights of TinyViT on images of one's own, with a new head, at any size.

Command  python -m tinyvit_jax.main --config=configs/finetune.py \\
             --config.data.source=folder:/my/photos --config.model.init_from=tiny_vit_5m.pth
Trunk    :decay (default) learns everywhere, each block at 0.8 of the rate of the one behind it;
         :frozen trains the head alone, much faster, for very few images
Weights  Microsoft's, timm's or ours; shape and windows are read off them, model.image_size changes
         the size
Result   top-1 before and after in result.json; examples with figures in README.md
"""

from tinyvit_jax import config as configs


def get_config(trunk: str = "decay"):
    """Fine-tuning for sets of some hundred to some ten thousand images."""
    if trunk not in ("decay", "frozen"):
        raise configs.ConfigError(f"This config has no variant {trunk!r}. Write decay or frozen "
                                  f"behind the file, as in --config=configs/finetune.py:frozen.")
    c = configs.default()
    c.data.source = ""  # to be given: folder:/path, pack:/path, tfds:name
    c.model.name = ""  # as the weights are
    c.data.mean = c.data.std = ()  # as the weights' images were
    c.model.freeze_norm = True  # small batches would spoil the statistics
    c.augment.mixup = c.augment.cutmix = 0.0
    c.train.batch_size, c.train.epochs = 32, 20.0
    c.optim.scale_by_batch = False
    c.optim.warmup_epochs, c.optim.weight_decay = 1.0, 1e-8
    c.optim.warmup_learning_rate = c.optim.min_learning_rate = 1e-6
    if trunk == "frozen":
        c.model.trainable, c.optim.learning_rate = "head", 5e-3
    else:
        c.optim.layer_decay, c.optim.learning_rate = 0.8, 5e-4
    c.eval.batch_size = 64
    c.log_every = 10
    return c
