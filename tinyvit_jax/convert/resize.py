"""Resizing the bias tables of window attention and tables of positions, in numpy."""

import math

import numpy as np

_A = -0.75  # torch's bicubic kernel; jax.image.resize has -0.5


def resize_bias_table(table: np.ndarray, window: int) -> np.ndarray:
    """Fits a table of attention biases to windows of another size.

    The rows of a table are (|dy|, |dx|) images, resized as the original does: bicubic, corners not
    aligned, no antialiasing.

    Args:
        table: float [heads, v*v] of windows of v by v tokens.
        window: the new w.

    Returns:
        float32 [heads, w*w].

    Raises:
        ValueError: the table is not of square windows.
    """
    old = math.isqrt(table.shape[-1])
    if table.ndim != 2 or old * old != table.shape[1]:
        raise ValueError(f"a table of attention biases has shape {table.shape}; expected "
                         "[heads, w*w] of a square window")
    weights = bicubic_matrix(old, window)
    images = table.astype(np.float64).reshape(-1, old, old)
    resized = np.einsum("ya,hab,xb->hyx", weights, images, weights)
    return resized.reshape(len(table), window * window).astype(np.float32)


def resize_positions(table: np.ndarray, tokens: int, first: int = 1) -> np.ndarray:
    """Fits a table of positions to a square grid of another size.

    Bicubic with torch's kernel, corners not aligned, no antialiasing; the rows of the tokens that
    come before the patches' stay.

    Args:
        table: float [first + g*g, C].
        tokens: first + n*n of the new grid.
        first: tokens before the patches'.

    Returns:
        float32 [first + n*n, C].
    """
    old, new = math.isqrt(len(table) - first), math.isqrt(tokens - first)
    weights = bicubic_matrix(old, new)
    grid = table[first:].astype(np.float64).reshape(old, old, -1)
    resized = np.einsum("ya,abc,xb->yxc", weights, grid, weights, optimize=True)
    return np.concatenate([table[:first], resized.reshape(new * new, -1)]).astype(np.float32)


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Weights of each of `old` samples in each of `new`: float64 [new, old], rows sum to 1.

    Keys' cubic convolution with a = -0.75 at sample centres; beyond the border the outermost sample
    repeats.
    """
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(at).astype(int) - 1
    matrix = np.zeros((new, old))
    for tap in range(4):
        weight = _cubic(np.abs(at - (first + tap)))
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), weight)
    return matrix


def _cubic(t: np.ndarray) -> np.ndarray:
    """Keys' kernel at distances t in [0, 2]."""
    near = ((_A + 2) * t - (_A + 3)) * t * t + 1
    far = ((_A * t - 5 * _A) * t + 8 * _A) * t - 4 * _A
    return np.where(t <= 1, near, far)
