"""The token embedding and the output layer of a checkpoint: stored once, twice, or as two different tables."""

import numpy as np

from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.models.names import Names

ROWS = 4096  # compared at once


def stores_another_head(tensors: TensorFolder, names: Names) -> bool:
    """Whether a checkpoint holds an output layer whose values are not the embedding's."""
    if not {names.embedding, names.head} <= tensors.names:
        return False
    table, head = tensors.read(names.embedding), tensors.read(names.head)
    if table.shape != head.shape:
        return True
    return any(not _equal(table[i : i + ROWS], head[i : i + ROWS]) for i in range(0, len(table), ROWS))


def read_head_as_embedding(tensors: TensorFolder, names: Names) -> None:
    """Where a tied checkpoint holds only its output layer: that is the embedding, too."""
    if names.head in tensors.names and names.embedding not in tensors.names:
        tensors.rename(names.head, names.embedding)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype == b.dtype:
        return a.tobytes() == b.tobytes() or np.array_equal(a, b)
    return np.array_equal(a.astype(np.float32), b.astype(np.float32))
