"""How far our models are from timm's own classes, on random weights.

python tools/reference/check_timm.py deit_tiny_patch16_224 resnet50 regnety_160 convnextv2_tiny

Needs timm (pip install timm). Weights and statistics are random, and none is silent. Printed is,
for each model, the largest difference of two images' logits from timm's and how large they are;
keys or shapes that are not timm's are an error.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from reference import compare, torch_convnets, torch_vit
from tinyvit_jax import models, weights

CLASSES = 11


def check(name: str, image_size: int) -> str:
    """Compares one model; returns a line, or raises ValueError where keys or shapes differ."""
    import timm

    reference = torch_vit if models.family_of(name) == "vit" else torch_convnets
    module = reference.randomize(timm.create_model(name, num_classes=CLASSES))
    state = {key: value.numpy().copy() for key, value in module.state_dict().items()}
    model = models.create_model(name, CLASSES, image_size)
    variables = weights.convert_from(state, model)
    written = weights.convert_to(model, variables, "timm")
    shapes = [{key: value.shape for key, value in arrays.items()} for arrays in (state, written)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name}: the keys or shapes that we write are not timm's")
    with torch.no_grad():
        size = float(module(compare.to_torch(compare.make_images(image_size))).abs().max())
    difference = compare.compare_logits(module, model, variables)
    return (f"{name} at {image_size}: {difference:.1e} of logits up to {size:.2f}; "
            f"{len(written)} arrays as timm's")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="of our variants, which are timm's too")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    args = parser.parse_args()
    for name in args.names:
        print(check(name, args.image_size), flush=True)


if __name__ == "__main__":
    main()
