"""Which image and which seed stand at each place of training: a formula, not a state."""

from typing import NamedTuple

import numpy as np

from tinyvit_jax.data import draws


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
