"""TinyViT-5M: the original's stages. 5.4 M parameters, 1.3 G MACs at 224 pixels.

Paper     79.1 % top-1 on ImageNet-1k from scratch, 80.7 % after 22k distillation and fine-tuning
Ours      not run
Stages    22k_distill (default; needs the 22k images and a store of teacher logits) | 22kto1k | 1k
Command   python -m tinyvit_jax.main --config=configs/5m.py:1k --workdir=runs/5m-1k
"""

from tinyvit_jax import stages

DROP_PATH = {"22k_distill": 0.0, "22kto1k": 0.0, "1k": 0.0}


def get_config(stage: str = "22k_distill"):
    """One stage of the recipe; see tinyvit_jax/stages.py for its values."""
    before = {"22kto1k": "runs/5m-22k_distill"}
    return stages.make_config(stage, "tiny_vit_5m_224", DROP_PATH, before.get(stage, ""))
