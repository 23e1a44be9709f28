"""What a store is: the manifest, how it is kept, and how two of them are told apart."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyvit_jax.store import codec
from tinyvit_jax.store.place import Place

# 1: keys by formula; 2: keys in the blocks; 3: replay, checksum, tail "none". Releases that know
# less take a field that they do not know for damage, so what has one is never written as theirs.
FORMAT_VERSION = 3
KEYS = ("formula", "stored")
TAILS = ("uniform", "none")
CAPTURE = "python tools/save_logits.py --config=... --workdir=..."
REPAIR = "python tools/check_store.py --config=... --workdir=... --repair"
IMPORT = "python tools/import_store.py --config=... --from=..."
EDIT = "python tools/edit_store.py --config=... --do=... --out=..."
_COPY = (f"Put back a copy of it, or name a new folder by --config.store.path and run {CAPTURE} or "
         f"{IMPORT}")


class StoreError(ValueError):
    """A store that cannot be used as asked; the message says what is wrong and what to run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store is: whatever decides the meaning of its targets, and how they are cut.

    `keys` says what decides which image and seed a position stands for: "formula", that of
    data/order.py with data_seed; or "stored", the blocks themselves, and data_seed means nothing.

    `replay` lets another machine find out whether it shows the pixels that the teacher saw: a few
    places as [pass, position], the sha256 of the view at each, uint8 [S, S, 3] and unmixed, and the
    versions of the libraries that made them, which inform and are never compared. {} = unknown.
    """

    teacher: dict  # name, weights (hash), image_size, mean, std
    class_names: tuple[str, ...]
    top_k: int
    augment: dict  # specification of the views, opaque here
    image_set: dict  # name, fingerprint, images
    data_seed: int
    passes: int
    views_per_pass: int
    shard_views: int = 32768
    block_views: int = 1024
    codec: str = "compact"
    temperature: float = 1.0  # of the teacher's softmax
    # Of the mass outside the top K: uniform, over the other classes | none, they get nothing and
    # training scales the K up. The blocks hold the same in both cases.
    tail: str = "uniform"
    keys: str = "formula"  # formula | stored
    origin: dict = dataclasses.field(default_factory=dict)  # imported or edited: what it was
    replay: dict = dataclasses.field(default_factory=dict)  # views, sha256, versions

    @property
    def command(self) -> str:
        """What to run for a shard that is missing or damaged."""
        if not self.origin:
            return CAPTURE
        return EDIT if self.origin.get("format") == "edited" else IMPORT

    def check(self) -> None:
        """Raises StoreError for the first field that cannot work."""
        for name, found, expected in self.faults():
            raise StoreError(f"A store with {name}={found!r} cannot be made: expected {expected}. "
                             f"Set {name} and start again.")

    def faults(self) -> Iterator[tuple[str, Any, str]]:
        """What cannot work: (field, what was found, what was expected), types before ranges."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        mistyped = [*_mistyped(fields, _TYPES), *_mistyped(flatten(fields), _NESTED)]
        yield from mistyped
        if mistyped:
            return
        for name, ok, expected in (
            ("top_k", self.top_k <= len(self.class_names),
             f"1 to {len(self.class_names)}, the number of class names"),
            ("block_views", self.block_views >= 2 and self.block_views % 2 == 0,
             "an even number, as pairs of views are mixed"),
            ("shard_views", self.shard_views % self.block_views == 0,
             f"a multiple of block_views ({self.block_views})"),
            ("codec", self.codec in codec.MODES, f"one of {', '.join(codec.MODES)}"),
            ("tail", self.tail in TAILS, f"one of {', '.join(TAILS)}"),
            ("keys", self.keys in KEYS, f"one of {', '.join(KEYS)}"),
            ("image_set", self.keys != "stored" or self.image_set.get("images", 0) >= 1,
             "its number of images under \"images\", as the blocks hold image indices"),
            ("origin", not self.origin or self.keys == "stored",
             "nothing, where a formula gives the keys"),
        ):
            if not ok:
                yield name, fields[name], expected
        if self.replay:
            yield from _replay_faults(self.replay, self.passes, self.views_per_pass)

    def to_dict(self) -> dict:
        """The fields as JSON knows them (lists for tuples), class names last."""
        fields = dataclasses.asdict(self)
        fields["format_version"] = FORMAT_VERSION
        fields["class_names"] = fields.pop("class_names")
        return json.loads(json.dumps(fields))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)
            and math.isfinite(value))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


