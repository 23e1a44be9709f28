"""Trees of many small arrays as a few long vectors, and back.

An update does the same few sums for every parameter. Written array by array they are a thousand
small kernels, which on a CPU take longer to compile than the model; on long vectors they are ten.
So from gradients to new parameters, and their averages, everything is done on vectors.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Packing(NamedTuple):
    """Which arrays of a tree lie in which vector, one behind the other in the tree's own order."""

    names: tuple[str, ...]  # of each array's vector
    shapes: tuple[tuple[int, ...], ...]  # of each array
    tree: Any  # their jax.tree.structure

    def pack(self, tree: Any) -> dict[str, jax.Array]:
        """A tree of these arrays, float [...], as vectors: {name: float [n]}."""
        parts: dict[str, list[jax.Array]] = {name: [] for name in self.names}
        for name, x in zip(self.names, self.tree.flatten_up_to(tree), strict=True):
            parts[name].append(x.reshape(-1))
        return {name: jnp.concatenate(own) for name, own in parts.items()}

    def unpack(self, vectors: dict[str, jax.Array]) -> Any:
        """The tree that `pack` made the vectors of."""
        used, arrays = dict.fromkeys(vectors, 0), []
        for name, shape in zip(self.names, self.shapes, strict=True):
            start, used[name] = used[name], used[name] + math.prod(shape)
            arrays.append(vectors[name][start:used[name]].reshape(shape))
        return self.tree.unflatten(arrays)

    def spread(self, numbers: Any) -> dict[str, jax.Array]:
        """A tree of one number for each array, as vectors with that number for each element."""
        filled = [jnp.broadcast_to(number, shape) for number, shape in zip(
            self.tree.flatten_up_to(numbers), self.shapes, strict=True)]
        return self.pack(self.tree.unflatten(filled))


def norm(vectors: dict[str, jax.Array]) -> jax.Array:
    """The Euclidean length of all the vectors together, float32."""
    return jnp.sqrt(sum(jnp.square(x).sum() for x in vectors.values()))


def make_packing(params: Any, decayed: Any) -> Packing:
    """The vectors of a model's parameters: "decayed" and "plain", those that there are.

    Args:
        params: arrays, or their shapes.
        decayed: bool for each of them, whether weight decay touches it.
    """
    arrays, tree = jax.tree.flatten(params)
    names = tuple("decayed" if own else "plain" for own in jax.tree.leaves(decayed))
    return Packing(names, tuple(x.shape for x in arrays), tree)
