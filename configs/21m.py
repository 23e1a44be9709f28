"""TinyViT-21M: the original's stages. 21 M parameters, 4.3 G MACs at 224, 13.8 at 384, 27.0 at 512.

Paper     83.1 % top-1 on ImageNet-1k from scratch, 84.8 % after 22k distillation and fine-tuning,
          86.2 % at 384 pixels, 86.5 % at 512
Ours      not run
Stages    22k_distill (default; needs the 22k images and a store of teacher logits) | 22kto1k | 1k
          | 384 (from 22kto1k) | 512 (from 384)
Memory    384_16gb and 512_16gb are those stages for a single card of 16 GB: the same batch of 1,024
          in more micro-batches (on N cards, --config.train.accumulate of 1/N as many). A run says
          what it needs before its first update; --config.model.remat=True needs less still
Command   python -m tinyvit_jax.main --config=configs/21m.py:1k --workdir=runs/21m-1k
"""

from tinyvit_jax import config as configs
from tinyvit_jax import stages

DROP_PATH = {"22k_distill": 0.1, "22kto1k": 0.1, "1k": 0.2, "384": 0.1, "512": 0.1}
ONE_CARD = {"384": 64, "512": 128}  # micro-batches: of 16 and 8 views


def get_config(stage: str = "22k_distill"):
    """One stage of the recipe; see tinyvit_jax/stages.py for its values."""
    stage, small = stage.removesuffix("_16gb"), stage.endswith("_16gb")
    before = {"22kto1k": "runs/21m-22k_distill", "384": "runs/21m-22kto1k", "512": "runs/21m-384"}
    size = stage if stage in ("384", "512") else "224"
    c = stages.make_config(stage, f"tiny_vit_21m_{size}", DROP_PATH, before.get(stage, ""))
    if small:
        if stage not in ONE_CARD:
            raise configs.ConfigError(f"This config has no stage {stage}_16gb. Write one of "
                                      f"{', '.join(f'{s}_16gb' for s in ONE_CARD)}.")
        c.train.accumulate = ONE_CARD[stage]
    return c
