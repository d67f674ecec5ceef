"""What ships for `make demo`: the base and the tasks."""

import json
from pathlib import Path

import pytest

from qlora_jax.data import load_tokenizer
from qlora_jax.io.hf import load_model, read_config
from qlora_jax.models.parameters import count_parameters
from qlora_jax.train.config import load_config

ROOT = Path(__file__).resolve().parents[1]
BASE, TASKS = ROOT / "demo" / "base", ROOT / "demo" / "tasks"
SIZES = {"train": 3072, "validation": 128, "test": 256}
ANSWERS = {
    "first": lambda words, asked: words[0],
    "last": lambda words, asked: words[-1],
    "after": lambda words, asked: words[words.index(asked) + 1],
    "repeat": lambda words, asked: " ".join(words),
    "swap": lambda words, asked: f"{words[1]} {words[0]}",
    "count": lambda words, asked: str(len(words)),
}


def rows(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (TASKS / f"{split}.jsonl").read_text().splitlines()]


def test_base_is_a_whole_small_model_folder():
    names = {file.name for file in BASE.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 8_000_000
    assert "Python Software Foundation" in (BASE / "README.md").read_text()


def test_base_loads():
    model = load_model(BASE, dtype="bfloat16", quant="nf4").model
    assert count_parameters(model.config) == 2_000_000
    assert count_parameters(read_config(BASE)) == 2_000_000


def test_tokenizer_splits_digits_and_keeps_words_whole():
    tokenizer = load_tokenizer(str(BASE))
    assert tokenizer.tokenize("a module 12") == ["a", "Ġmodule", "Ġ", "1", "2"]
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|begin|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("split", SIZES)
def test_every_answer_is_right(split):
    found = rows(split)
    assert len(found) == SIZES[split]
    assert {row["task"] for row in found} == set(ANSWERS)
    for row in found:
        instruction, _, rest = row["prompt"].removesuffix("\nAnswer:").partition(": ")
        answer = ANSWERS[row["task"]](rest.split(" "), instruction.split(" ")[-1])
        assert row["completion"] == f" {answer}", row


def test_no_prompt_occurs_twice():
    prompts = [row["prompt"] for split in SIZES for row in rows(split)]
    assert len(prompts) == 3456
    assert len(set(prompts)) == 3456


def test_configs_name_what_ships():
    demo = load_config(ROOT / "configs" / "demo.py")
    assert (demo.method, demo.quant.double, demo.lora.rank, demo.lora.targets) == ("qlora", True, 16, "all-linear")
    assert (demo.model.path, demo.data.train) == ("demo/base", "demo/tasks/train.jsonl")
    assert demo.data.eval == "demo/tasks/validation.jsonl"
    assert demo.data.exact_match
    assert load_config(ROOT / "configs" / "demo_base.py").method == "full"
