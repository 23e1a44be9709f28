"""What the keys of a block, image index and view seed of each view, are known by."""

import hashlib

import numpy as np


def digest(image_index: np.ndarray, view_seed: np.ndarray) -> int:
    """The 64-bit digest of the keys of a block, in their order.

    Args:
        image_index: integers [n].
        view_seed: integers [n] in [0, 2**32).
    """
    h = hashlib.blake2b(np.asarray(image_index).astype("<i8").tobytes(), digest_size=8)
    h.update(np.asarray(view_seed).astype("<u4").tobytes())
    return int.from_bytes(h.digest(), "little")


def key_bits(image_index: np.ndarray, view_seed: np.ndarray) -> np.ndarray:
    """One bit of a hash of each view's key, 0 or 1: what a part of a block is known by.

    Args:
        image_index: integers [n].
        view_seed: integers [n] in [0, 2**32).

    Returns:
        uint8 [n].
    """
    z = np.asarray(image_index).astype(np.uint64) << np.uint64(32)
    z ^= np.asarray(view_seed).astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z >> np.uint64(63)).astype(np.uint8)
