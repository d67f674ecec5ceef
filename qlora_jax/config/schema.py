"""The configuration of a run: its sections and their fields."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from qlora_jax.config.pieces import Pieces
from qlora_jax.config.section import (
    ABOVE_ZERO,
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    BELOW_ONE,
    FRACTION,
    NOT_ZERO,
    NUMBER_OR_SHARE,
    SEED,
    UP_TO_ONE,
    Resume,
    Section,
    option,
    refuse_bad_pattern,
)


@dataclass(frozen=True, kw_only=True)
class ModelSection(Section):
    PREFIX: ClassVar[str] = "config.model"

    path: str = option("", "folder with a Hugging Face model, or its name on the Hub")
    weights: Literal["checkpoint", "random"] = option("checkpoint", "random means untrained weights and no download")
    max_position: int | None = option(None, "longest sequence allowed, in place of the model's own limit", AT_LEAST_ONE)
    dtype: Literal["bf16", "fp32", "fp16"] = option("bf16", "dtype to compute in")
    embedding: Literal["device", "host"] = option(
        "device", "host: keep a frozen, untied embedding in host memory and send only the rows of a step's tokens"
    )
    kernels: Literal["auto", "pallas", "mosaic", "xla"] = option(
        "auto", "kernels for NF4 weights on a GPU", resume="free"
    )
    geometry: str = option("", "a config.json for weights=random; relative to the config file's folder")


@dataclass(frozen=True, kw_only=True)
class QuantSection(Section):
    """How method=qlora stores the base, whose decoder projections are in NF4."""

    PREFIX: ClassVar[str] = "config.quant"

    double: bool = option(True, "also quantize the block scales (saves 0.37 bit per weight)")
    lm_head: Literal["none", "nf4", "int8"] = option("none", "format of the output layer, unless it is tied")
    embedding: Literal["none", "nf4", "int8"] = option(
        "none", "format of the token embedding, and of an output layer tied to it"
    )
    experts: Literal["held", "nf4"] = option(
        "held", "format of experts: held is the checkpoint's own 4-bit format (MXFP4) where it has one, else NF4"
    )


@dataclass(frozen=True, kw_only=True)
class LoraSection(Section):
    PREFIX: ClassVar[str] = "config.lora"

    rank: int = option(16, "rank of the adapters", AT_LEAST_ONE)
    alpha: float = option(16.0, "the update is scaled by alpha/rank (rslora: alpha/sqrt(rank))", NOT_ZERO)
    dropout: float = option(0.0, "dropout probability on the adapters' input", BELOW_ONE)
    targets: str | tuple[str, ...] = option(
        "all-linear",
        "modules to adapt: all-linear, a,comma,list (experts.down_proj are experts) or a regular expression",
    )
    variant: Literal["lora", "rslora"] = option("lora", "how the update is scaled")
    rank_pattern: Mapping[str, int] = option({}, 'rank of matching modules, {"pattern": rank}', AT_LEAST_ONE)
    alpha_pattern: Mapping[str, float] = option({}, 'alpha of matching modules, {"pattern": alpha}', NOT_ZERO)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise ValueError(f"config.lora.targets={self.targets!r}: expected a module, or 'all-linear'")
        if isinstance(self.targets, str):
            refuse_bad_pattern("config.lora.targets", self.targets)
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                refuse_bad_pattern(f"config.lora.{name}", pattern)


@dataclass(frozen=True, kw_only=True)
class DataSection(Section):
    PREFIX: ClassVar[str] = "config.data"

    train: str | tuple[dict, ...] = option(
        "",
        'training rows: a file, folder, pattern or Hub dataset, or a list [{"path", "weight", "split"}]',
        resume="said",
    )
    eval: str | float = option(
        "", "evaluation rows: a file, …, or the fraction of train to hold out", FRACTION, resume="said"
    )
    test: str = option("", "rows that compare.py reports scores on and chooses nothing by: a file, …", resume="free")
    split: str = option("train", "split to train on, of a folder or Hub dataset", resume="said")
    eval_split: str = option("", "split to evaluate on, of a folder or Hub dataset; empty: validation", resume="free")
    test_split: str = option("test", "split for data.test, of a folder or Hub dataset", resume="free")
    packing: bool = option(
        True, "pack several documents into one sequence; attention does not cross them", resume="said"
    )
    train_on: Literal["completions", "all"] = option("completions", "which tokens the loss counts", resume="said")
    long_rows: Literal["cut", "split", "drop"] = option(
        "cut", "what to do with rows longer than train.seq_len", resume="said"
    )
    max_bad_rows: int | float | None = option(
        None,
        "most unusable rows to skip, as a number or a share; none: 10, or 1 % if that is more",
        NUMBER_OR_SHARE,
        resume="free",
    )
    cache: bool = option(True, "cache the encoded rows on disk, for a faster next start", resume="free")
    chat_template: str = option("", "a Jinja file, or chatml, in place of the tokenizer's template", resume="said")
    exact_match: bool = option(
        False, "at every evaluation, generate answers and count the exact matches", resume="said"
    )
    samples: int = option(4, "rows answered before and after training, for the report", AT_LEAST_ZERO, resume="free")

    def __post_init__(self) -> None:
        super().__post_init__()
        for item in self.train if isinstance(self.train, tuple) else ():
            check_source(item)


def check_source(item: dict) -> None:
    """ValueError for an entry of data.train that is no {"path", "weight", "split"}."""
    kinds = {"path": str, "weight": int | float, "split": str}
    fits = item.get("path") and all(name in kinds and isinstance(item[name], kinds[name]) for name in item)
    if not fits or not 0 < item.get("weight", 1) < math.inf:
        raise ValueError(f'config.data.train: {item!r:.120}: expected {{"path"}}, with "weight" (above 0) and "split"')


@dataclass(frozen=True, kw_only=True)
class OptimSection(Section):
    PREFIX: ClassVar[str] = "config.optim"

    learning_rate: float = option(2e-4, "peak learning rate", ABOVE_ZERO, resume="said")
    schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", "learning rate after the warm-up", resume="said"
    )
    warmup_ratio: float = option(0.03, "fraction of the steps used for warm-up", UP_TO_ONE, resume="said")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", AT_LEAST_ZERO, resume="said")
    beta1: float = option(0.9, "Adam's decay rate of the first moment", BELOW_ONE)
    beta2: float = option(0.999, "Adam's decay rate of the second moment", BELOW_ONE)
    eps: float = option(1e-8, "Adam's epsilon", ABOVE_ZERO)
    clip: float = option(0.3, "largest gradient norm; 0 turns clipping off", AT_LEAST_ZERO, resume="said")
    moments: Literal["fp32", "bf16"] = option("fp32", "dtype of Adam's first moment; the second stays fp32")
    gradients: Literal["fp32", "bf16"] = option("fp32", "dtype of the adapters' accumulated gradient")
    offload: Literal["none", "host"] = option(
        "none", "host: keep Adam's moments in host memory, moved one layer at a time", resume="free"
    )


@dataclass(frozen=True, kw_only=True)
class Length(Section):
    """How much is trained on. The run ends after either `steps` or `epochs`; with neither it is one epoch."""

    PREFIX: ClassVar[str] = "config.train"

    steps: int | None = option(None, "optimizer steps", AT_LEAST_ONE, resume="free")
    epochs: float | None = option(
        None, "passes over the training rows; 1 if steps is not given", ABOVE_ZERO, resume="free"
    )
    batch_size: int = option(1, "sequences in one forward pass", AT_LEAST_ONE, resume="said")
    grad_accum: int = option(16, "forward passes per optimizer step", AT_LEAST_ONE, resume="said")
    seq_len: int = option(512, "tokens per sequence", AT_LEAST_ONE, resume="said")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"config.train.steps={self.steps} and config.train.epochs={self.epochs}: "
                "expected only one of them; set the other to None"
            )
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", 1.0)


@dataclass(frozen=True, kw_only=True)
class TrainSection(Pieces, Length):
    """The training loop: its length, its pieces (the same object, seen as Pieces), and what it does beside steps."""

    save_every: int = option(100, "steps between checkpoints", AT_LEAST_ONE, resume="free")
    eval_every: int = option(100, "steps between evaluations; 0: only at the end", AT_LEAST_ZERO, resume="free")
    eval_rows: int = option(0, "evaluation rows to use; 0: all", AT_LEAST_ZERO, resume="free")
    keep: int = option(3, "how many latest checkpoints to keep", AT_LEAST_ONE, resume="free")
    keep_best: bool = option(True, "also keep the checkpoint with the lowest eval_loss", resume="free")
    resume: Literal["auto", "none"] | int = option(
        "auto",
        "step of the checkpoint to continue from; later ones are deleted",
        AT_LEAST_ZERO,
        resume="free",
    )
    resume_with: Literal["same", "changed"] = option(
        "same",
        "changed: continue with other rows, template or learning rate; changes.jsonl records it",
        resume="free",
    )
    deterministic: bool = option(False, "the same bits on every GPU run, at some cost in speed")
    log_every: int = option(1, "steps between logged rows", AT_LEAST_ONE, resume="free")


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """Everything a run depends on; saved, resolved, as config.json in the run folder."""

    method: Literal["qlora", "lora", "full"] = option(
        "qlora", "train adapters on a 4-bit base (qlora), on a 16-bit base (lora), or all weights (full)"
    )
    seed: int = option(0, "seed of the adapters, the dropout and the data order", SEED)
    output_dir: str = option("", "the run folder", resume="free")
    model: ModelSection = option(ModelSection(), "the base model")
    quant: QuantSection = option(QuantSection(), "how the base is stored")
    lora: LoraSection = option(LoraSection(), "the adapters")
    data: DataSection = option(DataSection(), "the rows")
    optim: OptimSection = option(OptimSection(), "AdamW and its schedule")
    train: TrainSection = option(TrainSection(), "the training loop")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "full" and self.optim.gradients != "fp32":
            raise ValueError(
                f"config.optim.gradients={self.optim.gradients!r} is for adapters: with config.method='full' gradients "
                "have the dtype of the weights, which is config.model.dtype"
            )
        if self.model.embedding == "host" and self.method == "qlora" and self.quant.embedding != "none":
            raise ValueError(
                f"config.model.embedding='host' keeps the table in 16 bits in host memory, and "
                f"config.quant.embedding={self.quant.embedding!r} packs it for the device: set config.model.embedding="
                "'device' to pack it, or config.quant.embedding='none'"
            )


SECTIONS: Mapping[str, type[Section]] = {
    item.name: item.type for item in fields(Config) if isinstance(item.type, type) and issubclass(item.type, Section)
}


def may_change(kind: Resume) -> frozenset[str]:
    """The fields with this rule, as `train.steps`."""
    places: dict[str, type[Section]] = {"": Config, **{f"{name}.": section for name, section in SECTIONS.items()}}
    return frozenset(
        prefix + item.name
        for prefix, section in places.items()
        for item in fields(section)
        if item.metadata["resume"] == kind
    )
