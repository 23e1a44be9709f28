"""Converts weights between a run of ours and PyTorch files, in the key layout of others.

python tools/convert_checkpoint.py --from=runs/quickstart --to=student.pth --layout=timm
python tools/convert_checkpoint.py --from=tiny_vit_5m.pth --to=runs/5m --classes=names.txt
python tools/convert_checkpoint.py --from=vit.pth --to=runs/vit --num_heads=8
python tools/convert_checkpoint.py --from=training.pth --to=weights.safetensors --tensors_only

What --from is, is read off its keys; --to ending in .pth, .pt or .safetensors is a PyTorch file,
anything else a folder of ours. Every key is used exactly once, or all that do not fit are listed.
Where PyTorch is installed, every PyTorch file on either side is read back into a PyTorch model and
compared with ours on two random images; exit code 1 where they differ.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from tinyvit_jax import heads, log, weights
from tinyvit_jax.convert import files
from tinyvit_jax.data import tfds

SUFFIXES = (".pth", ".pt", ".safetensors")


def convert(source: str, target: str, layout: str, image_size: int,
            stem_strides: tuple[int, ...], class_names: tuple[str, ...],
            mean: tuple[float, ...], std: tuple[float, ...], num_heads: int = 0) -> list[str]:
    """Converts and checks; returns one line for each."""
    check_new(target)
    if len(mean) != len(std) or min(std, default=1) <= 0 or (mean and is_file(target)):
        raise ValueError(f"--mean={mean} --std={std}: expected both or neither, std above 0, and "
                         f"--to a folder, for a PyTorch file does not hold them.")
    trained = weights.open_trained(source, image_size, stem_strides, class_names,
                                   (num_heads,) if num_heads else ())
    trained = trained._replace(mean=mean or trained.mean, std=std or trained.std)
    if is_file(target):
        count = weights.write_file(target, trained, layout)
        done = f"{target}: {count} arrays in the layout of {layout or 'its family'}"
        saved = trained
    else:
        weights.save_trained(trained, target)
        done = f"{target}: a folder to evaluate, predict or start from (--config.model.init_from)"
        saved = weights.load_run(target)
    return [done, *check(source, saved, written_here=False),
            *check(target, trained, written_here=True)]


def extract(source: str, target: str) -> str:
    """Copies the tensors of a PyTorch file, whatever else is in it, and returns one line."""
    check_new(target)
    state, notes = files.read_described(source, tensors_only=True)
    files.write_state(target, state, notes)
    return f"{target}: the {len(state)} tensors of {source} under their own names, and nothing else"


def check(path: str, trained: weights.Trained, written_here: bool) -> list[str]:
    """Compares a PyTorch file with a model of ours; nothing to say of a folder."""
    if not is_file(path):
        return []
    if importlib.util.find_spec("torch") is None:
        return [f"not checked: comparing {path} with PyTorch needs it (pip install torch)"]
    from reference import compare

    difference = compare.compare_file(path, trained.model, trained.variables, written_here)
    return [compare.check_difference(path, difference)]


def is_file(path: str) -> bool:
    """Whether a path is meant for a PyTorch file."""
    return Path(path).suffix in SUFFIXES


def check_new(target: str) -> None:
    """Raises ValueError where a file would be overwritten."""
    if is_file(target) and Path(target).exists():
        raise ValueError(f"{target} already exists. Delete it, or give another name.")


def read_names(classes: str) -> tuple[str, ...]:
    """The class names of --classes, or none."""
    return heads.read_class_names(
        classes, imagenet_names=tfds.list_classes("imagenet2012")) if classes else ()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", required=True, help="a workdir or a PyTorch file")
    parser.add_argument("--to", required=True, help="a PyTorch file or a new folder")
    parser.add_argument("--layout", choices=weights.LAYOUTS, default="",
                        help="of the keys written (a TinyViT's and CLIP's microsoft, others' timm)")
    parser.add_argument("--image_size", type=int, default=0,
                        help="pixels, which a TinyViT's PyTorch file does not tell (224)")
    parser.add_argument("--num_heads", type=int, default=0,
                        help="of a ViT, which others' files do not tell (one for 64 channels)")
    parser.add_argument("--stem_strides", type=int, nargs=2, default=(), help="likewise (2 2)")
    parser.add_argument("--classes", default="", help="file of names, or imagenet_1kto22k.txt")
    for name in ("--mean", "--std"):
        parser.add_argument(name, type=float, nargs=3, default=(), help="of the images it was "
                            "trained with, in [0, 1] (ImageNet's, of a CLIP OpenAI's)")
    parser.add_argument("--tensors_only", action="store_true", help="only copy the tensors out of "
                        "a file that holds other Python objects too, none of which is run")
    args = parser.parse_args()
    log.set_up_logging()
    try:
        if args.tensors_only:
            print(extract(args.source, args.to))
            return
        names = read_names(args.classes)
        print(*convert(args.source, args.to, args.layout, args.image_size,
                       tuple(args.stem_strides), names, tuple(args.mean), tuple(args.std),
                       args.num_heads), sep="\n")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
