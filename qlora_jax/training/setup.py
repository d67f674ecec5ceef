"""From a configuration to everything a run needs: model, adapters, optimizer and jitted steps."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qlora_jax.config import Config
from qlora_jax.io.build import Quantization
from qlora_jax.io.hf import LoadedModel, load_model, random_model, read_config, resolve_folder
from qlora_jax.io.json_object import read_object
from qlora_jax.io.packing import Forms, folder_forms, stated_forms
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.lora import LoraConfig, Target
from qlora_jax.models.adapters import add_adapters
from qlora_jax.models.blocks.layers import Frozen
from qlora_jax.models.config import DTYPES, ModelConfig
from qlora_jax.training.offload import init_state
from qlora_jax.training.offload_step import PagedStep, make_paged_step
from qlora_jax.training.optimizer import adamw, learning_rate
from qlora_jax.training.step import Parts, make_eval_step, make_train_step, masked_optimizer, split_model

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trainer:
    """The state of a run and the functions that move it.

    Attributes:
      loaded: the base model, its content hash and folder.
      parts: structure, adapters (replaced after every step) and base.
      targets: adapted modules by Hugging Face path; empty in a full fine-tune.
      opt_state: Optax state over `(adapters, base)`, empty at the base's leaves; with optim.offload=host a HostState.
    """

    config: Config
    loaded: LoadedModel
    parts: Parts
    targets: dict[str, Target]
    opt_state: Any
    schedule: optax.Schedule
    train_step: jax.stages.Wrapped | PagedStep
    eval_step: jax.stages.Wrapped


def lora_config(config: Config) -> LoraConfig:
    """The adapters that the configuration asks for."""
    section = config.lora
    return LoraConfig(
        rank=section.rank,
        alpha=section.alpha,
        dropout=section.dropout,
        targets=section.targets,
        variant=section.variant,
        rank_pattern=section.rank_pattern,
        alpha_pattern=section.alpha_pattern,
    )


def with_method(config: Config, method: Any) -> Config:
    """The same run by another method. A full fine-tune has no choice of optim.gradients."""
    optim = dataclasses.replace(config.optim, gradients="fp32") if method == "full" else config.optim
    return dataclasses.replace(config, method=method, optim=optim)


def quantization(config: Config) -> Quantization | None:
    """How the base is packed; None for the methods that train or keep it as it is."""
    if config.method != "qlora":
        return None
    return Quantization(**dataclasses.asdict(config.quant))


def embedding_on_host(config: Config) -> bool:
    """Whether the embedding stays in host memory: a full fine-tune trains it, on the device."""
    return config.model.embedding == "host" and config.method != "full"


def recorded_quantization(config: Config) -> dict[str, Any]:
    """What is noted beside an adapter: how the base was stored while it was trained."""
    return {"method": config.method, **dataclasses.asdict(config.quant)}


def loss_pieces(config: Config) -> dict[str, int]:
    """In what pieces the loss is computed, for `make_train_step` and `make_eval_step`."""
    return {"loss_chunk": config.train.loss_chunk, "vocab_chunk": config.train.vocab_chunk}


def load_base(config: Config, folder: Path | None) -> LoadedModel:
    """The base model of the configuration; `folder` is its resolved folder, None for random weights."""
    packed = quantization(config)
    options: Any = {
        "quantization": packed,
        "dtype": DTYPES[config.model.dtype],
        "kind": nnx.Param if config.method == "full" else Frozen,
        "host_embedding": embedding_on_host(config),
    }
    if config.model.weights == "random":
        geometry = read_config(folder or Path(config.model.geometry))
        return random_model(geometry, config.seed, **options)
    assert folder is not None  # base_folder gives one for every checkpoint
    return load_model(folder, quant="none" if packed is None else "qlora", **options)


def planned_forms(config: Config, geometry: ModelConfig) -> Forms:
    """How the base packs its projections, a folder or a config.json that model.geometry (else model.path) names."""
    source = Path(config.model.geometry or config.model.path)
    file = source if source.is_file() else source / "config.json"
    if config.method != "qlora" or config.model.weights == "random" or not file.is_file():
        return {}
    try:
        return folder_forms(geometry, TensorFolder(source))
    except FileNotFoundError:  # a plan needs config.json alone
        return stated_forms(geometry, read_object(file))


def base_folder(config: Config) -> Path | None:
    """The local folder of config.model.path; None for random weights of a geometry."""
    if config.model.weights == "random" and config.model.geometry:
        return None
    return resolve_folder(config.model.path)


def for_geometry(config: Config, geometry: ModelConfig) -> Config:
    """The configuration as a model of this geometry can have it; what is changed for that is logged.

    Where the output layer is the embedding there is one table, on the device. It is then stored as the output layer was
    to be, which costs most of the quality. Two different storages for it are left to be refused.
    """
    head, table = config.quant.lm_head, config.quant.embedding
    on_host, packs = embedding_on_host(config), config.method == "qlora" and table == "none" != head
    if not geometry.tie_embeddings or not (on_host or packs):
        return config
    changes = ["model.embedding=device"] * on_host + [f"quant.embedding={head}"] * packs
    logger.warning(f"this {geometry.family} model's output layer is its embedding: {' and '.join(changes)} is used")
    # Both at once: a packed embedding is not accepted in host memory.
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, embedding="device"),
        quant=dataclasses.replace(config.quant, embedding=head if packs else table),
    )


def check_length(config: Config, max_position: int) -> None:
    """Refuses sequences longer than the model was made for, unless model.max_position lifts the limit."""
    limit = config.model.max_position or max_position
    if config.train.seq_len > limit:
        raise ValueError(
            f"train.seq_len={config.train.seq_len} is longer than the model's {limit} positions: lower it, "
            f"or lift the limit with --config.model.max_position={config.train.seq_len}"
        )


def make_trainer(config: Config, folder: Path | None, steps: int) -> Trainer:
    """Loads the base, adds the adapters and builds the jitted steps of a run of `steps` optimizer steps."""
    loaded = load_base(config, folder)
    targets = {}
    if config.method != "full":
        targets = add_adapters(loaded.model, lora_config(config), jax.random.key(config.seed))
    parts = split_model(loaded.model)
    schedule = learning_rate(config.optim, steps)
    train_step, init = step_and_state(config, parts, schedule)
    return Trainer(
        config=config,
        loaded=loaded,
        parts=parts,
        targets=targets,
        opt_state=init(),
        schedule=schedule,
        train_step=train_step,
        eval_step=make_eval_step(parts.graphdef, **loss_pieces(config)),
    )


def step_and_state(
    config: Config, parts: Parts, schedule: optax.Schedule
) -> tuple[jax.stages.Wrapped | PagedStep, Callable[[], Any]]:
    """The train step that the configuration asks for, and a function that makes its first optimizer state."""
    optimizer = masked_optimizer(adamw(config.optim, schedule), parts)
    options: Any = {
        "remat": config.train.remat,
        "mlp_chunk": config.train.mlp_chunk,
        **loss_pieces(config),
        "gradients": {"fp32": None, "bf16": jnp.bfloat16}[config.optim.gradients],
    }
    if config.optim.offload == "host":
        step = make_paged_step(parts.graphdef, optimizer, parts.base, **options)
        return step, lambda: init_state(optimizer, parts.adapters, parts.base)
    init = lambda: optimizer.init((parts.adapters, parts.base))  # noqa: E731
    return make_train_step(parts.graphdef, optimizer, **options), init
