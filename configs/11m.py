"""TinyViT-11M: the original's stages. 11 M parameters, 2.0 G MACs at 224 pixels.

Paper     81.5 % top-1 on ImageNet-1k from scratch, 83.2 % after 22k distillation and fine-tuning
Ours      not run
Stages    22k_distill (default; needs the 22k images and a store of teacher logits) | 22kto1k | 1k
Command   python -m tinyvit_jax.main --config=configs/11m.py:1k --workdir=runs/11m-1k
"""

from tinyvit_jax import stages

DROP_PATH = {"22k_distill": 0.0, "22kto1k": 0.0, "1k": 0.1}


def get_config(stage: str = "22k_distill"):
    """One stage of the recipe; see tinyvit_jax/stages.py for its values."""
    before = {"22kto1k": "runs/11m-22k_distill"}
    return stages.make_config(stage, "tiny_vit_11m_224", DROP_PATH, before.get(stage, ""))
