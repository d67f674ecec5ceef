"""The token embedding and the output layer of a checkpoint: stored once, twice, or as two different tables."""

import numpy as np

from qlora_jax.io.safetensors import TensorFolder

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 4096  # compared at once


def stores_another_head(tensors: TensorFolder) -> bool:
    """Whether a checkpoint holds an output layer whose values are not the embedding's."""
    if not {EMBEDDING, HEAD} <= tensors.names:
        return False
    table, head = tensors.read(EMBEDDING), tensors.read(HEAD)
    if table.shape != head.shape:
        return True
    return any(not _equal(table[i : i + ROWS], head[i : i + ROWS]) for i in range(0, len(table), ROWS))


def read_head_as_embedding(tensors: TensorFolder) -> None:
    """Where a tied checkpoint holds only its output layer: that is the embedding, too."""
    if HEAD in tensors.names and EMBEDDING not in tensors.names:
        tensors.rename(HEAD, EMBEDDING)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype == b.dtype:
        return a.tobytes() == b.tobytes() or np.array_equal(a, b)
    return np.array_equal(a.astype(np.float32), b.astype(np.float32))
