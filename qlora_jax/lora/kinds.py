"""The kinds of adapters, by the names that `lora.variant` and PEFT's settings give them."""

from typing import NamedTuple

from qlora_jax.lora.adapter import Adapter, ExpertAdapter, LinearAdapter
from qlora_jax.lora.experts import ExpertLoRA
from qlora_jax.lora.low_rank import LoRA


class Kind(NamedTuple):
    """A variant: the class that computes it, and the switch by which PEFT's adapter_config.json names it.

    `experts` computes it on a mixture's experts; None where it is for linear layers alone.
    """

    linear: type[LinearAdapter]
    switch: str | None
    experts: type[ExpertAdapter] | None = None

    def of(self, experts: int) -> type[Adapter]:
        """What adapts a module of so many experts, or with 0 a linear layer. Raises NotImplementedError for none."""
        if not experts:
            return self.linear
        if self.experts is None:
            raise NotImplementedError(
                f"{self.linear.__name__} adapts linear layers alone: leave the experts out of lora.targets, or choose "
                "another lora.variant"
            )
        return self.experts


KINDS = {"lora": Kind(LoRA, None, ExpertLoRA), "rslora": Kind(LoRA, "use_rslora", ExpertLoRA)}
