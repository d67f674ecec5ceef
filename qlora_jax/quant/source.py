"""What can be quantized, in whatever format."""

from jaxtyping import Array

DTYPES = ("bfloat16", "float16", "float32")


def check_source(weight: Array) -> None:
    """Refuses what is no matrix, an empty one, or of another dtype. Raises ValueError."""
    if weight.ndim != 2 or weight.size == 0:
        raise ValueError(f"quantize takes one non-empty matrix [N, K], got shape {weight.shape}: vmap it over a stack")
    if str(weight.dtype) not in DTYPES:
        raise ValueError(f"quantize takes {', '.join(DTYPES)}, got {weight.dtype}")
