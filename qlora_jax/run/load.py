"""A model folder, with or without an adapter, ready to write texts; and what of it serving needs, too."""

from dataclasses import dataclass
from pathlib import Path

from qlora_jax import kernels
from qlora_jax.data import limit_vocabulary, load_chat_template, load_tokenizer
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.io.adapter import Adapter
from qlora_jax.io.hf import load_model, read_config, resolve_folder
from qlora_jax.io.json_object import read_object
from qlora_jax.io.peft import attach_adapter, read_adapter
from qlora_jax.io.record import stored_as
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.models.config import DTYPES
from qlora_jax.quant.rules import QUANT, rules_for
from qlora_jax.run.choices import check_choice
from qlora_jax.run.text_model import TextModel
from qlora_jax.training.step import split_model


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which model is loaded, and how.

    Attributes:
      path: a Hugging Face folder, or a name on the Hub.
      adapter: a PEFT adapter folder, or None.
      quant: "auto" is what the folder holds; "none" or "nf4".
      dtype: number format of the computation, a key of DTYPES.
      chat_template: a Jinja file, or "chatml", before the adapter's own and the model's.
    """

    path: str | Path
    adapter: str | Path | None = None
    quant: str = "auto"
    dtype: str = "bf16"
    chat_template: str | None = None


def load(
    path: str | Path,
    adapter: str | Path | None = None,
    *,
    quant: str = "auto",
    dtype: str = "bf16",
    chat_template: str | None = None,
) -> TextModel:
    """A model, with or without an adapter, ready to write texts. The arguments are those of ModelSource.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: with what is missing, wrong or unsupported.
    """
    return opened(ModelSource(path=path, adapter=adapter, quant=quant, dtype=dtype, chat_template=chat_template))


def opened(model: TextModel | ModelSource | str | Path) -> TextModel:
    """The model, loaded where it is not yet. Raises what `load` does."""
    if isinstance(model, TextModel):
        return model
    source = model if isinstance(model, ModelSource) else ModelSource(path=model)
    check_choice("quant", source.quant, QUANT)
    check_choice("dtype", source.dtype, DTYPES)
    dtype = DTYPES[source.dtype]
    kernels.available(dtype)
    folder = resolve_folder(str(source.path))
    model_config = read_config(folder)
    adapter = read_adapter(Path(source.adapter), TensorFolder(folder)) if source.adapter else None
    tokenizer = open_tokenizer(folder, chosen=source.chat_template, adapter=adapter)
    limit_vocabulary(tokenizer, model_config.vocab_size)
    loaded = load_model(folder, dtype=dtype, rules=rules_for(source.quant, stored_as(adapter.extra if adapter else {})))
    if adapter is not None:
        attach_adapter(loaded.model, adapter, base_hash=loaded.content_hash)
    return TextModel(
        parts=split_model(loaded.model),
        tokenizer=tokenizer,
        stop_ids=tuple(stop_ids_of(folder, tokenizer)),
        max_position=model_config.max_position,
    )


def open_tokenizer(folder: Path, *, chosen: str | None, adapter: Adapter | None = None) -> Tokenizer:
    """The model's tokenizer with the chat template that holds: the chosen one, else the adapter's, else the model's."""
    tokenizer = load_tokenizer(str(folder))
    if chosen is not None:
        tokenizer.chat_template = _read_template(chosen)
    elif adapter is not None and adapter.chat_template is not None:
        tokenizer.chat_template = adapter.chat_template
    return tokenizer


def _read_template(chosen: str) -> str | None:
    try:
        return load_chat_template(chosen)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error).replace("data.chat_template=", "--chat-template ")) from error


def stop_ids_of(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end a text, by generation_config.json and by the tokenizer. Raises ValueError."""
    file = folder / "generation_config.json"
    listed = read_object(file).get("eos_token_id") if file.exists() else None
    ids = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{file}: eos_token_id is {listed!r}, expected a token's id or a list of them")
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
