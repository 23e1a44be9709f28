"""Makes new stores out of stores of teacher logits, exports them, and says what is in them.

Every command names the store by --config=... and --workdir=... or --config.store.path=IN, and its
images by --config.data.source; one that was killed goes on when it is started again.

    --do=subset --out=NEW [--passes=0,1] [--classes=a,b] [--images=FILE] [--top_k=5]
        Fewer passes, images (FILE: a key, as class/image.jpg, a line), classes or a smaller K.
    --do=merge --with=STORE[,STORE] --out=NEW
        The parts of one capture, or passes of the same images with other seeds, in one store.
    --do=merge --with=STORE --with_source=folder:/b --out_source=folder:/all --out=NEW
        More images: STORE is of --with_source, and --out_source holds its images and the store's.
    --do=export --out=FILE.parquet [--passes=0,1]
    --do=stats [--out=FILE.json] [--views=100000]

More passes of a store need no edit: raise --config.store.passes and run tools/save_logits.py again.
"""

from pathlib import Path

from absl import flags

from tinyvit_jax import cli, log
from tinyvit_jax.config import ConfigError

cli.define_flags()
_TAKES = {"subset": "out passes classes images top_k", "merge": "out with with_source out_source",
          "export": "out passes labels", "stats": "out views labels"}
_DO = flags.DEFINE_enum("do", None, list(_TAKES), "What to do.", required=True)
_OUT = flags.DEFINE_string("out", "", "The new store, or the file to write.")
_PASSES = flags.DEFINE_list("passes", None, "Numbers of the passes to take; default all.")
_CLASSES = flags.DEFINE_list("classes", None, "Take the images of these classes alone.")
_IMAGES = flags.DEFINE_string("images", None, "A file with the key of an image a line: take these.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Classes of a view to keep; default all.")
_WITH = flags.DEFINE_list("with", [], "Stores to merge with that of the config.")
_WITH_SOURCE = flags.DEFINE_list("with_source", [], "Their images, where they are others.")
_OUT_SOURCE = flags.DEFINE_string("out_source", "", "All images of all the stores.")
_VIEWS = flags.DEFINE_integer("views", 100_000, "How many views stats looks at.", lower_bound=1)
_LABELS = flags.DEFINE_bool("labels", True, "Read keys and labels of the images for export and "
                            "stats; --nolabels where the images are not at hand.")


def main() -> None:
    """Opens the store of the config and does what --do says."""
    config, workdir = cli.read_flags()
    _check_flags(_DO.value, _OUT.value)
    from tinyvit_jax import matching, plots, recipe, train
    from tinyvit_jax.store import edit, stats
    from tinyvit_jax.store.store import open_store

    passes = None if _PASSES.value is None else [int(word) for word in _PASSES.value]
    store = open_store(recipe.store_place(config, workdir))
    needed = _CLASSES.value or _IMAGES.value or _OUT_SOURCE.value or (
        _LABELS.value and _DO.value in ("export", "stats"))
    source = train.open_data(config, evaluated=False).train if needed else None
    if _DO.value == "subset":
        pixels = edit.Pixels(lambda: source or train.open_data(config, evaluated=False).train,
                             matching.check_replay, matching.make_replay, config.store.replay)
        print(edit.describe(edit.subset(
            store, _OUT.value, source, passes=passes, images=_IMAGES.value, classes=_CLASSES.value,
            top_k=_TOP_K.value, pixels=pixels)))
    elif _DO.value == "merge":
        print(edit.describe(_merge(config, store, source)))
    elif _DO.value == "export":
        views = edit.export(store, _OUT.value, passes, source)
        print(f"{_OUT.value}: {views:,} views, {Path(_OUT.value).stat().st_size:,} bytes")
    else:
        path = Path(_OUT.value or workdir / "store_stats.json")
        found = stats.compute(store, source, _VIEWS.value)
        log.write_json(path, found)
        plots.plot_stats(found, path.with_suffix(".png"))
        print(f"{stats.format_table(found)}\n\n{path} and {path.with_suffix('.png')} have it all")


def _check_flags(do: str, out: str) -> None:
    """Raises ConfigError for a flag that --do=... does not take, or lacks, or cannot read."""
    every, own = ({*text.split()} for text in (" ".join(_TAKES.values()), _TAKES[do]))
    for other in sorted(name for name in every - own if flags.FLAGS[name].present):
        raise ConfigError(f"--do={do} does not take --{other}. It takes --"
                          f"{', --'.join(sorted(own))}.")
    if not out and do != "stats":
        raise ConfigError(f"--do={do} writes something new: name it by --out=...")
    if "://" in out and do in ("export", "stats"):
        raise ConfigError(f"--do={do} writes a local file, found --out={out}. Name one, and copy "
                          f"it to the bucket.")
    if out and do == "stats" and not out.endswith(".json"):
        raise ConfigError(f"--out={out} cannot be taken: expected a name that ends in .json; the "
                          f"picture is written beside it, as .png.")
    words = _PASSES.value or []
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"--passes={','.join(words)} cannot be taken: expected numbers "
                          f"with commas between, as --passes=0,1.")


def _merge(config, store, source):
    """Merges the store of the config with those of --with."""
    from tinyvit_jax.data.images import open_source
    from tinyvit_jax.store import merge
    from tinyvit_jax.store.store import open_store

    stores = [store, *map(open_store, _WITH.value)]
    if source is None and not _WITH_SOURCE.value:
        return merge.merge(stores, _OUT.value)
    if source is None or len(_WITH_SOURCE.value) != len(_WITH.value):
        raise ConfigError("Stores of other images are merged with --with_source, one for each of "
                          "--with, and --out_source, which holds the images of all of them.")
    opened = [open_source(name, config.data.train_split, config.data.data_dir)
              for name in (*_WITH_SOURCE.value, _OUT_SOURCE.value)]
    return merge.extend(stores, [source, *opened[:-1]], opened[-1], _OUT.value)


if __name__ == "__main__":
    cli.run_command(main)
