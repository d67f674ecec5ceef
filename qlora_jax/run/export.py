"""From a run folder, or an adapter of any origin, to a folder that other tools read."""

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import jax

from qlora_jax.config import Config, QuantSection, from_dict
from qlora_jax.data import load_chat_template
from qlora_jax.io.adapter import Adapter
from qlora_jax.io.build import abstract_model
from qlora_jax.io.chat_template import read_chat_template
from qlora_jax.io.checkpoint import Checkpoints
from qlora_jax.io.export import export_merged
from qlora_jax.io.export_bnb4 import export_bnb4
from qlora_jax.io.folder import new_folder
from qlora_jax.io.hf import read_config, resolve_folder
from qlora_jax.io.identity import SAMPLE
from qlora_jax.io.peft import TrainedOn, read_adapter, write_adapter
from qlora_jax.io.peft_config import CONFIG, read_settings
from qlora_jax.io.record import stored_as
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.models.adapters import add_adapters
from qlora_jax.models.config import DTYPES
from qlora_jax.quant.rules import packed
from qlora_jax.run.choices import check_choice
from qlora_jax.training.run_folder import CHECKPOINTS, open_checkpoints, read_record
from qlora_jax.training.setup import storage_record
from qlora_jax.training.step import split_model

logger = logging.getLogger(__name__)

Format = Literal["peft", "merged", "bnb4"]
MergeInto = Literal["original", "dequantized"]
ADAPTER_ALREADY = "--adapter is an adapter of PEFT's already: use --format merged or bnb4, without --step"
LOSES = "note: quantizing after merging loses part of the fine-tune; a 4-bit base with the adapter beside it does not"


def read_run(run: Path) -> Config:
    """The configuration of a run folder. FileNotFoundError where there is none."""
    record = run / "config.json"
    if not record.exists():
        raise FileNotFoundError(f"{run} is no run folder (it holds no config.json): give the output_dir of train.py")
    return from_dict(read_record(run))


@contextmanager
def _adapter_folder(run: Path, config: Config, step: int | str | None) -> Iterator[Path]:
    """The run's final adapter; or that of a checkpoint, in a temporary folder that goes with the block."""
    steps = Checkpoints.steps_in(run / CHECKPOINTS)
    if step is None:
        if not (run / "adapter").exists():
            raise FileNotFoundError(f"{run} has not finished: continue it, or pass --step with one of {steps}")
        yield run / "adapter"
        return
    if step != "best" and step not in steps:
        raise ValueError(f"--step {step}: {run} holds checkpoints of steps {steps}")
    with tempfile.TemporaryDirectory(prefix="qlora-jax-") as folder:
        yield _checkpoint_adapter(run, config, step, Path(folder) / "adapter")


@dataclass(frozen=True, kw_only=True)
class Merged:
    """How a base and an adapter become one model: the fields that `export` has, too.

    Attributes:
      format: "merged" or "bnb4".
      dtype: of merged weights; None keeps that of what is merged into.
      packing: how the base was stored in training, or is to be.
    """

    format: Format
    merge_into: MergeInto
    dtype: str | None
    packing: QuantSection


