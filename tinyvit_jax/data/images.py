"""Where images come from: the one function that opens a source by its name.

Training gets "train" and evaluation "eval". A folder with train/ and val/ (or validation/, test/,
eval/) has these splits; of any other folder every tenth image is held out, always the same ones.
"""

from pathlib import Path

from tinyvit_jax.data.binary import BinarySource
from tinyvit_jax.data.folder import FolderSource
from tinyvit_jax.data.pack import PackSource
from tinyvit_jax.data.source import Example, ImageSource, SourceError
from tinyvit_jax.data.tfds import TfdsSource

__all__ = ["Example", "ImageSource", "SourceError", "open_source"]

SCHEMES = ("embedded", "folder:/path", "pack:/path", "tfds:name", "binary:/path")


def open_source(source: str, split: str, data_dir: str = "") -> ImageSource:
    """Opens one split of a source.

    Args:
        source: "embedded", "folder:/path", "pack:/path", "tfds:name[/config]", or "binary:/path"
            for the files that CIFAR-10, CIFAR-100 and STL-10 are published as.
        split: "train" or "eval"; for tfds any split it has.
        data_dir: where tensorflow-datasets keeps its files; "" = its own default.

    Raises:
        SourceError: for whatever cannot be read as a set of images of at least two classes.
    """
    scheme, _, rest = source.partition(":")
    if source == "embedded":
        return PackSource(Path(__file__).parent / "embedded", split, source)
    if scheme == "folder" and rest:
        return FolderSource(Path(rest), split)
    if scheme == "pack" and rest:
        return PackSource(Path(rest), split, source)
    if scheme == "binary" and rest:
        return BinarySource(Path(rest), split)
    if scheme == "tfds" and rest:
        return TfdsSource(rest, split, data_dir)
    raise SourceError(
        f"The image source {source!r} is unknown: expected one of {', '.join(SCHEMES)}. Set it by "
        f"--config.data.source=SOURCE."
    )
