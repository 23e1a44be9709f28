"""Brings a store of teacher logits of Microsoft's TinyViT into one that this package trains from.

python tools/import_store.py --config=configs/21m.py:22k_distill --from=/path/teacher_logits \
    --config.augment.spec=microsoft [--config.store.path=STORE] [--teacher=clip_vit_l14]

--from is the folder with the original's logits_top100_epoch0, logits_top100_epoch1 ...; all of its
epochs become passes, in order. The config names the images by data.source: all that the store was
made of. Keys that are names (ImageNet-22k) are found by file name; keys that are numbers count the
files as torchvision's ImageFolder sorts them. (Where the original read a train.tar instead, it
counted in timm's order, which its files do not tell: such a store cannot be brought in.)

It resumes at the first missing shard; epochs that are added to --from later are added here.
"""

from pathlib import Path

from absl import flags

from tinyvit_jax import cli, cores

cli.define_flags()
_FROM = flags.DEFINE_string("from", None, "Folder with the original's logits_top*_epoch* folders.",
                            required=True)
_PROCESSES = flags.DEFINE_integer("processes", 0, "How many write; 0 = one for each usable core.",
                                  lower_bound=0)
_TEACHER = flags.DEFINE_string("teacher", "", "Name of the teacher, as far as it is known.")


def main() -> None:
    """Imports what is missing."""
    config, workdir = cli.read_flags()
    from tinyvit_jax import importing, recipe, train
    from tinyvit_jax.config import mixes

    importing.check_spec(config.augment.spec)
    data = train.open_data(config, evaluated=False)
    place = recipe.store_place(config, workdir)
    store = importing.import_store(
        Path(_FROM.value), place, data.train, importing.Settings(
            spec=recipe.make_views(config, data).spec, paired=mixes(config),
            top_k=config.store.top_k, teacher=_TEACHER.value,
            shard_views=config.store.shard_views, block_views=config.store.block_views,
            processes=_PROCESSES.value or cores.count_cores()))
    m = store.manifest
    print(f"{store.path}: complete, {m.passes} passes of {m.views_per_pass:,} views, "
          f"{store.bytes_per_view():.1f} bytes a view. Train from it with "
          f"--config.store.path={store.path} --config.store.passes={m.passes} "
          f"--config.store.top_k={m.top_k} --config.augment.spec=microsoft")


if __name__ == "__main__":
    cli.run_command(main)
