import dataclasses
import json
from typing import Any

import pytest

from tinyvit_jax.store import manifest as manifests
from tinyvit_jax.store.manifest import (
    Manifest,
    StoreError,
    choose_block_views,
    read_manifest,
    write_manifest,
)
from tinyvit_jax.store.place import Folder

FIELDS: dict[str, Any] = {
    "teacher": {"name": "t", "weights": "ab12", "image_size": 16, "mean": [0.5], "std": [0.2],
                "dtype": "float32"},
    "class_names": ("first", "second", "dritte Klasse \u00e4"), "top_k": 2,
    "augment": {"spec": "small", "flip": 0.5, "scale": [1e-07, 1.0]},
    "image_set": {"name": "folder", "fingerprint": "cd34", "images": 45}, "data_seed": 7,
    "passes": 2, "views_per_pass": 46, "shard_views": 16, "block_views": 4,
    "replay": {"views": [[0, 0], [0, 45]], "sha256": ["0a" * 32, "1b" * 32],
               "versions": {"opencv": "4.10.0.84", "pillow": "11.0.0"}}}


def make_manifest(**changes):
    return Manifest(**{**FIELDS, **changes})


@pytest.fixture
def place(tmp_path):
    place = Folder(tmp_path)
    write_manifest(place, make_manifest())
    return place


def read_fields(place):
    return json.loads(place.read("manifest.json"))


def write_fields(place, fields, sealed=True):
    """Writes a manifest.json by hand; `sealed` = with the checksum that belongs to it."""
    fields = {k: v for k, v in fields.items() if k != "checksum"}
    if sealed:
        fields["checksum"] = manifests.checksum(fields)
    place.write("manifest.json", json.dumps(fields).encode())


def test_a_manifest_comes_back_and_can_be_read_by_people(place):
    assert read_manifest(place) == make_manifest()
    lines = place.read("manifest.json").decode().splitlines()
    names = [field.name for field in dataclasses.fields(Manifest) if field.name != "class_names"]
    assert [line.split('"')[1] for line in lines[1:-1]] == [
        *names, "format_version", "checksum", "class_names"]
    write_fields(place, dict(reversed(read_fields(place).items())))  # order and spaces are free
    assert read_manifest(place) == make_manifest()


class Text(Folder):
    """A place of nothing but one text."""

    def __init__(self, data):
        super().__init__("nowhere")
        self.data = data

    def read(self, name):
        return self.data


def test_every_changed_byte_is_noticed(place):
    """What one flipped bit does not break, it does not change either (1e-07 and 1E-07)."""
    whole = place.read("manifest.json")
    harmless = []
    for i in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[i] ^= 1 << bit
            try:
                found = read_manifest(Text(bytes(changed)))
            except StoreError:
                continue
            assert found == make_manifest()
            harmless.append(whole[i:i + 1])
    assert set(harmless) <= {b"e", b"4"}  # of 1e-07, and of \u00e4
    assert len(harmless) <= 3


def test_bytes_that_are_lost_or_come_twice_are_noticed(place):
    whole = place.read("manifest.json")
    for stop in range(0, len(whole) - 1, 7):
        with pytest.raises(StoreError):
            read_manifest(Text(whole[:stop]))
    with pytest.raises(StoreError, match="is not a manifest"):
        read_manifest(Text(whole + whole))
    with pytest.raises(StoreError, match="edited or damaged since it was written"):
        read_manifest(Text(whole.replace(b'"top_k": 2', b'"top_k": 2, "top_k": 1')))


def test_an_edit_is_noticed_and_the_way_out_is_named(place):
    fields = read_fields(place)
    place.write("manifest.json", json.dumps(fields | {"data_seed": 8}).encode())
    with pytest.raises(StoreError, match=r"manifest\.json was edited or damaged.*Put back a copy.*"
                                         r"save_logits\.py.*delete the line \"checksum\""):
        read_manifest(place)
    write_fields(place, fields | {"data_seed": 8}, sealed=False)
    assert read_manifest(place).data_seed == 8


FIRST_RELEASE = """{
  "teacher": {"name": "t", "weights": "ab12", "image_size": 16, "mean": [0.5], "std": [0.2]},
  "top_k": 2,
  "augment": {"spec": "small"},
  "image_set": {"name": "folder", "fingerprint": "cd34", "images": 45},
  "data_seed": 7,
  "passes": 2,
  "views_per_pass": 45,
  "shard_views": 16,
  "block_views": 4,
  "codec": "float16",
  "temperature": 1.0,
  "tail": "uniform",
  "format_version": 1,
  "class_names": ["a", "b", "c"]
}
"""


def test_older_formats_load(place):
    place.write("manifest.json", FIRST_RELEASE.encode())
    found = read_manifest(place)
    assert (found.keys, found.origin, found.replay, found.codec) == ("formula", {}, {}, "float16")
    second = FIRST_RELEASE.replace('_version": 1', '_version": 2').replace(
        '  "tail"', '  "keys": "stored",\n  "origin": {"format": "microsoft"},\n  "tail"')
    place.write("manifest.json", second.encode())
    assert read_manifest(place).keys == "stored"
    assert read_manifest(place).command == manifests.IMPORT


def test_newer_formats_ask_for_an_update(place):
    write_fields(place, read_fields(place) | {"format_version": 4, "novelty": 1})
    with pytest.raises(StoreError, match=r"has format 4, this .* up to 3.*pip install -U"):
        read_manifest(place)


def test_which_command_makes_what_is_missing():
    assert make_manifest().command == manifests.CAPTURE
    for form, command in (("microsoft", manifests.IMPORT), ("edited", manifests.EDIT)):
        assert make_manifest(keys="stored", origin={"format": form}).command == command


