"""How far the values of augment.pixels move views and logits, beside what another library does.

python tools/reference/measure_fidelity.py FOLDER [--images=200] [--views=2]

Every JPEG below the folder is shown in random crops of 224 pixels and nothing else: exact, fast,
faster, and as PIL's bicubic resize of the same crop. Logits are those of an untrained TinyViT-5M.
"""

import argparse
import io
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tinyvit_jax import config, mix
from tinyvit_jax.data import augment, jpeg
from tinyvit_jax.models import create_model

_SIZE = 224
_COLUMNS = ("exact", "fast", "faster", "PIL's bicubic resize")


def make_views(data: bytes, seed: int) -> tuple[bool, list[np.ndarray]] | None:
    """One view as each column has it, and whether all but exact decoded it at a fraction."""
    header = jpeg.read_header(data)
    if header is None:
        return None
    settings = config.default().augment
    settings.update({"rand_augment": "", "color_jitter": 0.0, "erase": 0.0, "flip": 0.0})
    views = []
    for settings.pixels in _COLUMNS[:-1]:
        spec = augment.make_spec(settings, _SIZE)
        views.append(augment.replay(data, "image", seed, spec))
    y0, x0, y1, x1 = augment.crop_box(augment.sample_view(seed, spec), spec, header.height,
                                      header.width)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    views.append(np.asarray(whole.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC,
                                         box=(x0, y0, x1, y1))))
    return min(y1 - y0, x1 - x0) >= 2 * (_SIZE + 1), views


def compute_logits(pixels: np.ndarray) -> np.ndarray:
    """Logits float32 [n, 1000] of uint8 [n, 224, 224, 3], 16 at a time."""
    model = create_model("tiny_vit_5m_224", num_classes=1000)
    first = jnp.zeros((1, _SIZE, _SIZE, 3))
    variables = jax.jit(lambda key: model.init(key, first, train=False))(jax.random.key(0))
    spec = config.default().data
    apply = jax.jit(lambda x: model.apply(variables, mix.normalize(x, tuple(spec.mean),
                                                                   tuple(spec.std))))
    starts = range(0, len(pixels) - len(pixels) % 16, 16)
    return np.concatenate([np.asarray(apply(pixels[i:i + 16])) for i in starts])


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--views", type=int, default=2, help="of each image")
    args = parser.parse_args(argv)
    paths = sorted(p for p in args.folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    made = [made for i, path in enumerate(paths[:args.images]) for seed in range(args.views)
            if (made := make_views(path.read_bytes(), seed * len(paths) + i))]
    if len(made) < 16:
        sys.exit(f"error: {args.folder} has {len(made)} views of plain JPEGs; expected 16 or more.")
    columns = {name: np.stack([views[i] for _, views in made])
               for i, name in enumerate(_COLUMNS)}
    logits = {name: compute_logits(pixels) for name, pixels in columns.items()}
    spread = logits["exact"].std(0).mean()
    exact = columns.pop("exact").astype(np.int16)
    print(f"{len(made)} views, {sum(part for part, _ in made)} of them decoded at a fraction\n\n"
          f"| against exact | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    apart = {name: np.abs(exact - pixels).mean((1, 2, 3)) for name, pixels in columns.items()}
    moved = {name: np.abs(logits[name] - logits["exact"]).mean() / spread for name in columns}
    same = {name: (logits[name].argmax(-1) == logits["exact"].argmax(-1)).mean()
            for name in columns}
    for title, values, form in (
            ("mean absolute difference, levels of 255",
             {name: x.mean() for name, x in apart.items()}, ".2f"),
            ("the same of the view that differs most",
             {name: x.max() for name, x in apart.items()}, ".1f"),
            ("logits, relative to their spread over images", moved, ".1%"),
            ("the largest logit is of the same class", same, ".1%")):
        print(f"| {title} | {' | '.join(f'{values[name]:{form}}' for name in columns)} |")


if __name__ == "__main__":
    main()
