"""Counter-based random numbers: every draw is a pure function of (seed, slot).

A generator with a state would tie each draw to the ones before it; here the third draw of view 7 is
the same number whatever else was drawn, on any machine, in any process, with any numpy. The mixing
function is SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014). Frozen: stores written years
ago replay through these few lines, so a change here is a new augmentation version.
"""

import functools

import numpy as np

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = 4


def hash64(*words: int) -> int:
    """Hashes integers (each taken modulo 2**64, order matters) to one of 64 bits."""
    h = 0
    for word in words:
        h = _take(h, word)
    return h


def _take(h: int, word: int) -> int:
    """The state that follows state `h` when a word is hashed."""
    z = (h + word + _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _hash64_array(h: int, words: np.ndarray) -> np.ndarray:
    """`hash64` continued from state `h` by one word each: uint64 [n] -> uint64 [n]."""
    z = words.astype(np.uint64) + np.uint64((h + _GAMMA) & _MASK)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def unit(seed: int, slot: int) -> float:
    """A uniform number in [0, 1), 53 bits, from a seed and the number of the draw."""
    return (_take(_begin(seed), slot) >> 11) * 2.0**-53


# A view draws some forty numbers from one seed, whose half of the hash is always the same.
_begin = functools.lru_cache(maxsize=1024)(hash64)


def shuffled(position: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Where a seeded permutation of range(size) sends each position.

    A Feistel network over the next even power of two, walked until it lands inside: no table, so
    one of 14 million positions costs what one of ten costs.

    Args:
        position: integers [n] in [0, size).
        size: length of the permuted range.
        seed: which permutation.

    Returns:
        int64 [n], a bijection of range(size) in `position`.
    """
    position = np.asarray(position, np.int64)
    if position.size and (position.min() < 0 or position.max() >= size):
        raise ValueError(f"positions must lie in [0, {size}), found {position.min()} to "
                         f"{position.max()}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low_mask = np.uint64((1 << half) - 1)
    keys = [hash64(seed, size, r) for r in range(_ROUNDS)]
    x = position.astype(np.uint64)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> np.uint64(half), x[todo] & low_mask
        for key in keys:
            left, right = right, left ^ (_hash64_array(key, right) & low_mask)
        x[todo] = (left << np.uint64(half)) | right
        todo = todo[x[todo] >= np.uint64(size)]
    return x.astype(np.int64)


def view_seeds(seed: int, pass_number: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The 32-bit seed of the view of image `index` in pass `pass_number`: int [n] -> uint32 [n]."""
    h = _hash64_array(hash64(seed), np.asarray(pass_number))
    z = _hash64_array(0, h + np.asarray(index).astype(np.uint64))
    return (z >> np.uint64(32)).astype(np.uint32)
