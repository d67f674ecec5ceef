"""Adding an adapter into a weight."""

import numpy as np


def merged(weight: np.ndarray, A: np.ndarray, B: np.ndarray, scale: float) -> np.ndarray:
    """W + scale · B·A, added in float32 and cast once to the dtype of W `[N, K]`."""
    update = np.float32(scale) * (B.astype(np.float32) @ A.astype(np.float32))
    return (weight.astype(np.float32) + update).astype(weight.dtype)
