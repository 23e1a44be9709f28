"""Pictures that pixel operations are tried on, and how far two results are apart."""

import cv2
import numpy as np

FILL = (124, 116, 104)


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture with the soft structure of a photograph over the full range of levels."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 4), None, 0, 255, cv2.NORM_MINMAX)


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


IMAGES = {
    "smooth": smooth_image(96, 80),
    "noise": noise_image(61, 75),
    "dark": smooth_image(64, 64) // 3 + 7,
    "flat": np.full((32, 48, 3), 77, np.uint8),
    "two levels": np.repeat(np.uint8([[[10], [200]]] * 9), 3, 2),
}


def differ(ours: np.ndarray, pil) -> np.ndarray:
    return np.abs(ours.astype(int) - np.asarray(pil).astype(int))
