"""A small store whose every target is a function of its place."""

import json
import zlib
from typing import Any

import numpy as np

from tinyvit_jax.store import store as stores

CLASSES = tuple(f"class {i}" for i in range(20))
FIELDS: dict[str, Any] = {
    "teacher": {"name": "t", "weights": "ab12", "image_size": 16, "mean": [0.5], "std": [0.2]},
    "class_names": CLASSES, "top_k": 3, "augment": {"name": "small", "flip": 0.5},
    "image_set": {"name": "folder", "fingerprint": "cd34", "images": 45}, "data_seed": 7,
    "passes": 2, "views_per_pass": 45, "shard_views": 16, "block_views": 4}


def make_manifest(**changes):
    return stores.Manifest(**{**FIELDS, **changes})


def targets(pass_number, start, stop):
    """Keys, classes and float16-exact probabilities of positions, each a function of its place."""
    place = np.arange(start, stop)
    image = (place * 7 + pass_number) % 45
    seed = (place * 2654435761 + pass_number).astype(np.uint32)
    index = np.stack([place % 20, (place + 3) % 20, (place + pass_number + 5) % 20], 1)
    prob = np.stack([np.full(len(place), 0.5), 0.25 - place / 1024, place / 1024 + 1 / 1024], 1)
    return (image, seed), index.astype(np.int32), prob.astype(np.float32)


def blocks(store, shard):
    size = store.manifest.block_views
    for start in range(shard.start, shard.stop, size):
        yield targets(shard.pass_number, start, min(start + size, shard.stop))


def fill(store):
    for shard in store.missing():
        store.write_shard(shard, blocks(store, shard))
    return store


def make_store(path):
    """A complete store of exact probabilities."""
    return fill(stores.create_store(path, make_manifest(codec="float16")))


def check_range(store, pass_number, start, stop):
    keys, index, prob = targets(pass_number, start, stop)
    found_index, found_prob = store.read(pass_number, start, stop, keys)
    np.testing.assert_array_equal(found_prob, -np.sort(-prob, axis=1))
    order = np.argsort(-prob, axis=1, kind="stable")
    np.testing.assert_array_equal(found_index, np.take_along_axis(index, order, 1))


def shard_file(store, shard):
    return store.path / f"{shard.name}.array_record"


def write_file(file, data):
    """Writes a file of a shard anew, and a sidecar that fits it where it is a shard's."""
    file.write_bytes(data)
    sidecar = file.with_suffix(".json")
    facts = json.loads(sidecar.read_text()) | {"bytes": len(data), "crc32": zlib.crc32(data)}
    sidecar.write_text(json.dumps(facts))


def rewrite(file, records):
    """Makes a shard of other records, with a sidecar that fits."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(bytes(record))
    writer.close()
    write_file(file, file.read_bytes())
