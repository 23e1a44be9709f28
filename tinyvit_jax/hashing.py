"""The draws of data/draws.py on a device, in 64-bit words as pairs of uint32.

Accelerators count in 32 bits, and JAX does unless told otherwise for a whole process. Functions
work element by element on arrays of any one shape; a `Word` is (high half, low half), each uint32.
"""

import math

import jax
import jax.numpy as jnp

Word = tuple[jax.Array, jax.Array]

_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = 4
_LOW = 0xFFFFFFFF


def word(value: int | jax.Array) -> Word:
    """A number below 2**64, or an array of integers from 0 to 2**32 - 1, as a Word."""
    if isinstance(value, int):
        return jnp.uint32(value >> 32 & _LOW), jnp.uint32(value & _LOW)
    low = value.astype(jnp.uint32)
    return jnp.zeros_like(low), low


def add(a: Word, b: Word) -> Word:
    """a + b modulo 2**64."""
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]).astype(jnp.uint32), low


def multiply(a: Word, b: Word) -> Word:
    """a * b modulo 2**64."""
    return multiply_high(a[1], b[1]) + a[0] * b[1] + a[1] * b[0], a[1] * b[1]


def multiply_high(a: jax.Array, b: jax.Array) -> jax.Array:
    """The high 32 bits of the product of two uint32, by halves of 16 bits."""
    half, mask = jnp.uint32(16), jnp.uint32(0xFFFF)
    a1, a0, b1, b0 = a >> half, a & mask, b >> half, b & mask
    middle = a1 * b0 + (a0 * b0 >> half)  # at most (2**16 - 1)**2 + 2**16 - 1
    other = a0 * b1 + (middle & mask)
    return a1 * b1 + (middle >> half) + (other >> half)


def take(state: Word, value: Word) -> Word:
    """The state of a hash after one more word: SplitMix64's finaliser, as in draws.hash64."""
    z = add(add(state, value), word(_GAMMA))
    z = multiply(_fold(z, 30), word(0xBF58476D1CE4E5B9))
    z = multiply(_fold(z, 27), word(0x94D049BB133111EB))
    return _fold(z, 31)


def _fold(z: Word, shift: int) -> Word:
    """z ^ (z >> shift), 0 < shift < 32."""
    low = z[1] >> jnp.uint32(shift) | z[0] << jnp.uint32(32 - shift)
    return z[0] ^ z[0] >> jnp.uint32(shift), z[1] ^ low


def hash64(*words: int | Word) -> Word:
    """draws.hash64 of any mixture of numbers and Words."""
    state = word(0)
    for value in words:
        state = take(state, word(value) if isinstance(value, int) else value)
    return state


def draw(seed: jax.Array, slot: int) -> Word:
    """The 64 bits behind draws.unit(seed, slot): uint32 [...] seeds -> Word [...]."""
    return hash64(word(seed), slot)


def uniform(bits: Word) -> jax.Array:
    """draws.unit to 24 bits, rounded down: float32 in [0, 1)."""
    return (bits[0] >> jnp.uint32(8)).astype(jnp.float32) * 2.0**-24


def scaled(bits: Word, count: int) -> jax.Array:
    """int(draws.unit * count) without rounding, for 0 < count <= 2048: int32 in [0, count).

    draws.unit is m / 2**53 for the highest 53 bits m; this is m * count >> 53.
    """
    if not 0 < count <= 2048:
        raise ValueError(f"count={count} cannot work: expected 1 to 2048")
    n = jnp.uint32(count)
    high = bits[0] >> jnp.uint32(11)
    low = bits[1] >> jnp.uint32(11) | bits[0] << jnp.uint32(21)
    return (high * n + multiply_high(low, n) >> jnp.uint32(21)).astype(jnp.int32)


def below(bits: Word, probability: float) -> jax.Array:
    """draws.unit < probability, exactly: bool."""
    least = math.ceil(probability * 2**53) << 11  # of 64 bits, the lowest 11 of which do not count
    if least >> 64:
        return jnp.ones(bits[0].shape, bool)
    high, low = least >> 32, least & _LOW
    own = bits[1] & jnp.uint32(_LOW ^ 0x7FF)
    return (bits[0] < jnp.uint32(high)) | (bits[0] == jnp.uint32(high)) & (own < jnp.uint32(low))


def shuffled(position: jax.Array, size: int, seed: Word) -> jax.Array:
    """draws.shuffled with a permutation of its own for each element.

    Args:
        position: int32 [n] in [0, size).
        size: length of the permuted range, up to 2**31.
        seed: Word [n].

    Returns:
        int32 [n].
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = jnp.uint32((1 << half) - 1)
    base = take(take(word(0), seed), word(size))
    keys = [take(base, word(r)) for r in range(_ROUNDS)]

    def once(x: jax.Array) -> jax.Array:
        left, right = x >> jnp.uint32(half), x & mask
        for key in keys:
            left, right = right, left ^ take(key, word(right))[1] & mask
        return left << jnp.uint32(half) | right

    def walk(x: jax.Array) -> jax.Array:
        return jnp.where(x >= jnp.uint32(size), once(x), x)

    x = jax.lax.while_loop(lambda x: (x >= jnp.uint32(size)).any(), walk,
                           once(position.astype(jnp.uint32)))
    return x.astype(jnp.int32)


def view_keys(seed: int, size: int, pass_number: jax.Array, position: jax.Array
              ) -> tuple[jax.Array, jax.Array]:
    """Order.keys of data/order.py: which image each place shows, and the seed of its view.

    Args:
        seed: of the order.
        size: images of the set.
        pass_number: int32 [n].
        position: int32 [n] in [0, size].

    Returns:
        int32 [n] and uint32 [n].
    """
    permutation = take(hash64(seed), word(pass_number))
    index = shuffled(position % size, size, permutation)
    return index, take(word(0), add(permutation, word(index)))[0]
