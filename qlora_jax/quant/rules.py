"""Which weight is stored how: rules from module paths to formats, and what becomes of what a folder has packed."""

import dataclasses
import fnmatch
from typing import Any, Literal

from qlora_jax.config import QuantSection
from qlora_jax.quant.formats import FORMATS, NF4, PLAIN, Format

QUANT = ("auto", "none", "nf4")
# The two tables that configurations name; every other matrix is a projection of a layer.
EMBEDDING, HEAD = "embed_tokens", "lm_head"
# Of models with inputs of each layer's own: stored as the embedding is.
LAYER_TABLE = "per_layer.embed_tokens_per_layer"


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a model's matrices are stored. Norms and biases never are anything but plain.

    Attributes:
      formats: (pattern of module paths, as `fnmatch` has them, format): the first that matches holds; none is plain.
      held: what becomes of the layers of a folder that packs any of them: "kept", those packed and those not;
        "completed", the others are packed too; "unpacked", all become plain.
      experts: "held" in their folder's own format where it packs them; "formats", whatever it does.
    """

    formats: tuple[tuple[str, Format], ...] = ()
    held: Literal["kept", "completed", "unpacked"] = "kept"
    experts: Literal["held", "formats"] = "held"

    def unpacks(self, *, expert: bool) -> bool:
        """Whether what a folder holds packed is unpacked when it is read."""
        return self.held == "unpacked" or (expert and self.experts == "formats")

    def of(self, module: str) -> Format:
        """The format of the matrix of a module, such as "layers.self_attn.q_proj"."""
        return next((form for pattern, form in self.formats if fnmatch.fnmatchcase(module, pattern)), PLAIN)


AS_HELD = Rules()
UNPACKED = Rules(held="unpacked")


def packed(section: QuantSection, held: Literal["kept", "completed"] = "kept") -> Rules:
    """NF4 for the projections, and for the two tables what the section says."""
    nf4 = NF4(section.double)
    formats = FORMATS | {nf4.name: nf4}
    tables = formats[section.embedding]
    experts: Any = "formats" if section.experts == "nf4" else "held"
    return Rules(
        ((EMBEDDING, tables), (LAYER_TABLE, tables), (HEAD, formats[section.lm_head]), ("*", nf4)), held, experts
    )


def rules_for(quant: str, section: QuantSection | None = None) -> Rules:
    """What `--quant` means.

    Args:
      quant: "nf4" packs every projection, "none" unpacks all, "auto" leaves all as the folder holds it.
      section: how "nf4" packs; the section's defaults where None.

    Raises:
      ValueError: another word.
    """
    if quant not in QUANT:
        raise ValueError(f"quant={quant!r}: expected one of {', '.join(QUANT)}")
    if quant == "nf4":
        return packed(section or QuantSection(), held="completed")
    return UNPACKED if quant == "none" else AS_HELD
