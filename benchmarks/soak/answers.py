"""What every model says by itself, for comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.random_adapters import alone
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.io.hf import LoadedModel


def answers_alone(
    loaded: LoadedModel,
    adapters: Mapping[str, Path | None],
    prompts: Sequence[list[int]],
    tokenizer: Tokenizer,
    *,
    new: int,
    rank: int,
) -> dict[str, list[str]]:
    """The greedy text of `new` tokens after each prompt, up to eos; None is the bare base, `rank` the largest one."""

    def text(ids: list[int]) -> str:
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
        return tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    found = {}
    for name, folder in adapters.items():
        generator = alone(loaded, folder, rank)
        found[name] = [text(generator.generate([prompt], max_new_tokens=new)[0]) for prompt in prompts]
    return found
