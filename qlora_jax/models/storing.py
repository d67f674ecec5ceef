"""How a model's parameters are stored by rules, and which rules a geometry can have."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.table import Param, table
from qlora_jax.quant.formats import PLAIN, Format
from qlora_jax.quant.rules import EMBEDDING, HEAD, Rules

# Their fields in the configuration's section `quant`.
FIELDS = {EMBEDDING: "embedding", HEAD: "lm_head"}


def format_of(param: Param, rules: Rules) -> Format:
    """How a parameter is stored; norms and biases are never packed."""
    return rules.of(param.module) if param.matrix else PLAIN


def check_storage(config: ModelConfig, rules: Rules, host_embedding: bool) -> None:
    """Refuses what a model of this geometry cannot have. Raises ValueError."""
    if config.tie_embeddings:
        _check_tied(config, rules, host_embedding)
    for module, field in FIELDS.items():
        param = table(config).get(f"{module}.weight")
        if param:
            rules.of(module).check_table(param.shape, f"quant.{field}")


def _check_tied(config: ModelConfig, rules: Rules, host_embedding: bool) -> None:
    """Refuses storing one table in two ways, with all that is to be changed."""
    head, embedding = rules.of(HEAD).name, rules.of(EMBEDDING).name
    asked, changes = [], []
    if host_embedding:
        asked.append("model.embedding='host'")
        changes.append("model.embedding='device'")
    if head not in ("none", embedding):
        asked.append(f"quant.lm_head={head!r}")
        changes.append(f"quant.embedding={head!r} (now {embedding!r})")
    if asked:
        raise ValueError(
            f"{' and '.join(asked)}: this {config.family} model's output layer is its embedding, stored once, on the "
            f"device: set {' and '.join(changes)}"
        )
