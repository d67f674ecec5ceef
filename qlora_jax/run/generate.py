"""Texts of a model that need not be loaded before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from qlora_jax.run.load import ModelSource, opened
from qlora_jax.run.text_model import Continuation, SamplingOptions, TextModel, Writing


def generate(
    model: TextModel | ModelSource | str | Path,
    prompts: str | list[str],
    *,
    chat: bool = False,
    max_new_tokens: int = 128,
    seed: int = 0,
    **sampling: Unpack[SamplingOptions],
) -> str | list[str]:
    """The continuation of a prompt, or of each of several.

    Args:
      model: what `load` gives, or what to load: a folder, a name on the Hub, or a ModelSource with an adapter. Whoever
        calls this more than once loads the model first.
      chat, max_new_tokens, seed, sampling: the fields of Writing and of Sampling.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: with what is missing, wrong or unsupported.
    """
    return opened(model).generate(prompts, chat=chat, max_new_tokens=max_new_tokens, seed=seed, **sampling)


def continuations(
    model: TextModel | ModelSource | str | Path, prompts: Sequence[str], how: Writing
) -> list[Continuation]:
    """What the model writes after each prompt, as text and as tokens. Raises what `generate` does."""
    return opened(model).continuations(prompts, how)
