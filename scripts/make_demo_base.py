"""Makes demo/base: a small Llama, trained from random weights on the text that every Python installation carries.

    python scripts/make_demo_base.py                about ten minutes on two CPU cores
    python scripts/make_demo_base.py --held-out     only demo/heldout.jsonl, the passages that the base has not seen
    python scripts/make_demo_base.py --large        runs/large_base/base of 113M parameters, for compare.py on a GPU

Fields of the training run can be changed, as in --config.train.steps=100.
The text is `pydoc_data.topics` (the language reference) and the docstrings of the standard library, for the large base
the library's source files. The weights are trained by this project's own method=full: `configs/demo_base.py` and
`configs/large_base.py`. Another Python carries another text: with --held-out it must be the one that
demo/base/README.md names.
"""

import argparse
import ast
import dataclasses
import json
import platform
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from qlora_jax.cli.errors import reports_errors
from qlora_jax.config import Config, load_config
from qlora_jax.data import split_rows
from qlora_jax.training.metrics import read_rows

ROOT = Path(__file__).resolve().parents[1]

PAD, BOS, EOS, TURN = "<|pad|>", "<|begin|>", "<|im_end|>", "<|im_start|>"
SPECIAL = [PAD, BOS, EOS, TURN]
# Folders of the library that hold tests, data or other people's programs, or that newer Pythons dropped.
LEFT_OUT = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "distutils",
}

GEOMETRY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "pad_token_id": SPECIAL.index(PAD),
    "bos_token_id": SPECIAL.index(BOS),
    "eos_token_id": SPECIAL.index(EOS),
    "dtype": "bfloat16",
}
LARGE_GEOMETRY = GEOMETRY | {
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
README = """\
---
license: psf-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The demo's base

A Llama of {parameters:,} parameters in bf16, for `make demo` and for tests: it shows that fine-tuning works, and is of
no use otherwise. It has read Python's documentation a few times and follows no instructions.

- **Made by** `python scripts/make_demo_base.py` with Python {python}: this project's own `method=full` from random
  weights, `configs/demo_base.py`, {steps:,} steps on a CPU. Loss on held-out passages: {loss:.2f} nats per token.
- **Text**: `pydoc_data.topics` and the docstrings of the standard library as that Python carries them, {characters:,}
  characters, and nothing else. Every second passage is written twice in its training sequence. The held-out passages
  are `demo/heldout.jsonl`.
- **Tokenizer**: byte-level BPE of {vocabulary:,} tokens trained on the same text, digits apart.
- **Licence of the text**: Python and its documentation are copyright of the Python Software Foundation, under the PSF
  License Agreement, version 2: https://docs.python.org/3/license.html
"""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a base is made.

    Attributes:
      config: the training run, which reads corpus.jsonl and the folder start, both in `work`.
      work: a folder for everything on the way; deleted at the beginning.
      base: the folder of the finished model.
      held_out: the file for the passages that the run only evaluates on.
      read: the texts of one source file.
      readme: the model's card, or None.
    """

    config: Path
    work: Path
    base: Path
    held_out: Path
    geometry: dict[str, Any]
    read: Callable[[Path], Iterable[str]]
    readme: str | None

    @property
    def positions(self) -> int:
        return self.geometry["max_position_embeddings"]


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Text, tokenizer, training, and the model folder; or the held-out passages alone."""
    parser = argparse.ArgumentParser(description="Make the demo's base.")
    parser.add_argument("--held-out", action="store_true", help="only the held-out passages of the base that there is")
    parser.add_argument("--large", action="store_true", help="a base of 113M parameters in runs/large_base, on a GPU")
    options, overrides = parser.parse_known_args(argv)
    recipe = LARGE if options.large else DEMO
    config = load_config(recipe.config, overrides)  # refuses what is no field, before anything is deleted
    texts = collect(recipe.read)
    if options.held_out:
        tokenizer = Tokenizer.from_file(str(recipe.base / "tokenizer.json"))
        write_held_out(recipe.held_out, passages(texts, tokenizer, recipe.positions), config)
        return 0
    return make_base(recipe, texts, config, overrides)


def make_base(recipe: Recipe, texts: list[str], config: Config, overrides: list[str]) -> int:
    """Trains tokenizer and model, and publishes them; returns train.py's exit code.

    Args:
      config: the training run, with `overrides`, which train.py is given.
    """
    start = recipe.work / "start"
    shutil.rmtree(recipe.work, ignore_errors=True)
    start.mkdir(parents=True)
    tokenizer = train_tokenizer(texts, recipe.geometry["vocab_size"])
    write_companions(start, tokenizer, recipe.geometry)
    rows = list(passages(texts, tokenizer, recipe.positions))
    write_rows(recipe.work / "corpus.jsonl", rows)
    write_held_out(recipe.held_out, rows, config)
    print(f"{len(texts)} texts, {sum(map(len, texts)):,} characters, {len(rows)} rows")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(recipe.config), *overrides]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code == 0:
        publish(recipe, sum(map(len, texts)))
    return code


