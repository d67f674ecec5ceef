"""README.md of the folders that are written for others: what it is, from what, and how to load it."""

import re
from pathlib import Path

from qlora_jax.config import LoraSection

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def adapter_card(lora: LoraSection, base: str, parameters: int) -> str:
    """The card of an adapter folder."""
    return _card(
        title="LoRA adapter",
        base=base,
        library="peft",
        tags=["lora", "qlora-jax"],
        text=f"{_describe(lora)}, {parameters:,} parameters, trained with qlora-jax.",
        code=[
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{_base_name(base)}")',
            'model = PeftModel.from_pretrained(base, "this-folder")',
        ],
    )


def model_card(title: str, base: str, text: str, *, tags: tuple[str, ...] = ()) -> str:
    """The card of a whole model's folder."""
    return _card(
        title=title,
        base=base,
        library="transformers",
        tags=[*tags, "qlora-jax"],
        text=text,
        code=[
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("this-folder", dtype="auto")',
            'tokenizer = AutoTokenizer.from_pretrained("this-folder")',
        ],
    )


def _describe(lora: LoraSection) -> str:
    name = "rsLoRA" if lora.variant == "rslora" else "LoRA"
    return f"{name} of rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}"


def _base_name(base: str) -> str:
    """A path is private to the machine that it was written on: a card shows its last part."""
    return base if _on_the_hub(base) else Path(base).name


def _on_the_hub(base: str) -> bool:
    return bool(HUB_ID.fullmatch(base)) and not Path(base).exists()


def _card(*, title: str, base: str, library: str, tags: list[str], text: str, code: list[str]) -> str:
    head = [f"base_model: {base}"] if _on_the_hub(base) else []
    head += [
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    lines = ["---", *head, "---", "", f"# {title}", "", f"Base model: `{_base_name(base)}`. {text}", ""]
    return "\n".join([*lines, "```python", *code, "```", ""])
