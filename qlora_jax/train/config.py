"""The configuration of a run: typed sections, checked on construction, read from Python files and JSON."""

import difflib
import math
import re
import runpy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from qlora_jax.train.values import Rule, convert, describe, from_text

ABOVE_ZERO = Rule("above 0", lambda value: value > 0)
AT_LEAST_ZERO = Rule("of at least 0", lambda value: value >= 0)
AT_LEAST_ONE = Rule("of at least 1", lambda value: value >= 1)
BELOW_ONE = Rule("from 0 up to, but not including, 1", lambda value: 0 <= value < 1)
UP_TO_ONE = Rule("from 0 to 1", lambda value: 0 <= value <= 1)
FRACTION = Rule("between 0 and 1", lambda value: 0 < value < 1)
NUMBER_OR_SHARE = Rule("of at least 0, or a share below 1", lambda value: value >= 0 and (value < 1 or value % 1 == 0))
SEED = Rule("from 0 to 4294967295", lambda value: 0 <= value < 2**32)


def option(default: Any, help: str, rule: Rule | None = None) -> Any:
    """A dataclass field with its one-line description and, for numbers, the range they must lie in."""
    metadata = {"help": help, "rule": rule}
    if isinstance(default, dict) or is_dataclass(default):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


def refuse_unknown(section: "type[Section]", names: Iterable[str]) -> None:
    """ValueError that names the nearest known field when a name is not a field of the section."""
    known = [item.name for item in fields(section)]
    for name in names:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {section.PREFIX}.{near[0]}? " if near else ""
        raise ValueError(f"{section.PREFIX}.{name} is unknown: {hint}Known: {', '.join(known)}")


def refuse_bad_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}={pattern!r}: expected a regular expression, but {error}") from error


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of the sections: refuses unknown names, wrong types and numbers out of range (ValueError)."""

    PREFIX: ClassVar[str] = "config"

    def __new__(cls, **settings: Any) -> "Section":
        refuse_unknown(cls, settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for item in fields(self):
            name, value = f"{self.PREFIX}.{item.name}", getattr(self, item.name)
            expected = describe(item.type)
            matched, converted = convert(value, item.type)
            if not matched:
                raise ValueError(f"{name}={value!r}: expected {expected}")
            rule = item.metadata["rule"]
            if rule and not rule.accepts(converted):
                raise ValueError(f"{name}={value!r}: expected {expected} {rule.words}")
            object.__setattr__(self, item.name, converted)


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


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON types; `from_dict` gives the same configuration back."""
    return asdict(config)


def from_dict(settings: Mapping[str, Any]) -> Config:
    """The configuration that `to_dict` wrote. ValueError for unknown keys and wrong types."""
    whole: dict[str, Any] = {}
    for name, value in settings.items():
        section = SECTIONS.get(name)
        whole[name] = section(**value) if section and isinstance(value, Mapping) else value
    return Config(**whole)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the Python file's `config`, then apply overrides such as `--config.lora.rank=8`.

    FileNotFoundError for a missing file; ValueError for one that fails or holds no Config, and for
    overrides that name no field or do not fit its type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist: expected e.g. configs/7b.py")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise ValueError(f"config file {path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ValueError(f"config file {path}: expected `config = Config(...)`, found {config!r}")
    config = apply_overrides(config, overrides)
    geometry = config.model.geometry and str(path.parent / config.model.geometry)
    return replace(config, model=replace(config.model, geometry=geometry))


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with `--config.section.field=value` (or `… value`) applied, the last one winning."""
    changes: dict[str, dict[str, Any]] = {}
    for name, text in split_overrides(overrides):
        section_name, _, field_name = name.rpartition(".")
        section: type[Section] = Config
        if section_name:
            refuse_unknown(Config, [section_name])
            if section_name not in SECTIONS:
                raise ValueError(f"config.{name} is unknown: config.{section_name} has no fields of its own")
            section = SECTIONS[section_name]
        elif field_name in SECTIONS:
            raise ValueError(f"config.{name}={text!r}: expected a field of it: {example(field_name)}")
        refuse_unknown(section, [field_name])
        kind = next(item.type for item in fields(section) if item.name == field_name)
        changes.setdefault(section_name, {})[field_name] = from_text(text, kind)
    change_length(changes.get("train", {}))
    top = changes.pop("", {})
    sections = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    return replace(config, **top, **sections)


def change_length(changes: dict[str, Any]) -> None:
    """A new length takes the place of the file's own: train.steps unsets train.epochs, and the reverse."""
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if changes.get(name) is not None:
            changes.setdefault(other, None)


def split_overrides(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """`["--config.a.b=1", "--config.c", "2"]` as `[("a.b", "1"), ("c", "2")]`."""
    pairs: list[tuple[str, str]] = []
    rest = iter(overrides)
    for word in rest:
        if not word.startswith("--config."):
            raise ValueError(f"{word!r}: expected --config.section.field=value")
        name, equals, text = word.removeprefix("--config.").partition("=")
        value = text if equals else next(rest, None)
        if value is None or (not equals and value.startswith("--")):
            raise ValueError(f"{word} has no value: expected {word}=value")
        pairs.append((name, value))
    return pairs


def example(section: str) -> str:
    return f"--config.{section}.{fields(SECTIONS[section])[0].name}=value"
