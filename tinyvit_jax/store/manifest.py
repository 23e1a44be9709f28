"""What a store is: the manifest, how it is kept, and how two of them are told apart."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tinyvit_jax.store import codec, files

FORMAT_VERSION = 2  # 1: keys by formula; 2: keys in the blocks
KEYS = ("formula", "stored")
CAPTURE = "python tools/save_logits.py --config=... --workdir=..."
IMPORT = "python tools/import_store.py --config=... --from=..."


class StoreError(ValueError):
    """A store that cannot be used as asked; the message says what is wrong and what to run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store is: whatever decides the meaning of its targets, and how they are cut.

    `keys` says what decides which image and seed a position stands for: "formula", that of
    data/order.py with data_seed; or "stored", the blocks themselves, and data_seed means nothing.
    """

    teacher: dict  # name, weights (hash), image_size, mean, std
    class_names: tuple[str, ...]
    top_k: int
    augment: dict  # specification of the views, opaque here
    image_set: dict  # name, fingerprint, images
    data_seed: int
    passes: int
    views_per_pass: int
    shard_views: int = 16384
    block_views: int = 256
    codec: str = "compact"
    temperature: float = 1.0  # of the teacher's softmax
    tail: str = "uniform"  # what becomes of the mass outside the top K
    keys: str = "formula"  # formula | stored
    origin: dict = dataclasses.field(default_factory=dict)  # of an imported store: where it was

    @property
    def format_version(self) -> int:
        """The oldest format that can say this: a formula store stays readable for old releases."""
        return 2 if self.keys == "stored" else 1

    @property
    def command(self) -> str:
        """What to run for a shard that is missing or damaged."""
        return IMPORT if self.origin else CAPTURE

    def check(self) -> None:
        """Raises StoreError for the first field that cannot work."""
        for name, ok, expected in (
            ("passes", self.passes >= 1, "at least 1"),
            ("views_per_pass", self.views_per_pass >= 1, "at least 1"),
            ("top_k", 1 <= self.top_k <= len(self.class_names),
             f"1 to {len(self.class_names)}, the number of class names"),
            ("block_views", self.block_views >= 2 and self.block_views % 2 == 0,
             "an even number, as pairs of views are mixed"),
            ("shard_views", self.shard_views >= 1 and self.shard_views % self.block_views == 0,
             f"a multiple of block_views ({self.block_views})"),
            ("codec", self.codec in codec.MODES, f"one of {', '.join(codec.MODES)}"),
            ("temperature", self.temperature > 0, "a number above 0"),
            ("tail", self.tail == "uniform", "uniform"),
            ("keys", self.keys in KEYS, f"one of {', '.join(KEYS)}"),
            ("image_set", self.keys != "stored" or self.image_set.get("images", 0) >= 1,
             "its number of images under \"images\", as the blocks hold image indices"),
            ("origin", not self.origin or self.keys == "stored",
             "nothing, where a formula gives the keys"),
        ):
            if not ok:
                raise StoreError(f"A store with {name}={getattr(self, name)!r} cannot be made: "
                                 f"expected {expected}. Set {name} and start again.")

    def to_dict(self) -> dict:
        """The fields as JSON knows them (lists for tuples), class names last."""
        fields = dataclasses.asdict(self)
        fields["format_version"] = self.format_version
        fields["class_names"] = fields.pop("class_names")
        return json.loads(json.dumps(fields))


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts to one of dotted names."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{name}.{key}" if name else key)
    return flat


def compare(path: Path, wanted: dict, found: dict, remedy: str) -> None:
    """Raises StoreError naming every field in which two flat dicts differ."""
    absent = "(absent)"
    names = [n for n in wanted | found if wanted.get(n, absent) != found.get(n, absent)]
    if names:
        lines = [_difference(n, wanted.get(n, absent), found.get(n, absent)) for n in names]
        raise StoreError(f"The store {path} is not the one this run needs: {'; '.join(lines)}. "
                         f"{remedy}")


def _difference(name: str, wanted: Any, found: Any) -> str:
    """How one field differs; of two long lists, the first entry that does."""
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted + found) > 16:
        if len(wanted) != len(found):
            name, wanted, found = f"len({name})", len(wanted), len(found)
        else:
            i = next(i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b)
            name, wanted, found = f"{name}[{i}]", wanted[i], found[i]
    return f"{name} is {found!r} in the store, {wanted!r} here"


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes manifest.json, a field a line."""
    fields = manifest.to_dict()
    for field in dataclasses.fields(Manifest):
        # Format 1 does not know these: where they say nothing new, they are not written.
        if field.name in ("keys", "origin") and manifest.keys == "formula":
            del fields[field.name]
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in fields.items()]
    files.write_text(path / "manifest.json", "{\n" + ",\n".join(lines) + "\n}\n")


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of a store.

    Raises:
        StoreError: no store is there, or its manifest is broken or of a newer format.
    """
    file = path / "manifest.json"
    if not path.is_dir():
        raise StoreError(f"There is no store at {path}. Capture it with: {CAPTURE}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        version = fields.pop("format_version")
        if version > FORMAT_VERSION:
            raise StoreError(f"The store {path} has format {version}, this tinyvit_jax reads up to "
                             f"{FORMAT_VERSION}. Update it with: pip install -U tinyvit_jax")
        manifest = Manifest(**{**fields, "class_names": tuple(fields["class_names"])})
        manifest.check()
    except FileNotFoundError:
        raise StoreError(f"The folder {path} has no manifest.json: it is no store, or one that was "
                         f"never begun. Capture it with: {CAPTURE}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise StoreError(f"{file} is not a manifest ({error}). Put back a copy of it, or remove "
                         f"the folder and run {CAPTURE}") from error
    return manifest
