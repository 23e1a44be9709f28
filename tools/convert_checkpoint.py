"""Converts weights between a run of ours and PyTorch files, in Microsoft's or timm's key layout.

python tools/convert_checkpoint.py --from=runs/quickstart --to=student.pth --layout=timm
python tools/convert_checkpoint.py --from=tiny_vit_5m.pth --to=runs/5m --classes=names.txt
python tools/convert_checkpoint.py --from=timm.safetensors --to=microsoft.pth

What --from is, is read off its keys; --to ending in .pth, .pt or .safetensors is a PyTorch file,
anything else a folder of ours. Every key is used exactly once, or all that do not fit are listed.
"""

import argparse
import sys
from pathlib import Path

from tinyvit_jax import log, weights
from tinyvit_jax.convert import files, tinyvit

SUFFIXES = (".pth", ".pt", ".safetensors")


def convert(source: str, target: str, layout: str, image_size: int,
            stem_strides: tuple[int, ...], class_names: tuple[str, ...]) -> str:
    """Converts and returns one line that says what was done."""
    trained = weights.open_trained(source, image_size, stem_strides, class_names)
    if Path(target).suffix in SUFFIXES:
        if Path(target).exists():
            raise ValueError(f"{target} already exists. Delete it, or give another name.")
        state = tinyvit.to_torch(trained.variables, layout)  # type: ignore[arg-type]
        files.write_state(target, state)
        return f"{target}: {len(state)} arrays in {layout}'s layout"
    weights.save_trained(trained, target)
    return f"{target}: a folder to evaluate, predict or start from (--config.model.init_from)"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", required=True, help="a workdir or a PyTorch file")
    parser.add_argument("--to", required=True, help="a PyTorch file or a new folder")
    parser.add_argument("--layout", choices=("microsoft", "timm"), default="microsoft")
    parser.add_argument("--image_size", type=int, default=0,
                        help="pixels, which a PyTorch file does not tell (224)")
    parser.add_argument("--stem_strides", type=int, nargs=2, default=(),
                        help="which a PyTorch file does not tell either (2 2)")
    parser.add_argument("--classes", help="file of class names, one a line")
    args = parser.parse_args()
    log.set_up_logging()
    try:
        names = tuple(Path(args.classes).read_text().splitlines()) if args.classes else ()
        print(convert(args.source, args.to, args.layout, args.image_size,
                      tuple(args.stem_strides), names))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
