"""Packs a tree of images, or a tar of one, into a few large files that read fast.

    python tools/pack_images.py --source=/folder_or.tar --out=/pack

The tree has a folder for each class, or train/ and val/ with such folders. Of a tree without splits
a tenth is packed as "eval", the same images that folder:/folder would hold out. Every image is
decoded once; what cannot be decoded is left out and listed in corrupt.txt. Train from the pack with
--config.data.source=pack:/pack.

--short-side makes training read fewer and faster bytes, but it changes pixels: capture the store of
a teacher's logits from such a pack as well. The pack has the fingerprint of its folder (of keys and
labels), so what stops a run on the wrong one are the views that a store keeps the hashes of.
"""

import argparse
import contextlib
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import tqdm

from tinyvit_jax.data import pack
from tinyvit_jax.data.folder import FolderSource
from tinyvit_jax.data.source import ImageSource, SourceError


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder, .tar, .tar.gz or .tgz")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--shard_images", type=int, default=4096, help="images in a file")
    parser.add_argument("--short-side", "--short_side", type=int, default=0, metavar="PIXELS",
                        help="store larger images as JPEG with this short side (320 for views of "
                             "224); 0 = their own bytes")
    parser.add_argument("--licence", default="", help="of the images, for the manifest")
    parser.add_argument("--origin", default="", help="of the images, for the manifest")
    args = parser.parse_args(argv)
    if args.shard_images < 1 or args.short_side < 0:
        parser.error("--shard_images must be 1 or more, --short-side 0 or more")
    return args


@contextlib.contextmanager
def open_tree(source: Path, beside: Path) -> Iterator[Path]:
    """The tree as a folder: the source itself, or a temporary one beside the pack with the tar."""
    if not source.is_file():
        yield source
        return
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside.parent, prefix="unpacked-") as folder:
        print(f"Unpacking {source}; its size is needed once more in {beside.parent} for a while.")
        try:
            with tarfile.open(source) as tar:
                tar.extractall(folder, filter="data")
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise SourceError(
                f"{source} cannot be unpacked: {str(error).splitlines()[0]} Expected a complete "
                f".tar, .tar.gz or .tgz of a tree with a folder for each class, and room for it in "
                f"{beside.parent}. Make or copy it again."
            ) from error
        yield find_root(Path(folder))


def find_root(folder: Path) -> Path:
    """Where the class or split folders begin, below what everything in a tar lies in."""
    below = [p for p in folder.iterdir() if not p.name.startswith(".")]
    while len(below) == 1 and below[0].is_dir() and any(p.is_dir() for p in below[0].iterdir()):
        folder = below[0]
        below = [p for p in folder.iterdir() if not p.name.startswith(".")]
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the pack; returns the exit status."""
    args = parse_args(argv)
    settings = pack.PackSettings(args.shard_images, args.short_side, args.licence, args.origin)
    try:
        pack.check_empty(args.out)
        with open_tree(args.source, args.out) as root:
            sources: dict[str, ImageSource] = {s: FolderSource(root, s) for s in ("train", "eval")}
            total = sum(map(len, sources.values()))
            with tqdm.tqdm(total=total, unit="image") as progress:
                manifest = pack.write_pack(args.out, sources, settings, progress)
    except (SourceError, OSError, RuntimeError) as error:  # RuntimeError: ArrayRecord's full disk
        print(f"error: {error}", file=sys.stderr)
        return 1
    for split, entry in manifest["splits"].items():
        print(f"{split}: {entry['images']} images in {len(entry['shards'])} files")
    corrupt = total - sum(entry["images"] for entry in manifest["splits"].values())
    if corrupt:
        print(f"{corrupt} images cannot be decoded and were left out: {args.out / 'corrupt.txt'}")
    print(f"Train from it with --config.data.source=pack:{args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
