"""What MXFP4's numbers mean: OCP Microscaling Formats 1.0, sections 5.3 and 6.3."""

import numpy as np

# Elements that share a scale.
BLOCK = 32
# E2M1: the code's low three bits are an exponent and one bit of fraction, the fourth is the sign.
LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
# Exponent of the largest level, 6 = 1.5 · 2².
LARGEST_EXPONENT = 2
# E8M0: a scale is 2^(code - BIAS). 255 is no number.
BIAS, NOT_A_NUMBER = 127, 255


def check_blocks(shape: tuple[int, ...]) -> None:
    """Refuses matrices whose rows are no whole blocks. Raises ValueError."""
    if shape[-1] % BLOCK:
        raise ValueError(
            f"MXFP4 needs rows of a multiple of {BLOCK} elements, this matrix is {tuple(shape[-2:])}: "
            "store it as NF4, int8 or plain"
        )
