"""Whether a store is the one that a run needs: every field of it, and the pixels it was made of.

A store of other images, views, classes or another teacher trains without a word and for nothing.
So before the first update every field of its manifest is held against the run, a few views are
replayed and held against the capture's, and what the store is stays on record in the workdir.
"""

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Protocol

import ml_collections
import numpy as np

from tinyvit_jax import log, teachers
from tinyvit_jax.data import augment, images, pipeline
from tinyvit_jax.data.order import AnyOrder, StoredOrder
from tinyvit_jax.store.manifest import Manifest, StoreError, compare, explain_replay, flatten
from tinyvit_jax.store.store import Store

_REPLAYED = 8  # views, of the first pass
_LIBRARIES = {  # whose versions decide pixels: the first distribution that is installed counts
    "opencv": ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless",
               "opencv-contrib-python"),
    "pillow": ("pillow",), "numpy": ("numpy",), "simplejpeg": ("simplejpeg",)}
# Fields that say how a store is cut or called, and not what a target means.
_LAYOUT = ("passes", "shard_views", "replay.versions", "format_version", "image_set.name")


class Shown(Protocol):
    """The images of a run and how they are shown, as far as a store decides them."""

    @property
    def train(self) -> images.ImageSource: ...  # noqa: D102
    @property
    def order(self) -> AnyOrder: ...  # noqa: D102


def check_store(store: Store, config: ml_collections.ConfigDict, data: Shown, spec: augment.Spec,
                alone: bool = True) -> None:
    """Holds a store's manifest against a run: images, views, classes, teacher, temperature, K.

    Args:
        store: that the run learns from.
        config: of the run.
        data: its images, and the order it shows them in.
        spec: its augmentation.
        alone: whether this is the only process. Several may see other folders each, and all read a
            checkpoint together: so a teacher's workdir is then left unread.

    Raises:
        StoreError: names every field that differs, both values and the remedy.
    """
    own, s = store.manifest, config.store
    wanted = {
        "image_set.fingerprint": data.train.fingerprint, "image_set.images": len(data.train),
        "class_names": tuple(data.train.class_names), "augment": augment.to_dict(spec),
        "keys": "stored" if isinstance(data.order, StoredOrder) else "formula",
        "data_seed": data.order.seed, "views_per_pass": data.order.views_per_pass,
        "temperature": s.temperature, "tail": s.tail,
        # A store may hold more than a run shows.
        "top_k": max(s.top_k, own.top_k), "passes": max(s.passes, own.passes),
        **_describe_teacher(config.teacher, own)}
    wanted = flatten(json.loads(json.dumps(wanted)))
    found = {name: value for name, value in flatten(own.to_dict()).items()
             if name in wanted or name.startswith("augment.")}
    remedy = (
        "Set the config to the store's values (data.source, data.seed, augment, model.image_size, "
        "teacher, store.temperature, store.tail; store.top_k and store.passes may be smaller), or "
        f"name another folder by --config.store.path and make it with: {own.command}")
    compare(store.path, wanted, found, remedy)
    _check_teacher(store, config, alone)


def _describe_teacher(section: ml_collections.ConfigDict, own: Manifest) -> dict:
    """What a config says of its one teacher besides its weights; nothing where it names none."""
    if section.ensemble or not (section.weights or ":" in section.name):
        return {}
    if ":" in section.name:  # a file of functions has one hash for all of them
        return {"teacher.name": section.name}
    said = {"dtype": section.dtype, "image_size": section.image_size, "mean": section.mean,
            "std": section.std}
    return {f"teacher.{key}": value for key, value in said.items() if value and key in own.teacher}


def _check_teacher(store: Store, config: ml_collections.ConfigDict, alone: bool) -> None:
    """Raises StoreError where the store is of other weights than pinned, or than those here."""
    stored, pin = store.manifest.teacher.get("weights", ""), config.store.teacher.lower()
    if not stored.startswith(pin):
        raise StoreError(
            f"The store {store.path} is not the one this run needs: teacher.weights is {stored!r} "
            f"in the store, and --config.store.teacher={pin} must be how it begins. Name the store "
            f"of that teacher by --config.store.path, capture it with {store.manifest.command}, or "
            f"set --config.store.teacher to the teacher you mean.")
    why = _why_not_hashed(config.teacher, stored, alone)
    if why:
        # Then the name is all there is to go by; stores that were merged have one of several.
        said = config.teacher.name and not config.teacher.ensemble
        if said and stored and not store.manifest.origin:
            compare(store.path, {"teacher.name": config.teacher.name},
                    {"teacher.name": store.manifest.teacher.get("name")},
                    f"Set --config.teacher.name to the store's (or to nothing), or name another "
                    f"folder by --config.store.path and capture it with: {store.manifest.command}")
        if config.teacher.weights or not config.teacher.epochs:  # else the run taught it itself
            log.logger.info("store %s: %s, so its hash was not compared with the store's (%s).",
                            store.path, why, stored[:16] or "none")
        return
    compare(store.path, {"teacher.weights": teachers.hash_teacher(config.teacher)},
            {"teacher.weights": stored},
            f"Set --config.teacher.weights to the weights that the store was captured with (or to "
            f"nothing, where they are not here), or name another folder by --config.store.path and "
            f"capture it with: {store.manifest.command}")