def export(
    run: str | Path,
    out: str | Path,
    *,
    format: Format = "merged",
    merge_into: MergeInto = "original",
    step: int | Literal["best"] | None = None,
    model: str | Path | None = None,
    dtype: str | None = None,
) -> Path:
    """Writes what a run has learned into a new folder, which it returns.

    Args:
      run: the run folder.
      format: "peft" is the adapter alone, "merged" the whole model with it added in, "bnb4" that in NF4 again.
      merge_into: with "merged" the original weights in their dtype, or the dequantized ones in the run's.
      step: a checkpoint instead of the run's final state; "best" is the one with the lowest eval_loss.
      model: the base, where it is not where the run says.
      dtype: of merged weights, a key of DTYPES; else see `merge_into`.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: with what is missing, wrong or unsupported.
    """
    _check_words(format, merge_into, dtype)
    run, out = Path(run), Path(out)
    config = read_run(run)
    if config.method == "full":
        return copy_full(run, out, format, step)
    with _adapter_folder(run, config, step) as folder:
        if format == "peft":
            return _copied(folder, out)
        base = resolve_folder(str(model or config.model.path))
        # Training saw the dequantized weights in the run's dtype; the original ones keep the folder's.
        seen = config.model.dtype if merge_into == "dequantized" else None
        packing = config.quant
        found = _with_template(read_adapter(folder, TensorFolder(base)), config)
        how = Merged(format=format, merge_into=merge_into, dtype=dtype or seen, packing=packing)
        return _merge(base, found, out, how)


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    format: Format = "merged",
    merge_into: MergeInto = "original",
    model: str | Path | None = None,
    dtype: str | None = None,
) -> Path:
    """Writes any PEFT adapter with its base into a new folder, which it returns; `model` where it names none.

    The other arguments are those of `export`, which also says what is raised.
    """
    _check_words(format, merge_into, dtype)
    folder = Path(adapter)
    if format == "peft":
        raise ValueError(ADAPTER_ALREADY)
    named = read_settings(folder / CONFIG).get("base_model_name_or_path") if (folder / CONFIG).exists() else None
    source = model or named
    if not source:
        raise ValueError(f"{folder} names no base model: give it with --model")
    base = resolve_folder(str(source))
    found = read_adapter(folder, TensorFolder(base))
    how = Merged(format=format, merge_into=merge_into, dtype=dtype, packing=stored_as(found.extra))
    return _merge(base, found, Path(out), how)


def _check_words(format: str, merge_into: str, dtype: str | None) -> None:
    check_choice("format", format, get_args(Format))
    check_choice("merge_into", merge_into, get_args(MergeInto))
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)


def _merge(base: Path, adapter: Adapter, out: Path, how: Merged) -> Path:
    if how.format == "bnb4":
        logger.warning(LOSES)
        export_bnb4(base, out, adapter, double=how.packing.double)
        return out
    dtype = how.dtype and DTYPES[how.dtype]
    export_merged(base, adapter, out, into=how.merge_into, rules=packed(how.packing), dtype=dtype)
    return out


def _copied(folder: Path, out: Path) -> Path:
    with new_folder(out, needed=sum(file.stat().st_size for file in folder.iterdir())) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
    return out


def _with_template(adapter: Adapter, config: Config) -> Adapter:
    """The adapter with the run's chat template, which folders of earlier versions name in their configuration only."""
    if adapter.chat_template is not None or not config.data.chat_template:
        return adapter
    return dataclasses.replace(adapter, chat_template=load_chat_template(config.data.chat_template))


def copy_full(run: Path, out: Path, form: Format, step: int | str | None) -> Path:
    """The model of a full fine-tune, which is a Hugging Face folder already."""
    if form != "merged" or step is not None:
        raise ValueError("a run with method=full has no adapter: use --format merged, without --step")
    model = run / "model"
    if not model.exists():
        raise FileNotFoundError(f"{run} has not finished: continue it with the same command")
    return _copied(model, out)


def _checkpoint_adapter(run: Path, config: Config, step: int | str, folder: Path) -> Path:
    """The adapter of a checkpoint in PEFT's format; the base's shapes are enough to build it."""
    source = Path(config.model.geometry) if config.model.weights == "random" else resolve_folder(config.model.path)
    model = abstract_model(read_config(source))
    targets = add_adapters(model, config.lora, jax.random.key(config.seed))
    parts = split_model(model)
    with closing(open_checkpoints(run, config)) as checkpoints:
        number = checkpoints.best if step == "best" else int(step)
        meta = checkpoints.meta(number)
        model = parts._replace(trained=checkpoints.restore(number, adapters=parts.trained)["adapters"]).merge()
    extra = storage_record(config) | {name: meta[name] for name in (SAMPLE,) if name in meta}
    write_adapter(
        folder,
        model,
        config.lora,
        targets,
        TrainedOn(config.model.path, meta["base_hash"], extra),
        chat_template=read_chat_template(run),
    )
    return folder
