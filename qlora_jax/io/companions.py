"""What a Hugging Face folder needs beside its weights: the configuration, how to generate and tokenize, the licence."""

import json
import shutil
from pathlib import Path
from typing import Any

from qlora_jax.io.chat_template import Templates, write_chat_template

FILES = (
    *("generation_config.json", "tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("added_tokens.json", "chat_template*", "additional_chat_templates", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)


def write_companions(
    source: Path,
    folder: Path,
    *,
    dtype: str,
    tied: bool,
    quantization: dict[str, Any] | None = None,
    chat_template: Templates | None = None,
) -> None:
    """Writes them into `folder` from those of `source`.

    Args:
      dtype: of the new folder's weights, such as "bfloat16".
      tied: whether the output layer is the embedding; the weights of `source` may say otherwise than its config.json.
      quantization: config.json's quantization_config; None where nothing is packed.
      chat_template: those that the weights were trained with; None keeps the source's.
    """
    settings = json.loads((source / "config.json").read_text())
    for old in ("quantization_config", "torch_dtype"):
        settings.pop(old, None)
    settings["dtype"] = dtype
    # A model of more than text says it for its text part, too.
    text = settings.get("text_config")
    for one in (settings, text) if isinstance(text, dict) else (settings,):
        if one.get("tie_word_embeddings", tied) != tied:
            one["tie_word_embeddings"] = tied
    if quantization:
        settings["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    for pattern in FILES:
        for file in source.glob(pattern):
            copy = shutil.copytree if file.is_dir() else shutil.copyfile
            copy(file, folder / file.name)
    if chat_template is not None:
        write_chat_template(folder, chat_template)
