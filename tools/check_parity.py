"""Measures how far our models are from PyTorch's, for each variant and kind of weights file.

python tools/check_parity.py --variants tiny_vit_5m_224                 # our PyTorch reference
python tools/check_parity.py --microsoft=Cream/TinyViT --timm --json=parity.json

A PyTorch model gets random weights and BatchNorm statistics, is saved, and its file is loaded here;
both see two random images in float32. The table holds the largest difference of logits (of the last
map for a segmentation model's trunk), and of any layer that is given the same input, as it is and
in parts of the layer's largest output (where that is above 1). Exit code 1 where one is above 1e-4.
"""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import torch
from reference import compare, originals, torch_tinyvit

import tinyvit_jax
from tinyvit_jax.convert import files
from tinyvit_jax.models import VARIANTS

NAMES = tuple(name for name, variant in VARIANTS.items()  # the original's own
              if name.startswith("tiny_vit_") and "stem_strides" not in variant)


def make_file(kind: str, module: torch.nn.Module, folder: Path) -> Path:
    """Saves a PyTorch model as one of the files that there are."""
    state = module.state_dict()
    path = folder / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        files.write_state(path, {key: value.numpy() for key, value in state.items()})
    elif kind == "trunk":
        around = {"image_encoder.neck.0.weight": torch.ones(1), "mask_decoder.x": torch.ones(1)}
        torch.save({f"image_encoder.{key}": value for key, value in state.items()} | around, path)
    else:
        torch.save({"model": state, "epoch": 1} if kind == "microsoft" else state, path)
    return path


def measure_file(kind: str, module: torch.nn.Module, model: Any, folder: Path) -> float:
    """The largest difference after loading a file of that kind."""
    path = make_file(kind, module, folder)
    if kind != "trunk":
        variables = tinyvit_jax.load_weights(path, model)
        return compare.compare_logits(module, model, variables)
    trunk = model.copy(num_classes=0)
    variables = tinyvit_jax.load_weights(path, trunk)
    return compare.compare_maps(module, trunk, variables)


def measure(name: str, microsoft: str, timm: bool, image_size: int = 0) -> dict[str, Any]:
    """One variant's differences by kind of file, and the layer that differs most.

    Args:
        name: of the variant.
        microsoft: folder of Microsoft's own code; "" = the reference beside this tool.
        timm: whether to use the installed timm's own class for its layout.
        image_size: pixels; 0 = the variant's.
    """
    model = tinyvit_jax.create_model(name, 1000, image_size or None)
    theirs = (originals.make_microsoft(microsoft, model) if microsoft
              else torch_tinyvit.TorchTinyViT(model))
    in_timm = originals.make_timm(model) if timm else torch_tinyvit.TimmTinyViT(model)
    for module in (theirs, in_timm):
        # Microsoft's class keeps a copy of its bias tables from the last change of mode.
        torch_tinyvit.randomize(module).train().eval()
    row: dict[str, Any] = {"variant": name}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("microsoft", "bare", "safetensors", "timm", "trunk"):
            module = in_timm if kind == "timm" else theirs
            row[kind] = measure_file(kind, module, model, Path(folder))
        variables = tinyvit_jax.load_weights(make_file("bare", theirs, Path(folder)), model)
    layers = compare.compare_layers(theirs, model, variables)
    return row | {"layer": max(x.difference for x in layers),
                  "layer_relative": max(x.difference / max(1, x.scale) for x in layers),
                  "layers": [x._asdict() for x in layers]}


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    heads = ('variant', '`{"model": ...}` .pth', 'bare .pth', '.safetensors', 'timm', 'trunk (map)',
             'layer', 'layer, relative')
    keys = ("microsoft", "bare", "safetensors", "timm", "trunk", "layer", "layer_relative")
    lines = [" | ".join(heads), "|".join(["---"] * len(heads))]
    lines += [" | ".join([row["variant"], *(f"{row[key]:.1e}" for key in keys)]) for row in rows]
    return "\n".join(f"| {line} |" if "---|" not in line else f"|{line}|" for line in lines)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--microsoft", default="", help="folder TinyViT of microsoft/Cream")
    parser.add_argument("--timm", action="store_true", help="the installed timm's own class")
    parser.add_argument("--image_size", type=int, default=0, help="pixels (the variant's)")
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args()
    logging.getLogger("tinyvit_jax").setLevel(logging.WARNING)
    jax.config.update("jax_platforms", "cpu")
    try:
        rows = [measure(name, args.microsoft, args.timm, args.image_size) for name in args.variants]
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(format_table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
    worst = max(v for row in rows for v in row.values() if isinstance(v, float))
    if worst > compare.TOLERANCE:
        sys.exit(f"error: the largest difference is {worst:.1e}; {compare.TOLERANCE} is expected")


if __name__ == "__main__":
    main()
