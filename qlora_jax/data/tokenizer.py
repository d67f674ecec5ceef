"""Loading a tokenizer, and whether it fits the model."""

from pathlib import Path
from typing import Any

# A transformers tokenizer. Any, because importing transformers takes seconds and only load_tokenizer needs
# it, and because what its methods return depends on their flags.
Tokenizer = Any


def load_tokenizer(path_or_id: str) -> Tokenizer:
    """The tokenizer of a local folder or a Hub model; code in the repository is never run.

    Raises:
        FileNotFoundError: the folder is not there, or the Hub could not give it.
        ValueError: the folder holds no tokenizer that transformers can build.
    """
    from transformers import AutoTokenizer

    folder = Path(path_or_id).expanduser()
    name = str(folder) if folder.is_dir() else path_or_id
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"no tokenizer at {path_or_id!r}: it is no folder here with tokenizer files, and the Hugging "
            "Face Hub did not give it; check the name and the connection, or pass a local folder that holds "
            f"tokenizer.json and tokenizer_config.json ({_first_line(error)})"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{path_or_id!r} holds no tokenizer that can be built ({_first_line(error)}); the folder needs "
            "tokenizer.json and tokenizer_config.json"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError if the tokenizer gives ids beyond the model's embedding of `vocab_size` rows."""
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocab_size is {vocab_size}; use the "
            "tokenizer that belongs to this model"
        )
    for token, i in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
        if i >= vocab_size:
            raise ValueError(
                f"the tokenizer's special token {token!r} has id {i} but the model's vocab_size is "
                f"{vocab_size}; use the tokenizer that belongs to this model"
            )


def pad_id(tokenizer: Tokenizer) -> int:
    """The id that fills padding: pad, else eos, else 0. Masks never look at it, so any id will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in candidates if i is not None)