# Of every field a value of a wrong type, and one out of range where there is a range.
WRONG = [
    ("teacher", []), ("teacher.name", 3), ("teacher.weights", None), ("teacher.image_size", "16"),
    ("teacher.image_size", 0), ("teacher.mean", 0.5), ("teacher.std", ["0.2"]),
    ("teacher.dtype", 32),
    ("class_names", "first"), ("class_names", []), ("class_names", ["a", 1]), ("class_names", None),
    ("top_k", "2"), ("top_k", 2.0), ("top_k", True), ("top_k", 0), ("top_k", 4),
    ("augment", "small"), ("image_set", None), ("image_set.name", 0),
    ("image_set.fingerprint", 12), ("image_set.images", "45"), ("data_seed", "7"),
    ("data_seed", None), ("passes", "2"), ("passes", 0), ("views_per_pass", [46]),
    ("views_per_pass", -1), ("shard_views", None), ("shard_views", 18), ("shard_views", 0),
    ("block_views", "4"), ("block_views", 3), ("codec", 1), ("codec", "zip"), ("codec", ["zip"]),
    ("temperature", "1"), ("temperature", 0), ("temperature", float("nan")),
    ("temperature", float("inf")), ("tail", 0), ("tail", "even"), ("keys", None), ("keys", "none"),
    ("origin", "microsoft"), ("origin", {"format": "microsoft"}), ("replay", []),
    ("replay", {"views": [[0, 0]]}), ("replay.views", "0"), ("replay.views", []),
    ("replay.views", [[0, 0], [2, 0]]), ("replay.views", [[0, 0], [0, 46]]),
    ("replay.views", [[0, 0], [0]]), ("replay.views", [[0, 0], [0, 1.5]]),
    ("replay.sha256", ["0a" * 32]), ("replay.sha256", ["0a" * 32, "xy" * 32]),
    ("replay.sha256", ["0a" * 32, 5]), ("replay.versions", None),
    ("replay.versions", {"opencv": 4}),
]


def change(fields, name, value):
    """Sets a dotted field of nested dicts, in a copy."""
    fields = json.loads(json.dumps(fields))
    inner = fields
    *outer, last = name.split(".")
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return fields


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{n}-{v}" for n, v in WRONG])
def test_a_field_that_cannot_be_is_named(place, tmp_path, name, value):
    write_fields(place, change(read_fields(place), name, value))
    with pytest.raises(StoreError) as error:
        read_manifest(place)
    message = str(error.value)
    shown = sorted(value) if name == "replay" and isinstance(value, dict) else value
    shown = tuple(value) if name == "class_names" and isinstance(value, list) else shown
    assert f"{name} is {shown!r}, expected " in message
    assert "Put back a copy of it" in message
    with pytest.raises(StoreError, match="cannot be made: expected"):
        Manifest(**change(FIELDS, name, value)).check()


def test_every_field_has_a_wrong_value():
    """A new field without a check of its type fails here."""
    tried = {name.partition(".")[0] for name, _ in WRONG}
    assert tried == {field.name for field in dataclasses.fields(Manifest)}


@pytest.mark.parametrize("version", [None, "3", True, 0, -1, 2.5])
def test_a_format_that_is_no_number(place, version):
    write_fields(place, read_fields(place) | {"format_version": version})
    with pytest.raises(StoreError, match="is not a manifest: it states no format_version"):
        read_manifest(place)


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "null", "{}", "\ufeff{}", "[" * 100_000])
def test_what_is_no_manifest_at_all(place, text):
    place.write("manifest.json", text.encode())
    with pytest.raises(StoreError, match="is not a manifest"):
        read_manifest(place)


def test_absent_and_unknown_fields_are_named(place):
    fields = read_fields(place)
    absent = {k: v for k, v in fields.items() if k not in ("top_k", "augment")}
    write_fields(place, absent | {"flavour": "sweet"})
    with pytest.raises(StoreError, match="it lacks top_k, augment, and it has flavour"):
        read_manifest(place)


def compare(wanted, found):
    manifests.compare("S", manifests.flatten(wanted.to_dict()),
                      manifests.flatten(found.to_dict()), "Do this.")


def test_versions_inform_and_hashes_decide():
    own = make_manifest()
    compare(own, make_manifest(replay=own.replay | {"versions": {"opencv": "3.0"}}))
    compare(own, make_manifest(replay=own.replay | {"versions": {}}))
    compare(own, make_manifest(replay={}))
    compare(make_manifest(replay={}), own)
    theirs = {**own.replay, "sha256": ["0a" * 32, "2c" * 32],
              "versions": {"opencv": "4.11.0.86", "pillow": "11.0.0"}}
    with pytest.raises(StoreError, match=r"replay\.sha256 is .*2c2c.*in the store.*1b1b.* here\. "
                       r"The capture had opencv 4\.11\.0\.86, pillow 11\.0\.0; here are opencv "
                       r"4\.10\.0\.84, .*pip install opencv-python-headless==4\.11\.0\.86 Do this"):
        compare(own, make_manifest(replay=theirs))
    with pytest.raises(StoreError, match=r"same versions here as there.*image file was changed"):
        compare(own, make_manifest(replay={**theirs, "versions": own.replay["versions"]}))


@pytest.mark.parametrize(("top_k", "views"), [(1, 4096), (10, 4096), (20, 2048), (100, 512),
                                              (1000, 256), (21841, 256)])
def test_blocks_of_some_forty_thousand_numbers(top_k, views):
    assert choose_block_views(top_k) == views
