"""The kinds of adapters, by the names that `lora.variant` and PEFT's settings give them."""

from typing import NamedTuple

from qlora_jax.lora.adapter import Adapter
from qlora_jax.lora.low_rank import LoRA


class Kind(NamedTuple):
    """A variant: the class that computes it, and the switch by which PEFT's adapter_config.json names it."""

    adapter: type[Adapter]
    switch: str | None


KINDS = {"lora": Kind(LoRA, None), "rslora": Kind(LoRA, "use_rslora")}
