"""The configuration of a run: its sections and their fields."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from qlora_jax.config.section import (
    ABOVE_ZERO,
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    BELOW_ONE,
    FRACTION,
    NUMBER_OR_SHARE,
    SEED,
    UP_TO_ONE,
    Section,
    option,
    refuse_bad_pattern,
)


@dataclass(frozen=True, kw_only=True)
class ModelSection(Section):
    PREFIX: ClassVar[str] = "config.model"

    path: str = option("", "folder with a Hugging Face model, or its name on the Hub")
    weights: Literal["checkpoint", "random"] = option("checkpoint", "random needs no download")
    max_position: int | None = option(None, "longest sequence, instead of the model's own", AT_LEAST_ONE)
    dtype: Literal["bf16", "fp32", "fp16"] = option("bf16", "number format of the computation")
    embedding: Literal["device", "host"] = option(
        "device", "host: an untied embedding that is frozen stays in host memory, and the rows of a step's tokens come"
    )
    kernels: Literal["auto", "pallas", "mosaic", "xla"] = option("auto", "how NF4 weights are computed with on a GPU")
    geometry: str = option("", "a config.json for weights=random; relative to the config file's folder")


@dataclass(frozen=True, kw_only=True)
class QuantSection(Section):
    """How method=qlora stores the base, whose decoder projections are in NF4."""

    PREFIX: ClassVar[str] = "config.quant"

    double: bool = option(True, "quantize the block scales too (0.37 bit per weight less)")
    lm_head: Literal["none", "nf4", "int8"] = option("none", "storage of the output layer, where it is untied")
    embedding: Literal["none", "nf4", "int8"] = option("none", "storage of the token embedding, and of a tied head")


@dataclass(frozen=True, kw_only=True)
class LoraSection(Section):
    PREFIX: ClassVar[str] = "config.lora"

    rank: int = option(16, "rank of the update", AT_LEAST_ONE)
    alpha: float = option(16.0, "the update is scaled by alpha/rank (rslora: alpha/sqrt(rank))", ABOVE_ZERO)
    dropout: float = option(0.0, "probability of dropping an input of the adapter", BELOW_ONE)
    targets: str | tuple[str, ...] = option("all-linear", "all-linear, a,comma,list or a regular expression")
    variant: Literal["lora", "rslora"] = option("lora", "how the update is scaled")
    rank_pattern: Mapping[str, int] = option({}, 'rank of single modules, {"pattern": rank}', AT_LEAST_ONE)
    alpha_pattern: Mapping[str, float] = option({}, 'alpha of single modules, {"pattern": alpha}', ABOVE_ZERO)

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
        "", 'training rows: a file, a folder, a pattern or a Hub dataset, or a list of [{"path", "weight", "split"}]'
    )
    eval: str | float = option("", "evaluation rows: a file, …, or a fraction of train to hold out", FRACTION)
    test: str = option("", "rows that compare.py measures the methods on, and nothing is chosen by: as eval")
    split: str = option("train", "split of a folder or a Hub dataset to train on")
    eval_split: str = option("", "split of a folder or a Hub dataset to evaluate on; empty is validation")
    test_split: str = option("test", "split of a folder or a Hub dataset for data.test")
    packing: bool = option(True, "put several documents into one sequence, kept apart in attention")
    train_on: Literal["completions", "all"] = option("completions", "tokens that the loss counts")
    long_rows: Literal["cut", "split", "drop"] = option("cut", "what becomes of rows longer than train.seq_len")
    max_bad_rows: int | float | None = option(
        None,
        "rows to leave out at most that cannot be learned from, or their share; none: 10, or 1 % if that is more",
        NUMBER_OR_SHARE,
    )
    cache: bool = option(True, "keep the encoded rows on disk, so that the next start takes seconds")
    chat_template: str = option("", "a Jinja file, or chatml, instead of the tokenizer's own")
    exact_match: bool = option(False, "answer the evaluation rows at every evaluation and score whole answers")
    samples: int = option(4, "rows answered before and after training, for the report", AT_LEAST_ZERO)

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

    learning_rate: float = option(2e-4, "peak learning rate", ABOVE_ZERO)
    schedule: Literal["constant", "linear", "cosine"] = option("constant", "what follows the warm-up")
    warmup_ratio: float = option(0.03, "fraction of the steps spent warming up", UP_TO_ONE)
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", AT_LEAST_ZERO)
    beta1: float = option(0.9, "Adam's decay of the mean", BELOW_ONE)
    beta2: float = option(0.999, "Adam's decay of the squared mean", BELOW_ONE)
    eps: float = option(1e-8, "Adam's epsilon", ABOVE_ZERO)
    clip: float = option(0.3, "largest norm of the gradient; 0 turns clipping off", AT_LEAST_ZERO)
    moments: Literal["fp32", "bf16"] = option("fp32", "storage of Adam's first moment; the second stays wide")
    gradients: Literal["fp32", "bf16"] = option("fp32", "storage of the adapters' summed gradient")
    offload: Literal["none", "host"] = option("none", "host: Adam's moments wait there, a layer's at a time comes")


@dataclass(frozen=True, kw_only=True)
class TrainSection(Section):
    """The length of the run is either `steps` or `epochs`; with neither it is one epoch."""

    PREFIX: ClassVar[str] = "config.train"

    steps: int | None = option(None, "optimizer steps", AT_LEAST_ONE)
    epochs: float | None = option(None, "passes over the training rows; 1 if steps is not given", ABOVE_ZERO)
    batch_size: int = option(1, "sequences in one forward pass", AT_LEAST_ONE)
    grad_accum: int = option(16, "forward passes per optimizer step", AT_LEAST_ONE)
    seq_len: int = option(512, "tokens in a sequence", AT_LEAST_ONE)
    remat: Literal["full", "none", "dots", "offload"] = option(
        "full", "what the backward pass computes again; offload keeps the layers' inputs in host memory"
    )
    mlp_chunk: int = option(0, "tokens of a sequence that go through an MLP at once; 0 is all", AT_LEAST_ZERO)
    loss_chunk: int = option(256, "tokens whose logits exist at once", AT_LEAST_ONE)
    vocab_chunk: int = option(0, "entries of the vocabulary whose logits exist at once; 0 is all", AT_LEAST_ZERO)
    save_every: int = option(100, "steps between checkpoints", AT_LEAST_ONE)
    eval_every: int = option(100, "steps between evaluations; 0 is only at the end", AT_LEAST_ZERO)
    eval_rows: int = option(0, "evaluation rows to use; 0 is all", AT_LEAST_ZERO)
    keep: int = option(3, "latest checkpoints to keep", AT_LEAST_ONE)
    keep_best: bool = option(True, "also keep the checkpoint with the lowest eval_loss")
    resume: Literal["auto", "none"] | int = option(
        "auto", "step of the checkpoint to go on from; later ones are then deleted", AT_LEAST_ZERO
    )
    resume_with: Literal["same", "changed"] = option(
        "same", "changed: go on with other rows, another template or learning rate, which changes.jsonl then says"
    )
    deterministic: bool = option(False, "the same bits on every GPU run, at some cost in speed")
    log_every: int = option(1, "steps between logged rows", AT_LEAST_ONE)

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
class Config(Section):
    """Everything a run depends on; saved, resolved, as config.json in the run folder."""

    method: Literal["qlora", "lora", "full"] = option("qlora", "adapters on a 4-bit or 16-bit base, or none")
    seed: int = option(0, "seeds the adapters, the dropout and the order of the data", SEED)
    output_dir: str = option("", "the run folder")
    model: ModelSection = option(ModelSection(), "the base model")
    quant: QuantSection = option(QuantSection(), "how the base is stored")
    lora: LoraSection = option(LoraSection(), "the adapters")
    data: DataSection = option(DataSection(), "what is learned from")
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
