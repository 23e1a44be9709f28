"""Packs: images as records of a few large files, for disks and networks that dislike small ones.

A pack is a folder of immutable ArrayRecord shards and a manifest.json, which is written last. A
record is one image: a header of a few bytes, its key, and the bytes of its file.
"""

import dataclasses
import itertools
import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from array_record.python import array_record_module

from tinyvit_jax import cores
from tinyvit_jax.data import ops
from tinyvit_jax.data.source import Example, Fingerprint, SourceError, read_keys

FORMAT_VERSION = 1

_HEADER = struct.Struct("<HI")  # of a record: bytes of its key, label; key and image follow
# Groups of one record: a random read took 40 us, with 4 records 56, with 16 records 96. No
# compression: an image is compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 32 * 1024
# Of images stored smaller: a marker after every unit, so that all that lies around a crop is left
# out when it is decoded. 3 % more bytes, and 0.66 ms instead of 0.80 for a view at short side 320.
_RESTART_INTERVAL = 1


class PackSource:
    """A folder of ArrayRecord shards and the manifest.json that `write_pack` makes."""

    def __init__(self, root: Path, split: str, name: str):
        self.name = name
        manifest = _read_manifest(root)
        if split not in manifest["splits"]:
            raise SourceError(f"{name} has no split {split!r}: it has "
                              f"{', '.join(manifest['splits'])}.")
        entry = manifest["splits"][split]
        self.class_names = tuple(manifest["class_names"])
        self.fingerprint: str = entry["fingerprint"]
        self._paths = [root / shard["file"] for shard in entry["shards"]]
        self._starts = np.cumsum([0] + [shard["images"] for shard in entry["shards"]])
        for path, shard in zip(self._paths, entry["shards"], strict=True):
            _check_shard(path, shard["bytes"])
        self._open_readers()

    def _open_readers(self) -> None:
        """Starts without readers: each opens with the first image read from its shard."""
        self._readers: list[Any] = [None] * len(self._paths)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_readers()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> Example:
        return self.read([i])[0]

    def read(self, indices: Sequence[int]) -> list[Example]:
        """Reads several examples at once, in the order asked for."""
        wanted = np.array([range(len(self))[i] for i in indices], np.int64)
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        found: list[Any] = [None] * len(wanted)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            records = self._read_shard(shard, (wanted[places] - self._starts[shard]).tolist())
            for place, record in zip(places, records, strict=True):
                found[place] = _unpack_record(record)
        return found

    def keys(self) -> np.ndarray:
        """The key of every image as UTF-8, out of all the records: dtype S [n]."""
        return read_keys(self)

    def _read_shard(self, shard: int, places: list[int]) -> list[bytes]:
        try:
            return self._reader(shard).read(places)
        except (RuntimeError, ValueError, IndexError) as error:
            raise SourceError(
                f"The pack's shard {self._paths[shard]} cannot be read: {error}. It has the right "
                f"size, so its content is damaged. Copy this file again, or make the pack again "
                f"with tools/pack_images.py."
            ) from error

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if self._readers[shard] is None:
                self._readers[shard] = array_record_module.ArrayRecordReader(
                    str(self._paths[shard]), _READER_OPTIONS,
                    file_reader_buffer_size=_READER_BUFFER)
            return self._readers[shard]


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / "manifest.json"
    if not path.is_file():
        raise SourceError(
            f"There is no pack in {root}: it has no manifest.json, which is written last. Make one "
            f"with  python tools/pack_images.py --source=/folder --out={root}"
        )
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise SourceError(f"{path} is damaged ({error}). Copy it again, or make the pack again "
                          f"with tools/pack_images.py.") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise SourceError(
            f"The pack in {root} has format version {manifest.get('format_version')}, and this "
            f"tinyvit_jax reads version {FORMAT_VERSION}. Make it again with tools/pack_images.py."
        )
    return manifest


