"""The value tables: at most 16 levels for weights, and 256 of bitsandbytes' dynamic 8-bit map for scales."""

import functools

import numpy as np

# Quantiles of N(0, 1), normalised to [-1, 1], with an exact zero (QLoRA, arXiv 2305.14314, appendix E).
NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def _signed(magnitudes: list[int | float]) -> np.ndarray:
    """Ascending float32 levels in [-1, 1] from non-negative magnitudes; zero once."""
    positive = np.array(magnitudes, np.float32) / np.float32(max(magnitudes))
    return np.unique(np.concatenate([-positive, positive]))


# By name. Four bits give 16 codes; where both signs have a zero, 15 levels differ. Training and serving know "nf4"
# alone: the others are what it is compared with.
CODEBOOKS = {
    "nf4": NF4_LEVELS,
    # Two bits of exponent, one of mantissa, with subnormals (OCP Microscaling Formats v1.0, E2M1).
    "fp4-e2m1": _signed([0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    # bitsandbytes' FP4: the same but for its smallest magnitude, which is 0.0625.
    "fp4-bnb": _signed([0, 0.0625, 2, 3, 4, 6, 8, 12]),
    # Three bits of exponent: powers of two.
    "fp4-e3m0": _signed([0, 1, 2, 4, 8, 16, 32, 64]),
    # Integers, symmetric around zero, as scaling by the largest magnitude makes them.
    "int4": _signed([0, 1, 2, 3, 4, 5, 6, 7]),
}


def thresholds(levels: np.ndarray) -> np.ndarray:
    """Decision boundaries between neighbouring levels, float32 `[len(levels) - 1]`, for ascending `levels`."""
    return (levels[:-1] + levels[1:]) / np.float32(2)


@functools.cache
def dynamic_map() -> np.ndarray:
    """bitsandbytes' signed dynamic 8-bit map: float32 `[256]`, ascending, bit for bit.

    Seven decades, each twice as finely divided as the one below it; plus 0 and 1.
    """
    positive = [np.float32(10.0 ** (i - 6)) * _interval_means(2**i) for i in range(7)]
    ends = np.array([0.0, 1.0], np.float32)
    values = np.concatenate([*positive, *(-p for p in positive), ends])
    levels = np.sort(values).astype(np.float32)
    levels.setflags(write=False)
    return levels


def _interval_means(intervals: int) -> np.ndarray:
    """Midpoints of `intervals` equal parts of [0.1, 1].

    torch.linspace steps in float32, rounds each edge once (a fused multiply-add) and counts the upper half down from
    the end; numpy's linspace differs by an ulp in places.
    """
    start, end = np.float32(0.1), np.float32(1.0)
    step = np.float64((end - start) / np.float32(intervals))
    index = np.arange(intervals + 1)
    up = start + step * index
    down = end - step * (intervals - index)
    edges = np.where(index < (intervals + 1) // 2, up, down).astype(np.float32)
    return (edges[:-1] + edges[1:]) / np.float32(2)
