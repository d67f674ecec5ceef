"""What a Hugging Face folder needs beside its weights: the configuration, how to generate and tokenize, the licence."""

import json
import shutil
from pathlib import Path
from typing import Any

FILES = (
    *("generation_config.json", "tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template*", "additional_chat_templates", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)


def write_companions(source: Path, folder: Path, *, dtype: str, quantization: dict[str, Any] | None = None) -> None:
    """Writes them into `folder` from those of `source`.

    Args:
      dtype: of the new folder's weights, such as "bfloat16".
      quantization: config.json's quantization_config; None where nothing is packed.
    """
    settings = json.loads((source / "config.json").read_text())
    for old in ("quantization_config", "torch_dtype"):
        settings.pop(old, None)
    settings["dtype"] = dtype
    if quantization:
        settings["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    for pattern in FILES:
        for file in source.glob(pattern):
            copy = shutil.copytree if file.is_dir() else shutil.copyfile
            copy(file, folder / file.name)
