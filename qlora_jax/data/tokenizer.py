"""Loading a tokenizer, and whether it fits the model."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

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
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(
            f"{path_or_id!r} holds no tokenizer that can be built ({_first_line(error)}); the folder needs "
            "tokenizer.json and tokenizer_config.json"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def limit_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Notes how many ids the model knows. A tokenizer may have more, such as an added pad token, until one is used.

    An embedding has no row for them, and looking one up would give another token's without a word.
    """
    tokenizer.model_vocab_size = vocab_size


def check_ids(ids: Sequence[int], tokenizer: Tokenizer) -> None:
    """Refuses ids beyond the model's, where `limit_vocabulary` has noted it. Every text's ids come by here.

    Raises:
        ValueError: with the token, and the text that it stands in.
    """
    limit = getattr(tokenizer, "model_vocab_size", None)
    if limit is None or not len(ids) or max(ids) < limit:
        return
    place = next(place for place, i in enumerate(ids) if i >= limit)
    token = tokenizer.convert_ids_to_tokens(int(ids[place]))
    text = tokenizer.decode(ids[max(0, place - 12) : place + 4])
    raise ValueError(
        f"token {token!r} has id {ids[place]}, but the model's vocab_size is {limit}: the text {text!r} cannot be "
        f"used; leave the token out, or use the tokenizer that belongs to this model"
    )


def pad_id(tokenizer: Tokenizer) -> int:
    """The id that fills padding: pad, else eos, else 0. Masks never look at it: any id of the model will do."""
    limit = getattr(tokenizer, "model_vocab_size", math.inf)
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in candidates if i is not None and i < limit)


def identity(tokenizer: Tokenizer) -> str:
    """A hash of how the tokenizer turns text into ids; what a call may leave behind in it does not count."""
    if tokenizer.is_fast:
        settings = {**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}
    else:
        settings = tokenizer.get_vocab()
    return xxhash.xxh3_128(json.dumps(settings, sort_keys=True).encode()).hexdigest()
