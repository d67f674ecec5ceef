"""From a run folder to what export.py writes."""

import argparse
import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

import jax

from qlora_jax.config import Config, from_dict
from qlora_jax.data import load_chat_template
from qlora_jax.io.build import Quantization, abstract_model
from qlora_jax.io.chat_template import read_chat_template
from qlora_jax.io.checkpoint import Checkpoints
from qlora_jax.io.export import export_bnb4, export_merged
from qlora_jax.io.folder import new_folder
from qlora_jax.io.hf import read_config, resolve_folder
from qlora_jax.io.identity import SAMPLE
from qlora_jax.io.peft import Adapter, read_adapter, write_adapter
from qlora_jax.io.peft_config import CONFIG, read_settings
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.models.adapters import add_adapters
from qlora_jax.models.config import DTYPES
from qlora_jax.run.load import quantization_of
from qlora_jax.training.run_folder import CHECKPOINTS, open_checkpoints, read_record
from qlora_jax.training.setup import lora_config, recorded_quantization
from qlora_jax.training.step import split_model

LOSES = "note: quantizing after merging loses part of the fine-tune; a 4-bit base with the adapter beside it does not"


def read_run(run: Path) -> Config:
    """The configuration of a run folder. FileNotFoundError where there is none."""
    record = run / "config.json"
    if not record.exists():
        raise FileNotFoundError(f"{run} is no run folder (it holds no config.json): give the output_dir of train.py")
    return from_dict(read_record(run))


def adapter_folder(run: Path, config: Config, step: int | str | None) -> Path:
    """The run's final adapter; or that of a checkpoint, written to a temporary folder for the caller to remove."""
    steps = Checkpoints.steps_in(run / CHECKPOINTS)
    if step is not None:
        if step != "best" and step not in steps:
            raise ValueError(f"--step {step}: {run} holds checkpoints of steps {steps}")
        return _checkpoint_adapter(run, config, step)
    if not (run / "adapter").exists():
        raise FileNotFoundError(f"{run} has not finished: continue it, or pass --step with one of {steps}")
    return run / "adapter"


def export_run(config: Config, adapter: Path, out: Path, options: argparse.Namespace) -> None:
    """Writes a run's adapter in `options.format`. Raises what the writers raise."""
    if options.format == "peft":
        with new_folder(out, needed=sum(file.stat().st_size for file in adapter.iterdir())) as partial:
            shutil.copytree(adapter, partial, dirs_exist_ok=True)
        return
    base = resolve_folder(options.model or config.model.path)
    # Training saw the dequantized weights in the run's dtype; the original ones keep the folder's.
    dtype = config.model.dtype if options.merge_into == "dequantized" else None
    packing = Quantization(**dataclasses.asdict(config.quant))
    found = _with_template(read_adapter(adapter, TensorFolder(base)), config)
    _merge(base, found, out, options, packing, dtype)


def export_adapter(folder: Path, out: Path, options: argparse.Namespace) -> None:
    """Writes any adapter with its base in `options.format`. Raises what the writers raise."""
    if options.format == "peft" or options.step is not None:
        raise ValueError("--adapter is an adapter of PEFT's already: use --format merged or bnb4, without --step")
    named = read_settings(folder / CONFIG).get("base_model_name_or_path") if (folder / CONFIG).exists() else None
    model = options.model or named
    if not model:
        raise ValueError(f"{folder} names no base model: give it with --model")
    base = resolve_folder(model)
    adapter = read_adapter(folder, TensorFolder(base))
    _merge(base, adapter, out, options, quantization_of(adapter), None)


def _merge(
    base: Path, adapter: Adapter, out: Path, options: argparse.Namespace, packing: Quantization, dtype: str | None
) -> None:
    if options.format == "bnb4":
        print(LOSES, file=sys.stderr)
        export_bnb4(base, out, adapter, double=packing.double)
        return
    name = options.dtype or dtype
    export_merged(base, adapter, out, into=options.merge_into, quantization=packing, dtype=name and DTYPES[name])


def _with_template(adapter: Adapter, config: Config) -> Adapter:
    """The adapter with the run's chat template, which folders of earlier versions name in their configuration only."""
    if adapter.chat_template is not None or not config.data.chat_template:
        return adapter
    return dataclasses.replace(adapter, chat_template=load_chat_template(config.data.chat_template))


def copy_full(run: Path, out: Path, form: str, step: int | str | None) -> None:
    """The model of a full fine-tune, which is a Hugging Face folder already."""
    if form != "merged" or step is not None:
        raise ValueError("a run with method=full has no adapter: use --format merged, without --step")
    model = run / "model"
    if not model.exists():
        raise FileNotFoundError(f"{run} has not finished: continue it with the same command")
    with new_folder(out, needed=sum(file.stat().st_size for file in model.iterdir())) as partial:
        shutil.copytree(model, partial, dirs_exist_ok=True)


def _checkpoint_adapter(run: Path, config: Config, step: int | str) -> Path:
    """The adapter of a checkpoint in PEFT's format; the base's shapes are enough to build it."""
    source = Path(config.model.geometry) if config.model.weights == "random" else resolve_folder(config.model.path)
    model = abstract_model(read_config(source))
    targets = add_adapters(model, lora_config(config), jax.random.key(config.seed))
    parts = split_model(model)
    checkpoints = open_checkpoints(run, config)
    number = checkpoints.best if step == "best" else int(step)
    meta = checkpoints.meta(number)
    model = parts._replace(adapters=checkpoints.restore(number, adapters=parts.adapters)["adapters"]).merge()
    folder = Path(tempfile.mkdtemp(prefix="qlora-jax-")) / "adapter"
    write_adapter(
        folder,
        model,
        lora_config(config),
        targets,
        base=config.model.path,
        base_hash=meta["base_hash"],
        extra={**recorded_quantization(config), **{name: meta[name] for name in (SAMPLE,) if name in meta}},
        chat_template=read_chat_template(run),
    )
    return folder
