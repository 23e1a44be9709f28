"""Makes the small image set inside the package from the files of Fashion-MNIST.

    python tools/make_embedded.py --fashion-mnist=/folder/of/the/four/idx.gz/files

The first 1,000 training and 200 test images of each class, in the order of the files, as PNG.
"""

import argparse
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tqdm

from tinyvit_jax.data import ops, pack
from tinyvit_jax.data.source import Example

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
               "Bag", "Ankle boot")
ORIGIN = "Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017), github.com/zalandoresearch/fashion-mnist"
LICENCE = "MIT, Copyright 2017 Zalando SE; see LICENSE"
PER_CLASS = {"train": 1000, "t10k": 200}
OUT = Path(__file__).parents[1] / "tinyvit_jax/data/embedded"
LICENCE_TEXT = """The MIT License (MIT)

Copyright © 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


class IdxSource:
    """The first images of each class in a pair of idx files."""

    name = "Fashion-MNIST"
    class_names = CLASS_NAMES
    fingerprint = ""  # the pack computes its own

    def __init__(self, folder: Path, part: str):
        self._part = part
        self._pixels = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        self._labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 8)
        firsts = [np.flatnonzero(self._labels == c)[:PER_CLASS[part]] for c in range(10)]
        self._places = np.sort(np.concatenate(firsts))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> Example:
        place = self._places[i]
        png = ops.encode_png(self._pixels[place])
        return Example(f"{self._part}/{place:05d}.png", png, int(self._labels[place]))

    def read(self, indices: Sequence[int]) -> list[Example]:
        """Reads several examples at once."""
        return [self[i] for i in indices]


def _read_idx(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def main() -> None:
    """Writes the set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fashion-mnist", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    train, test = (IdxSource(args.fashion_mnist, part) for part in ("train", "t10k"))
    settings = pack.PackSettings(shard_images=16384, licence=LICENCE, origin=ORIGIN)
    with tqdm.tqdm(total=len(train) + len(test), unit="image") as progress:
        pack.write_pack(args.out, {"train": train, "eval": test}, settings, progress)
    (args.out / "LICENSE").write_text(LICENCE_TEXT)


if __name__ == "__main__":
    main()