_COUNT, _TEXT, _DICT = "a whole number, at least 1", "a text", "named values in braces"
_NUMBERS = "a list of numbers"
_TYPES = {
    "teacher": (_is_dict, _DICT),
    "class_names": (lambda v: _is_list(v) and len(v) > 0 and all(map(_is_text, v)),
                    "a list of texts"),
    "top_k": (_is_count, _COUNT), "augment": (_is_dict, _DICT), "image_set": (_is_dict, _DICT),
    "data_seed": (_is_whole, "a whole number"), "passes": (_is_count, _COUNT),
    "views_per_pass": (_is_count, _COUNT), "shard_views": (_is_count, _COUNT),
    "block_views": (_is_count, _COUNT), "codec": (_is_text, _TEXT),
    "temperature": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "tail": (_is_text, _TEXT), "keys": (_is_text, _TEXT), "origin": (_is_dict, _DICT),
    "replay": (_is_dict, _DICT),
}
_NESTED = {
    "teacher.name": (_is_text, _TEXT), "teacher.weights": (_is_text, _TEXT),
    "teacher.image_size": (_is_count, _COUNT), "teacher.dtype": (_is_text, _TEXT),
    "teacher.mean": (lambda v: _is_list(v) and all(map(_is_number, v)), _NUMBERS),
    "teacher.std": (lambda v: _is_list(v) and all(map(_is_number, v)), _NUMBERS),
    "image_set.name": (_is_text, _TEXT), "image_set.fingerprint": (_is_text, _TEXT),
    "image_set.images": (_is_whole, "a whole number"),
}


def _mistyped(found: dict[str, Any], expected: dict[str, tuple]) -> Iterator[tuple[str, Any, str]]:
    """The fields that are there and not what they should be."""
    for name, (fits, words) in expected.items():
        if name in found and not fits(found[name]):
            yield name, found[name], words


def _replay_faults(replay: dict, passes: int, views: int) -> Iterator[tuple[str, Any, str]]:
    """What cannot be in `Manifest.replay`."""
    if set(replay) != {"views", "sha256", "versions"}:
        yield "replay", sorted(replay), "views, sha256 and versions"
        return
    places, hashes, versions = replay["views"], replay["sha256"], replay["versions"]

    def is_place(value: Any) -> bool:
        return (_is_list(value) and len(value) == 2 and all(map(_is_whole, value))
                and 0 <= value[0] < passes and 0 <= value[1] < views)

    if not (_is_list(places) and places and all(map(is_place, places))):
        yield ("replay.views", places,
               f"pairs of a pass below {passes} and a position below {views}")
    elif not (_is_list(hashes) and len(hashes) == len(places) and all(
            _is_text(h) and re.fullmatch("[0-9a-f]{64}", h) for h in hashes)):
        yield "replay.sha256", hashes, f"{len(places)} hashes of 64 hexadecimal digits"
    if not (_is_dict(versions) and all(map(_is_text, versions.values()))):
        yield "replay.versions", versions, "the version of each library as a text"


def choose_block_views(top_k: int) -> int:
    """Views of a block where nobody says: some 40,000 numbers, a power of two from 256 to 4,096.

    Fewer, and the calls that decode a block cost more than its numbers; more, and the arrays that
    hold them leave the cache.
    """
    views = 256
    while views < 4096 and 2 * views * top_k <= 51_200:
        views *= 2
    return views


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts to one of dotted names."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{name}.{key}" if name else key)
    return flat


# Where a manifest says nothing of a field.
_IMPLIED = {"augment.pixels": "exact", "augment.greyscale": 0.0}


def compare(path: str | Path, wanted: dict, found: dict, remedy: str) -> None:
    """Raises StoreError naming every field in which two flat dicts differ.

    Never compared: the name of the image set, which says where it lies (its fingerprint says what
    it is); the versions in `replay`; and its hashes where one side has none.
    """
    wanted, found = _IMPLIED | wanted, _IMPLIED | found
    absent = "(absent)"
    hashed = {"replay.sha256", "replay.views"} <= wanted.keys() & found.keys()
    passed_over = ("image_set.name", "replay.versions" if hashed else "replay")
    names = [n for n in wanted | found if wanted.get(n, absent) != found.get(n, absent)
             and not n.startswith(passed_over)]
    if not names:
        return
    lines = [_difference(n, wanted.get(n, absent), found.get(n, absent)) for n in names]
    if "replay.sha256" in names:
        there, here = ({n.removeprefix("replay.versions."): v for n, v in side.items()
                        if n.startswith("replay.versions.")} for side in (found, wanted))
        remedy = f"{explain_replay(there, here)} {remedy}"
    raise StoreError(f"The store {path} is not the one this run needs: {'; '.join(lines)}. "
                     f"{remedy}")


def _difference(name: str, wanted: Any, found: Any) -> str:
    """How one field differs; of two long lists, the first entry that does."""
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted + found) > 8:
        if len(wanted) != len(found):
            name, wanted, found = f"len({name})", len(wanted), len(found)
        else:
            i = next(i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b)
            name, wanted, found = f"{name}[{i}]", wanted[i], found[i]
    return f"{name} is {found!r} in the store, {wanted!r} here"


