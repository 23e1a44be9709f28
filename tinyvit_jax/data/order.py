"""Which image and which seed stand at each place of training: a formula, or what a store says.

Neither has a state: place in, image and seed out.
"""

from typing import NamedTuple

import numpy as np

from tinyvit_jax.data import draws
from tinyvit_jax.store.manifest import StoreError
from tinyvit_jax.store.store import Store


class Order(NamedTuple):
    """Passes over an image set, each in its own seeded permutation.

    View number v of a run is position v % views_per_pass of pass v // views_per_pass. Where pairs
    are mixed, a pass has an even number of views: an odd set shows its first image once more.
    """

    seed: int
    num_images: int
    paired: bool

    @property
    def views_per_pass(self) -> int:
        """Views in one pass over the images."""
        return self.num_images + (self.num_images % 2 if self.paired else 0)

    @property
    def views_per_epoch(self) -> int:
        """Views in an epoch: as many as there are images."""
        return self.num_images

    def locate(self, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pass and the position of view numbers: int64 [n] -> (int64 [n], int64 [n])."""
        return np.divmod(np.asarray(view, np.int64), self.views_per_pass)

    def keys(self, pass_number: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The image index and the view seed of each place.

        Args:
            pass_number: int [n], from 0.
            position: int [n] in [0, views_per_pass).

        Returns:
            (int64 [n], uint32 [n]).
        """
        image = np.empty(len(position), np.int64)
        for p in np.unique(pass_number):
            here = pass_number == p
            image[here] = draws.shuffled(position[here] % self.num_images, self.num_images,
                                         draws.hash64(self.seed, int(p)))
        return image, draws.view_seeds(self.seed, pass_number, image)


class StoredOrder(NamedTuple):
    """The order that a store with keys of its own keeps: the store drives the run.

    What lies at a place is read from the blocks that hold its target, through the same cache. Past
    the last pass the passes come again. Made by `follow_store`.
    """

    store: Store
    paired: bool

    @property
    def seed(self) -> int:
        """The data seed of the manifest, which decides nothing here."""
        return self.store.manifest.data_seed

    @property
    def num_images(self) -> int:
        """Images of the set that the indices are into."""
        return int(self.store.manifest.image_set["images"])

    @property
    def views_per_pass(self) -> int:
        """Views in one pass."""
        return self.store.manifest.views_per_pass

    @property
    def views_per_epoch(self) -> int:
        """Views in an epoch: one pass, which may show some images twice or not at all."""
        return self.views_per_pass

    def locate(self, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pass and the position of view numbers: int64 [n] -> (int64 [n], int64 [n])."""
        return np.divmod(np.asarray(view, np.int64), self.views_per_pass)

    def keys(self, pass_number: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The image index and the view seed of each place.

        Args:
            pass_number: int [n], from 0.
            position: int [n] in [0, views_per_pass).

        Returns:
            (int64 [n], uint32 [n]).

        Raises:
            StoreError: a shard that holds one of the places is missing or damaged.
        """
        pass_number, position = np.asarray(pass_number, np.int64), np.asarray(position, np.int64)
        image, seed = np.empty(len(position), np.int64), np.empty(len(position), np.uint32)
        cuts = np.flatnonzero((np.diff(position) != 1) | (np.diff(pass_number) != 0)) + 1
        for run in np.split(np.arange(len(position)), cuts):
            if len(run):
                first = int(position[run[0]])
                image[run], seed[run] = self.store.keys(
                    int(pass_number[run[0]]) % self.store.manifest.passes, first, first + len(run))
        return image, seed


AnyOrder = Order | StoredOrder


def follow_store(order: AnyOrder, store: Store) -> AnyOrder:
    """The order of a run that learns from a store: the store's own, where it keeps one.

    Args:
        order: of the config.
        store: that the run learns from.

    Raises:
        StoreError: the store is of other images, or cannot be cut into pairs where pairs are mixed.
    """
    if store.manifest.keys != "stored":
        return order
    stored = StoredOrder(store, order.paired)
    if stored.num_images != order.num_images:
        raise StoreError(f"The store {store.path} holds views of {stored.num_images:,} images and "
                         f"this run has {order.num_images:,}. Set --config.data.source to the "
                         f"images of the store ({store.manifest.image_set}).")
    if stored.paired and stored.views_per_pass % 2:
        raise StoreError(f"The store {store.path} has {stored.views_per_pass:,} views a pass, an "
                         f"odd number, and this run mixes views in pairs. It was imported without "
                         f"mixing: set --config.augment.mixup=0 and --config.augment.cutmix=0.")
    return stored
