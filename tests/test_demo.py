"""What ships for `make demo`: the base and the tasks."""

import ast
import json
import runpy
from pathlib import Path

import pytest

from qlora_jax.config import load_config
from qlora_jax.data import load_tokenizer
from qlora_jax.io.hf import load_model, read_config
from qlora_jax.models.table import count_parameters
from qlora_jax.quant.rules import rules_for

ROOT = Path(__file__).resolve().parents[1]
BASE, TASKS = ROOT / "demo" / "base", ROOT / "demo" / "tasks"
SIZES = {"train": 3072, "validation": 128, "test": 256}
OPERATORS = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
COMPARISONS = {ast.Eq: "equal", ast.Lt: "less", ast.Gt: "greater"}
STATEMENTS = {
    ast.For: "loop",
    ast.While: "loop",
    ast.FunctionDef: "function",
    ast.ClassDef: "class",
    ast.Import: "import",
    ast.ImportFrom: "import",
    ast.Assign: "assignment",
    ast.Return: "return",
    ast.Raise: "error",
    ast.If: "condition",
}


def literal(text):
    node = ast.parse(text, mode="eval").body
    return type(node.value).__name__ if isinstance(node, ast.Constant) else type(node).__name__.lower()


def statement(text):
    whole = f"{text} pass" if text.endswith(":") else text
    return STATEMENTS[type(ast.parse(whole).body[0])]


def operator(text):
    node = ast.parse(text, mode="eval").body
    return COMPARISONS[type(node.ops[0])] if isinstance(node, ast.Compare) else OPERATORS[type(node.op)]


# What Python's own parser makes of each question.
ANSWERS = {
    "literal": ("type of ", literal),
    "parity": ("even or odd, ", lambda text: "odd" if int(text.split()[-1]) % 2 else "even"),
    "statement": ("kind of ", statement),
    "operator": ("operator of ", operator),
    "count": ("how many words, ", lambda text: str(len(text.split()))),
    "last": ("last word, ", lambda text: text.split()[-1]),
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
    model = load_model(BASE, dtype="bfloat16", rules=rules_for("nf4")).model
    assert count_parameters(model.config) == 2_016_960
    assert count_parameters(read_config(BASE)) == 2_016_960


def test_tokenizer_splits_digits_and_keeps_words_whole():
    tokenizer = load_tokenizer(str(BASE))
    assert tokenizer.tokenize("a module 12") == ["a", "Ġmodule", "Ġ", "1", "2"]
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    messages = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<|begin|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_base_has_held_out_text():
    texts = [json.loads(line)["text"] for line in (ROOT / "demo" / "heldout.jsonl").read_text().splitlines()]
    assert len(texts) == 88 == round(0.02 * 4424)  # configs/demo_base.py holds out 2 % of the passages


@pytest.mark.parametrize("split", SIZES)
def test_every_answer_is_right(split):
    found = rows(split)
    assert len(found) == SIZES[split]
    assert {row["task"] for row in found} == set(ANSWERS)
    for row in found:
        question, answer = ANSWERS[row["task"]]
        text = row["prompt"].removesuffix("\nAnswer:").removeprefix(f"Question: {question}")
        assert row["completion"] == f" {answer(text)}", row


def test_no_prompt_occurs_twice():
    prompts = [row["prompt"] for split in SIZES for row in rows(split)]
    assert len(prompts) == 3456
    assert len(set(prompts)) == 3456


def test_configs_name_what_ships():
    demo = load_config(ROOT / "configs" / "demo.py")
    assert (demo.method, demo.quant.double, demo.lora.rank, demo.lora.targets) == ("qlora", True, 16, "all-linear")
    assert (demo.model.path, demo.data.train) == ("demo/base", "demo/tasks/train.jsonl")
    assert demo.data.eval == "demo/tasks/validation.jsonl"
    assert demo.data.test == "demo/tasks/test.jsonl"
    assert demo.data.exact_match
    assert load_config(ROOT / "configs" / "demo_base.py").method == "full"


def test_the_large_base_is_made_where_its_configs_look(tmp_path):
    recipe = runpy.run_path(str(ROOT / "scripts" / "make_demo_base.py"))["LARGE"]
    (tmp_path / "config.json").write_text(json.dumps(recipe.geometry))
    assert count_parameters(read_config(tmp_path)) == 113_271_552
    training, tuning = load_config(recipe.config), load_config(ROOT / "configs" / "large.py")
    assert (training.method, training.train.seq_len) == ("full", recipe.positions)
    assert training.data.train == "runs/large_base/corpus.jsonl"
    assert ROOT / training.model.path == recipe.work / "start"
    assert ROOT / training.output_dir == recipe.work / "run"
    assert ROOT / tuning.model.path == recipe.base