def _why_not_hashed(section: ml_collections.ConfigDict, stored: str, alone: bool) -> str:
    """Why the teacher's weights cannot be held against the store's hash of them; "" = they can."""
    if not stored:
        return "it does not say which weights its teacher had"
    members = teachers.list_members(section)
    if any(":" in member.name for member in members):
        return "its teacher is a function of your own"
    paths = [member.weights for member in members]
    if not all(path and Path(path).exists() for path in paths):
        return "the weights of its teacher are not here"
    if not alone and any(Path(path).is_dir() for path in paths):
        return "the weights of its teacher are a workdir, left unread by one process of several"
    return ""


def make_replay(source: images.ImageSource, spec: augment.Spec, order: AnyOrder) -> dict:
    """What a manifest keeps of a few views spread over its first pass (`Manifest.replay`).

    The same images, spec and order give the same places, and on a machine that replays as this one
    does the same hashes.
    """
    count = min(_REPLAYED, order.views_per_pass)
    places = [[0, i * (order.views_per_pass - 1) // max(count - 1, 1)] for i in range(count)]
    _, hashes = _hash_views(pipeline.Views(source, spec, order), places)
    return {"views": places, "sha256": hashes, "versions": read_versions()}


def _hash_views(views: pipeline.Views, places: list) -> tuple[list[images.Example], list[str]]:
    """The images at some places, [pass, position] each, and the hashes of their views."""
    pass_number, position = np.array(places, np.int64).T
    examples, pixels = views.replay(pass_number, position)
    return examples, [hashlib.sha256(view.tobytes()).hexdigest() for view in pixels]


def read_versions() -> dict[str, str]:
    """The versions of the installed libraries that decide pixels."""
    versions = {}
    for library, distributions in _LIBRARIES.items():
        for distribution in distributions:
            try:
                versions[library] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
            break
    return versions


def check_replay(store: Store, data: Shown, spec: augment.Spec, mode: str) -> None:
    """Replays the few views that a manifest knows the hashes of, as training does.

    Args:
        store: that the run learns from.
        data: its images, and the order it shows them in.
        spec: its augmentation.
        mode: what to do about other pixels: "refuse" | "warn".

    Raises:
        StoreError: a view has other pixels here than at the capture, and `mode` is "refuse".
    """
    replay = store.manifest.replay
    if not replay:
        log.logger.info("store %s: its manifest knows no hashes of views, so nobody can tell "
                        "whether they are replayed here as at its capture.", store.path)
        return
    examples, hashes = _hash_views(pipeline.Views(data.train, spec, data.order), replay["views"])
    wrong = [i for i, found in enumerate(hashes) if found != replay["sha256"][i]]
    if not wrong:
        return
    i = wrong[0]
    pass_number, position = replay["views"][i]
    message = (
        f"{len(wrong)} of {len(hashes)} views have other pixels here than those the teacher of the "
        f"store {store.path} saw. The first is pass {pass_number}, position {position} (image "
        f"{examples[i].key}): replay.sha256[{i}] is {replay['sha256'][i]!r} in the store, "
        f"{hashes[i]!r} here. {explain_replay(replay['versions'], read_versions())}")
    if mode == "refuse":
        raise StoreError(f"{message} Else capture again with: {store.manifest.command}; or set "
                         f"--config.store.replay=warn to go on with views that the teacher did not "
                         f"quite see.")
    log.logger.warning("%s The run goes on, as store.replay=warn asks.", message)


def describe(manifest: Manifest) -> dict:
    """The fields that decide what a target means, flat, and their sha256 as "identity".

    Passes may be added to a store and its shards be cut otherwise: it stays the same. Blocks may
    not, as the codec chooses its steps by the block. The names of the classes are hashed.
    """
    fields = manifest.to_dict()
    names = json.dumps(fields.pop("class_names")).encode("utf-8")
    fields["class_names"] = hashlib.sha256(names).hexdigest()
    flat = {name: value for name, value in sorted(flatten(fields).items())
            if not any(name == own or name.startswith(own + ".") for own in _LAYOUT)}
    return {"identity": hashlib.sha256(json.dumps(flat).encode("utf-8")).hexdigest(), **flat}


def record_store(store: Store, workdir: Path, write: bool = True) -> None:
    """Writes WORKDIR/store.json, or checks that the run began with this very store.

    Args:
        store: that the run learns from.
        workdir: of the run.
        write: False in all processes but one.

    Raises:
        StoreError: the workdir's run learned from another store; names the fields that differ.
    """
    path = workdir / "store.json"
    now = describe(store.manifest)
    before = log.read_json(path)
    if before is None:
        if write:
            log.write_json(path, now)
        return
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    if changed:
        listed = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
                           for name in changed[:6])
        raise StoreError(
            f"The store {store.path} is not the one that the run in {workdir} began with: "
            f"{listed}. Put that store back, or name it by --config.store.path; to learn from this "
            f"one, start a run in another --workdir.")