def write_held_out(file: Path, rows: Iterable[str], config: Config) -> None:
    """The rows that the training run only evaluates on, by the same split."""
    assert isinstance(config.data.eval, float)
    write_rows(file, split_rows(list(rows), config.data.eval, config.seed)[1])


def write_rows(file: Path, texts: Iterable[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def collect(read: Callable[[Path], Iterable[str]]) -> list[str]:
    """The topics, and for each module what `read` finds in it as one text; nothing twice. Sorted by name."""
    seen: set[str] = set()
    texts = [topics[name].strip() for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        if LEFT_OUT.isdisjoint(file.relative_to(library).parts):
            fresh = [text for text in read(file) if text not in seen]
            seen.update(fresh)
            texts.append("\n\n".join(fresh))
    return [text for text in texts if text]


def source(file: Path) -> list[str]:
    """The whole source file."""
    return [file.read_text(errors="ignore").strip()]


def docstrings(file: Path) -> Iterator[str]:
    """The docstrings of a source file, cleaned of their indentation."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(file.read_bytes())):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text:
            yield text.strip()


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE of `vocabulary` tokens: words with their leading space, single digits and punctuation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return tokenizer


def write_companions(folder: Path, tokenizer: Tokenizer, geometry: dict[str, Any]) -> None:
    """Everything of a Hugging Face model folder but the weights."""
    ids = {name: geometry[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [TURN],
        "model_max_length": geometry["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    files = {"config.json": geometry, "generation_config.json": ids, "tokenizer_config.json": settings}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def passages(texts: list[str], tokenizer: Tokenizer, positions: int) -> Iterator[str]:
    """The texts cut into passages that fill a training sequence of `positions` tokens.

    Every second one is a shorter passage written twice, so that looking back pays. 2,400 steps are too few for the
    base to learn copying from it.
    """
    rng = random.Random(0)
    for text in texts:
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        start = 0
        while start < len(offsets):
            twice = rng.random() < 0.5
            length = rng.randint(8, positions // 2 - 4) if twice else positions - 2
            end = min(start + length, len(offsets))
            passage = text[offsets[start][0] : offsets[end - 1][1]]
            yield f"{passage}\n{passage}" if twice else passage
            start = end


def publish(recipe: Recipe, characters: int) -> None:
    """Copies the trained model to the recipe's folder, its weights in bf16, with its card."""
    run = recipe.work / "run"
    weights = load_file(run / "model" / "model.safetensors")
    shutil.rmtree(recipe.base, ignore_errors=True)
    shutil.copytree(run / "model", recipe.base)
    rounded = {name: np.asarray(jnp.asarray(value, jnp.bfloat16)) for name, value in weights.items()}
    save_file(rounded, recipe.base / "model.safetensors", metadata={"format": "pt"})
    parameters = sum(value.size for value in weights.values())
    metrics = read_rows(run / "metrics.jsonl")
    loss = [row["eval_loss"] for row in metrics if "eval_loss" in row][-1]
    print(f"{recipe.base}: {parameters:,} parameters, loss on held-out passages {loss:.2f}")
    if recipe.readme is not None:
        readme = recipe.readme.format(
            python=platform.python_version(),
            characters=characters,
            parameters=parameters,
            steps=metrics[-1]["step"],
            loss=loss,
            vocabulary=recipe.geometry["vocab_size"],
        )
        (recipe.base / "README.md").write_text(readme)


DEMO = Recipe(
    config=ROOT / "configs" / "demo_base.py",
    work=ROOT / "runs" / "demo_base",
    base=ROOT / "demo" / "base",
    held_out=ROOT / "demo" / "heldout.jsonl",
    geometry=GEOMETRY,
    read=docstrings,
    readme=README,
)
LARGE = Recipe(
    config=ROOT / "configs" / "large_base.py",
    work=ROOT / "runs" / "large_base",
    base=ROOT / "runs" / "large_base" / "base",
    held_out=ROOT / "runs" / "large_base" / "heldout.jsonl",
    geometry=LARGE_GEOMETRY,
    read=source,
    readme=None,
)

if __name__ == "__main__":
    raise SystemExit(main())
