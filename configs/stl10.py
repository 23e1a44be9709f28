"""STL-10: 5,000 + 8,000 images of 96 pixels in 10 classes. Labels alone, no pretraining.

Stages    modern (default)  TinyViT-5M at 96 pixels, random crops, RandAugment, mixing, averaged
                            weights, 600 epochs
          slides            the slides' ViT at patch 12, AdamW 3e-4, batch 64, 100 epochs
          laptop            TinyViT of 1.3 M parameters, 60 epochs, for a CPU
Slides    top-1 64.27, macro F1 64.30, precision 66.13, recall 64.27, MCC 60.47
Ours      not run; mean and std of the pixels are those that others publish
Expected  slides as theirs; modern over 75, a guess
Cost      multiply-adds of the training, forward three times: modern 8.2e15, slides 1.3e14, laptop
          5.5e13
Data      tar xf stl10_binary.tar.gz -C data, from cs.stanford.edu/~acoates/stl10; or
          --config.data.source=folder:/path or tfds:stl10. Images without labels are not read
Command   python -m tinyvit_jax.main --config=configs/stl10.py:slides \\
              --workdir=runs/stl10-slides
"""

from tinyvit_jax import small

STAGES = small.STAGES


def get_config(stage: str = "modern"):
    """One recipe; see tinyvit_jax/small.py for its values."""
    return small.make_config(stage, "stl10")
