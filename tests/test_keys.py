import numpy as np

from tinyvit_jax.store import keys


def test_digest_and_bits_tell_keys_apart():
    image, seed = np.arange(256), np.arange(256, dtype=np.uint32) * 77
    assert keys.digest(image, seed) == keys.digest(image.astype(np.int32), seed.astype(np.int64))
    swapped = image.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    others = [(swapped, seed), (image, seed + 1), (image + 1, seed), (image[:-1], seed[:-1])]
    digests = {keys.digest(*pair) for pair in [(image, seed), *others]}
    assert len(digests) == 5
    bits = keys.key_bits(image, seed)
    assert set(bits.tolist()) == {0, 1}
    assert 80 < (bits != keys.key_bits(image, seed + 1)).sum() < 176
    assert 80 < (bits != keys.key_bits(image + 1, seed)).sum() < 176
