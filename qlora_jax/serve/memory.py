"""What serving takes of the GPU's memory: counted from shapes, before any of it is taken."""

from typing import Any, NamedTuple

from qlora_jax.device.facts import device_memory, tree_bytes


class Needs(NamedTuple):
    """Bytes on the device while serving; a step's temporary ones come on top.

    Attributes:
      base: the model.
      texts: keys and values, and states, of all rows.
      adapters: the stacks, as large with empty places as with full ones.
    """

    base: int
    texts: int
    adapters: int

    def __str__(self) -> str:
        parts = (f"{name} {count / 1e9:.2f} GB" for name, count in zip(self._fields, self, strict=True))
        return f"{sum(self) / 1e9:.2f} GB ({', '.join(parts)})"


def needs_of(base: Any, texts: Any, adapters: Any) -> Needs:
    """Of pytrees of arrays or of their shapes."""
    return Needs(*map(tree_bytes, (base, texts, adapters)))


def check_room(needs: Needs) -> None:
    """Refuses what the GPU has no room for. Raises ValueError."""
    limit = device_memory()
    if limit is not None and sum(needs) > limit:
        raise ValueError(
            f"serving needs {needs} on the device, and JAX may use {limit / 1e9:.2f} GB of this GPU: lower slots or "
            "max_length for the texts, max_loras, max_rank or max_expert_rank for the adapters"
        )