def _check_shard(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        state = "is missing" if found is None else f"has {found} bytes"
        raise SourceError(
            f"The pack's shard {path} {state}: its manifest says {size} bytes, so the pack was not "
            f"copied completely or was changed. Copy this file again, or make the pack again with "
            f"tools/pack_images.py."
        )


def _pack_record(example: Example) -> bytes:
    key = example.key.encode()
    return _HEADER.pack(len(key), example.label) + key + example.image


def _unpack_record(record: bytes) -> Example:
    length, label = _HEADER.unpack_from(record)
    end = _HEADER.size + length
    return Example(record[_HEADER.size:end].decode(), record[end:], label)


@dataclasses.dataclass(frozen=True)
class PackSettings:
    """How a pack is written.

    Attributes:
        shard_images: images in a shard; more than some thousands make each read slower.
        short_side: stores larger images as JPEG with this short side in pixels; 0 = their own
            bytes. Other pixels under the same fingerprint, which is of keys and labels.
        licence: of the images, for the manifest.
        origin: where they come from, for the manifest.
    """

    shard_images: int = 4096
    short_side: int = 0
    licence: str = ""
    origin: str = ""


class Packable(Protocol):
    """What a pack can be made of: the part of an ImageSource that is read for it."""

    @property
    def class_names(self) -> tuple[str, ...]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example: ...


class SplitWriter:
    """Writes one split of a pack, shard by shard; `entry` is its part of the manifest."""

    def __init__(self, out: Path, split: str, source: Packable, settings: PackSettings):
        self._out, self._split, self._source, self._settings = out, split, source, settings
        self.corrupt: list[str] = []  # key and reason, of the images left out

    def write(self, progress: Any) -> dict[str, Any]:
        """Writes the shards and returns the split's entry; calls progress.update(images)."""
        shards: list[dict[str, Any]] = []
        fingerprint = Fingerprint(self._source.class_names)
        with futures.ThreadPoolExecutor(cores.count_cores()) as pool:
            for examples in self._grouped(pool, progress):
                path = self._out / f"{self._split}-{len(shards):05d}.array_record"
                _write_shard(path, examples)
                shards.append({"file": path.name, "images": len(examples),
                               "bytes": path.stat().st_size})
                fingerprint.add((e.key, e.label) for e in examples)
        return {"shards": shards, "images": sum(shard["images"] for shard in shards),
                "fingerprint": fingerprint.hexdigest()}

    def _grouped(self, pool: futures.Executor, progress: Any) -> Iterator[list[Example]]:
        """Images that can be decoded, in order, by shards."""
        good: list[Example] = []
        for start in range(0, len(self._source), self._settings.shard_images):
            stop = min(start + self._settings.shard_images, len(self._source))
            for example in pool.map(self._prepare, range(start, stop)):
                if example is not None:
                    good.append(example)
                progress.update(1)
            while len(good) >= self._settings.shard_images:
                yield good[:self._settings.shard_images]
                good = good[self._settings.shard_images:]
        if good:
            yield good

    def _prepare(self, i: int) -> Example | None:
        example = self._source[i]
        if example.labels is not None:
            raise SourceError(f"The image {example.key} has several labels, and a pack keeps one "
                              f"for each. Read this set where it is: by "
                              f"--config.data.eval_source=tfds:NAME.")
        try:
            image = ops.decode(example.image, example.key)
        except ops.ImageError as error:
            self.corrupt.append(f"{self._split}/{example.key}\t{error}")
            return None
        h, w = image.shape[:2]
        side = self._settings.short_side
        if not 0 < side < min(h, w):
            return example
        scale = side / min(h, w)
        small = ops.resize(image, round(h * scale), round(w * scale))
        return example._replace(image=ops.encode_jpeg(small, _RESTART_INTERVAL))


def _write_shard(path: Path, examples: list[Example]) -> None:
    temporary = path.with_suffix(".tmp")
    writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
    for example in examples:
        writer.write(_pack_record(example))
    writer.close()
    _replace(temporary, path)


def _replace(temporary: Path, path: Path) -> None:
    """Moves a complete file to its place: there is never half a file under the final name."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_empty(out: Path) -> None:
    """Raises SourceError where a new pack would meet other files."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SourceError(f"--out={out} is not an empty folder. Give an empty or a new one, so "
                          f"that no older file can be taken for a part of this pack.")


def write_pack(out: Path, sources: Mapping[str, Packable], settings: PackSettings,
               progress: Any) -> dict[str, Any]:
    """Writes a pack of the images that can be decoded; the others go to corrupt.txt.

    Args:
        out: a folder that does not exist or is empty.
        sources: what each split is made of.
        settings: how.
        progress: its `update(images)` is called as images are done, as tqdm has it.

    Returns:
        The manifest.

    Raises:
        SourceError: for a folder that is not empty.
    """
    check_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    writers = {split: SplitWriter(out, split, source, settings)
               for split, source in sources.items()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "class_names": list(next(iter(sources.values())).class_names),
        "splits": {split: writer.write(progress) for split, writer in writers.items()},
        "short_side": settings.short_side,
        "licence": settings.licence,
        "origin": settings.origin,
    }
    corrupt = sorted(itertools.chain.from_iterable(w.corrupt for w in writers.values()))
    if corrupt:
        (out / "corrupt.txt").write_text("".join(line + "\n" for line in corrupt))
    temporary = out / "manifest.tmp"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    _replace(temporary, out / "manifest.json")
    return manifest
