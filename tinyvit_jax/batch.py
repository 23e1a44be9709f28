"""The one thing that travels from the host tower to the device tower."""

from typing import NotRequired, TypedDict

import numpy as np


class Batch(TypedDict):
    """B views and what is to be learned from them; pairs (2k, 2k+1) are adjacent and mix together.

    On the host the arrays hold this process's rows; mesh.py makes them global ones.
    """

    image: np.ndarray  # uint8 [B, H, W, 3], RGB, replayed and not yet normalised
    label: np.ndarray  # int32 [B]
    weight: np.ndarray  # float32 [B], 1 for a real row and 0 for padding
    labels: NotRequired[np.ndarray]  # int32 [B, M], every right class, filled up with -1
    index: NotRequired[np.ndarray]  # int32 [B, K], the teacher's top classes
    prob: NotRequired[np.ndarray]  # float32 [B, K], their probabilities, descending
    log_prob: NotRequired[np.ndarray]  # float32 [B, C] of a live teacher; added on the device
    lam: NotRequired[np.ndarray]  # float32 [B/2], weight of the own label of both rows of a pair
    box: NotRequired[np.ndarray]  # int32 [B/2, 4], y0 x0 y1 x1 of CutMix; empty for mixup
