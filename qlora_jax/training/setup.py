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
from qlora_jax.io.hf import LoadedModel, load_model, random_model, read_config, resolve_folder
from qlora_jax.io.json_object import read_object
from qlora_jax.io.packed import open_tensors
from qlora_jax.io.packing import Forms, folder_forms, stated_forms
from qlora_jax.lora import Target
from qlora_jax.models.adapters import add_adapters
from qlora_jax.models.blocks.linear import Frozen
from qlora_jax.models.config import DTYPES, ModelConfig
from qlora_jax.objective import Objective, objective_of
from qlora_jax.quant.rules import UNPACKED, Rules, packed
from qlora_jax.training.offload import init_state
from qlora_jax.training.offload_step import PagedStep, make_paged_step
from qlora_jax.training.optimizer import adamw, learning_rate
from qlora_jax.training.step import EvalStep, Parts, make_eval_step, make_train_step, split_model

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trainer:
    """The state of a run and the functions that move it.

    Attributes:
      loaded: the base model, its content hash and folder.
      parts: structure, what is trained (replaced after every step) and base.
      targets: adapted modules by Hugging Face path; empty in a full fine-tune.
      opt_state: Optax' state over what is trained; with optim.offload=host a HostState.
    """

    config: Config
    loaded: LoadedModel
    parts: Parts
    targets: dict[str, Target]
    opt_state: Any
    objective: Objective
    schedule: optax.Schedule
    train_step: jax.stages.Wrapped | PagedStep
    eval_step: EvalStep


def with_method(config: Config, method: Any) -> Config:
    """The same run by another method. A full fine-tune has no choice of optim.gradients."""
    optim = dataclasses.replace(config.optim, gradients="fp32") if method == "full" else config.optim
    return dataclasses.replace(config, method=method, optim=optim)


def storage_rules(config: Config) -> Rules:
    """How the base is stored: packed for qlora, plain for the methods that train or keep it as it is."""
    return packed(config.quant) if config.method == "qlora" else UNPACKED


def embedding_on_host(config: Config) -> bool:
    """Whether the embedding stays in host memory: a full fine-tune trains it, on the device."""
    return config.model.embedding == "host" and config.method != "full"


def storage_record(config: Config) -> dict[str, Any]:
    """What is noted beside an adapter: how the base was stored while it was trained."""
    return {"method": config.method, **dataclasses.asdict(config.quant)}


def load_base(config: Config, folder: Path | None) -> LoadedModel:
    """The base model of the configuration; `folder` is its resolved folder, None for random weights."""
    options: Any = {
        "rules": storage_rules(config),
        "dtype": DTYPES[config.model.dtype],
        "kind": nnx.Param if config.method == "full" else Frozen,
        "host_embedding": embedding_on_host(config),
    }
    if config.model.weights == "random":
        model_config = read_config(folder or Path(config.model.geometry))
        return random_model(model_config, config.seed, **options)
    assert folder is not None  # base_folder gives one for every checkpoint
    return load_model(folder, **options)


def planned_forms(config: Config, model_config: ModelConfig) -> Forms:
    """How the base packs its projections, a folder or a config.json that model.geometry (else model.path) names."""
    source = Path(config.model.geometry or config.model.path)
    file = source if source.is_file() else source / "config.json"
    if config.method != "qlora" or config.model.weights == "random" or not file.is_file():
        return {}
    try:
        return folder_forms(model_config, open_tensors(source), experts=config.quant.experts == "held")
    except FileNotFoundError:  # a plan needs config.json alone
        return stated_forms(model_config, read_object(file)) if config.quant.experts == "held" else {}


def base_folder(config: Config) -> Path | None:
    """The local folder of config.model.path; None for random weights of a geometry."""
    if config.model.weights == "random" and config.model.geometry:
        return None
    return resolve_folder(config.model.path)


def for_geometry(config: Config, model_config: ModelConfig) -> Config:
    """The configuration as a model of this geometry can have it; what is changed for that is logged.

    Where the output layer is the embedding there is one table, on the device. It is then stored as the output layer was
    to be, which costs most of the quality. Two different storages for it are left to be refused.
    """
    head, table = config.quant.lm_head, config.quant.embedding
    on_host, packs = embedding_on_host(config), config.method == "qlora" and table == "none" != head
    if not model_config.tie_embeddings or not (on_host or packs):
        return config
    changes = ["model.embedding=device"] * on_host + [f"quant.embedding={head}"] * packs
    logger.warning(f"this {model_config.family} model's output layer is its embedding: {' and '.join(changes)} is used")
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
        targets = add_adapters(loaded.model, config.lora, jax.random.key(config.seed))
    parts = split_model(loaded.model)
    schedule, objective = learning_rate(config.optim, steps), objective_of(config)
    train_step, init = step_and_state(config, parts, schedule)
    return Trainer(
        config=config,
        loaded=loaded,
        parts=parts,
        targets=targets,
        opt_state=init(),
        objective=objective,
        schedule=schedule,
        train_step=train_step,
        eval_step=make_eval_step(parts.graphdef, objective, config.train),
    )


def step_and_state(
    config: Config, parts: Parts, schedule: optax.Schedule
) -> tuple[jax.stages.Wrapped | PagedStep, Callable[[], Any]]:
    """The train step that the configuration asks for, and a function that makes its first optimizer state."""
    optimizer = adamw(config.optim, schedule)
    gradients = {"fp32": None, "bf16": jnp.bfloat16}[config.optim.gradients]
    arguments = (parts.graphdef, optimizer, objective_of(config), config.train, gradients)
    if config.optim.offload == "host":
        return make_paged_step(*arguments), lambda: init_state(optimizer, parts.trained)
    return make_train_step(*arguments), lambda: optimizer.init(parts.trained)
