"""What is compared: each method as a change to one configuration."""

import dataclasses
from collections.abc import Callable

from qlora_jax.config import Config
from qlora_jax.report.methods import TITLES
from qlora_jax.training.setup import with_method

Change = Callable[[Config], Config]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the comparison.

    Attributes:
      name: its key in compare.json, and the beginning of its runs' folders.
      title: for people.
      change: the given configuration as this method trains it.
      base_format: a key of formats.FORMATS to which the base's projections are rounded beforehand, in 16-bit storage;
        such a row measures quality, and its memory is not that of 4 bits.
    """

    name: str
    title: str
    change: Change
    base_format: str | None = None


def by_method(name: str, *changes: Change) -> Change:
    """The configuration with `method` set, then changed further."""

    def change(config: Config) -> Config:
        config = with_method(config, name)
        for one in changes:
            config = one(config)
        return config

    return change


def with_rank(rank: int) -> Change:
    """Adapters of another rank, their updates scaled as before: alpha changes with the rank."""

    def change(config: Config) -> Config:
        alpha = config.lora.alpha * rank / config.lora.rank
        return dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=rank, alpha=alpha))

    return change


def with_targets(targets: str | tuple[str, ...]) -> Change:
    """Adapters on other layers."""
    return lambda config: dataclasses.replace(config, lora=dataclasses.replace(config.lora, targets=targets))


def without_double(config: Config) -> Config:
    """Block scales in float32."""
    return dataclasses.replace(config, quant=dataclasses.replace(config.quant, double=False))


def in_float32(config: Config) -> Config:
    """Weights that are trained are kept in 32 bits: most updates are smaller than half of bfloat16's spacing."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="fp32"))


# From the one that needs the least memory to the one that needs the most: the allocator's peak never falls.
MAIN = (
    Method(name="qlora", title=TITLES["qlora"], change=by_method("qlora")),
    Method(name="lora", title=f"{TITLES['lora']}, 16-bit base", change=by_method("lora")),
    Method(name="full", title=TITLES["full"], change=by_method("full", in_float32)),
)
RANKS = (1, 2, 4, 8, 16, 32, 64)
ABLATIONS = (
    Method(name="qlora-single", title="QLoRA, no double quantization", change=by_method("qlora", without_double)),
    *(
        Method(name=f"lora-{form}", title=f"LoRA on {words}", change=by_method("lora"), base_format=form)
        for form, words in (("fp4-e2m1", "FP4 E2M1"), ("fp4-e3m0", "FP4 E3M0"), ("int4", "Int4"))
    ),
    *(Method(name=f"qlora-r{r}", title=f"QLoRA, rank {r}", change=by_method("qlora", with_rank(r))) for r in RANKS),
    Method(
        name="qlora-qv", title="QLoRA on q and v only", change=by_method("qlora", with_targets(("q_proj", "v_proj")))
    ),
    Method(name="qlora-all", title="QLoRA on all linear layers", change=by_method("qlora", with_targets("all-linear"))),
)


def distinct(methods: tuple[Method, ...], config: Config) -> tuple[Method, ...]:
    """The methods without those that train what an earlier one trains, such as the configuration's own rank."""
    kept: list[Method] = []
    for method in methods:
        known = [(one.change(config), one.base_format) for one in kept]
        if (method.change(config), method.base_format) not in known:
            kept.append(method)
    return tuple(kept)
