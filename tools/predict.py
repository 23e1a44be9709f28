"""Prints the top classes of image files, from a run of ours or a PyTorch file.

python tools/predict.py --weights=runs/quickstart photo.jpg other.png
python tools/predict.py --weights=tiny_vit_21m.pth --classes=imagenet_names.txt photo.jpg
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tinyvit_jax import heads, inference, log, mix, weights
from tinyvit_jax.data import augment, ops


def predict(trained: weights.Trained, paths: list[str], top: int) -> list[list[tuple[str, float]]]:
    """The top classes of each file with their probabilities."""
    infer = inference.compile_inference(trained.model, trained.variables)
    found = []
    for path in paths:
        image = augment.eval_view(ops.decode(Path(path).read_bytes(), path),
                                  trained.model.image_size, trained.crop, trained.crop_ratio)
        pixels = mix.normalize(jnp.asarray(image)[None], trained.mean, trained.std)
        prob = np.asarray(jax.nn.softmax(infer(pixels))[0])
        best = np.argsort(-prob, kind="stable")[:top]
        found.append([(trained.class_names[i], float(prob[i])) for i in best])
    return found


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="a workdir, a .pth or a .safetensors")
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--image_size", type=int, default=0, help="for a PyTorch file (224)")
    parser.add_argument("--stem_strides", type=int, nargs=2, default=(), help="for a PyTorch file")
    parser.add_argument("--num_heads", type=int, default=0, help="of a ViT's file (one for 64 "
                        "channels, where it does not tell)")
    parser.add_argument("--classes", help="file of class names, one a line, for a PyTorch file")
    parser.add_argument("images", nargs="+")
    args = parser.parse_args()
    log.set_up_logging()
    try:
        names = heads.read_class_names(args.classes) if args.classes else ()
        trained = weights.open_trained(args.weights, args.image_size, tuple(args.stem_strides),
                                       names, (args.num_heads,) if args.num_heads else ())
        if not trained.model.num_classes:
            raise ValueError(f"{args.weights} has no classifier, so it names no class. Give "
                             f"weights with a head.")
        for path, classes in zip(args.images, predict(trained, args.images, args.top),
                                 strict=True):
            print(path)
            for name, p in classes:
                print(f"  {p:6.2%}  {name}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