_PACKAGES = {"opencv": "opencv-python-headless", "pillow": "pillow", "numpy": "numpy",
             "simplejpeg": "simplejpeg"}


def explain_replay(there: dict[str, str], here: dict[str, str]) -> str:
    """Why views have other pixels than at the capture, as far as the versions tell, and the remedy.

    Args:
        there: versions of the libraries at the capture.
        here: those of this machine.
    """
    other = {name: version for name, version in there.items() if here.get(name) != version}
    if not other:
        return ("The libraries have the same versions here as there "
                f"({_join_versions(there) or 'none is known'}), so an image file was changed, or "
                "OpenCV was built otherwise: put back the images of the capture, and install "
                "OpenCV from the same package.")
    wanted = " ".join(f"{_PACKAGES.get(name, name)}=={version}" for name, version in other.items())
    return (f"The capture had {_join_versions(there)}; here are {_join_versions(here)}. Install "
            f"what it had: pip install {wanted}")


def _join_versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def write_manifest(place: Place, manifest: Manifest) -> None:
    """Writes manifest.json, in place of the one that is there."""
    place.write("manifest.json", _text(manifest).encode("utf-8"))


def create_manifest(place: Place, manifest: Manifest) -> bool:
    """Writes manifest.json where there is none; False, and nothing done, where there is one."""
    return place.create("manifest.json", _text(manifest).encode("utf-8"))


def _text(manifest: Manifest) -> str:
    """The content of manifest.json, a field a line, the long list of classes last."""
    fields = manifest.to_dict()
    names = fields.pop("class_names")
    fields |= {"checksum": checksum(fields | {"class_names": names}), "class_names": names}
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in fields.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def checksum(fields: dict) -> str:
    """sha256 over the fields of a manifest.json in the order of their names, in hex.

    Args:
        fields: all of them as JSON gives them, but for "checksum" itself.
    """
    whole = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(whole.encode("utf-8")).hexdigest()


def read_manifest(place: Place) -> Manifest:
    """Reads the manifest of a store.

    Raises:
        StoreError: no store is there, or its manifest is broken or of a newer format.
    """
    file = f"{place.url}/manifest.json"
    try:
        fields = json.loads(place.read("manifest.json").decode("utf-8"))
    except FileNotFoundError:
        raise StoreError(f"There is no store at {place.url}: no manifest.json is there. Capture it "
                         f"with: {CAPTURE}") from None
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise StoreError(f"{file} is not a manifest ({error}). {_COPY}") from error
    if not isinstance(fields, dict) or not _is_count(fields.get("format_version")):
        raise StoreError(f"{file} is not a manifest: it states no format_version. {_COPY}")
    if fields["format_version"] > FORMAT_VERSION:
        raise StoreError(f"The store {place.url} has format {fields['format_version']}, this "
                         f"tinyvit_jax reads up to {FORMAT_VERSION}. Update it with: pip install "
                         f"-U tinyvit_jax")
    _check_sum(file, fields)
    return _parse(file, fields)


def _check_sum(file: str, fields: dict) -> None:
    """Takes the checksum out of the fields; raises StoreError where it is not theirs."""
    if "checksum" not in fields:  # formats 1 and 2 have none
        return
    stated = fields.pop("checksum")
    found = checksum(fields)
    if stated != found:
        raise StoreError(
            f"{file} was edited or damaged since it was written: its checksum is {found}, and the "
            f"file states {stated!r}. {_COPY}. If the edit was meant and you know that it is true "
            f"of every shard, delete the line \"checksum\" from the file.")


def _parse(file: str, fields: dict) -> Manifest:
    """The manifest of the fields of a file."""
    known = {field.name: field for field in dataclasses.fields(Manifest)}
    absent = [name for name, field in known.items() if name not in fields
              and field.default is dataclasses.MISSING
              and field.default_factory is dataclasses.MISSING]
    unknown = sorted(set(fields) - set(known) - {"format_version"})
    if absent or unknown:
        parts = [f"it lacks {', '.join(absent)}"] * bool(absent)
        parts += [f"it has {', '.join(unknown)}, which no manifest has"] * bool(unknown)
        raise StoreError(f"{file} is not a manifest: {', and '.join(parts)}. {_COPY}")
    values = {name: fields[name] for name in known if name in fields}
    names = values["class_names"]
    manifest = Manifest(**{**values, "class_names": tuple(names) if _is_list(names) else names})
    for name, found, expected in manifest.faults():
        raise StoreError(f"{file} was edited or damaged: {name} is {found!r}, expected "
                         f"{expected}. {_COPY}")
    return manifest
