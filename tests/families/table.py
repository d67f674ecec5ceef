"""The table of families and checks: which there are, which are left out and why, and how it is printed."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from qlora_jax.models.families import FAMILIES
from tests.families import checkpoints
from tests.families.checkpoints import NAMES, text_type
from tests.families.layouts import LAYOUTS

# The columns by the tests that fill them.
CHECKS = {
    "test_whole_texts_and_packed_documents": "logits",
    "test_generating_through_a_cache": "cache",
    "test_generating_is_greedy": "greedy",
    "test_peft_loads_our_adapter": "to PEFT",
    "test_we_read_pefts_adapter": "of PEFT",
    "test_the_adapter_of_the_other_class_is_read": "prefix",
    "test_transformers_loads_the_merged_folder": "merged",
    "test_nf4_is_what_it_stands_for": "NF4",
    "test_a_4_bit_folder_is_the_nf4_model": "4-bit",
    "test_bitsandbytes_unpacks_our_folder": "bnb4",
    "test_adapters_in_one_batch_are_each_alone": "served",
    "test_gradients_of_adapters": "gradients",
    "test_16_bits_are_as_close_as_transformers_own": "bf16",
}
READ = [name for name in NAMES if text_type(name) in FAMILIES]
# One for each kind of block: soft caps and norms around blocks, sinks, layers that borrow, fused projections, norms
# after blocks.
WITH_GRADIENTS = ("llama", "gemma2", "gpt_oss", "gemma4_e", "phi3", "olmo2")


class Cell(NamedTuple):
    """What a test says of a family: its outcome, and the figure that it measured where there is one."""

    name: str
    check: str
    outcome: str
    figure: str = ""


def options(name: str) -> Mapping[str, Any]:
    """The arguments of a checkpoint's text configuration."""
    return _arguments(name).get("text_config", _arguments(name))


def _arguments(name: str) -> Mapping[str, Any]:
    return checkpoints.FAMILIES[LAYOUTS[name].family if name in LAYOUTS else name].options


def has_experts(name: str) -> bool:
    """Whether some layers of a checkpoint are mixtures of experts."""
    return any("experts" in option and value for option, value in options(name).items())


def is_wrapped(name: str) -> bool:
    """Whether it is a model of more than text."""
    return "text_config" in _arguments(name)


def left_out(check: str, name: str) -> str:
    """Why a family has no such check; nothing where it has it."""
    packed = name in LAYOUTS and LAYOUTS[name].unpacks
    if name not in READ:
        return "not read yet"
    if check in ("4-bit", "bnb4", "bf16", "gradients") and packed:
        return "holds 4-bit weights already"
    if check in ("gradients", "served", "greedy", "cache") and name in LAYOUTS and check != "cache":
        return "the same model as another row"
    if check == "bnb4" and has_experts(name):
        return "transformers reads no experts in 4 bits"
    if check == "prefix" and not is_wrapped(name):
        return "one class only"
    return "" if check != "gradients" or name in WITH_GRADIENTS else "its kind of block has another row"


def families(check: str) -> list[str]:
    """The checkpoints that have a check."""
    return [name for name in NAMES if not left_out(check, name)]


def lines(cells: Iterable[Cell]) -> list[str]:
    """The table, and the reasons for what it leaves out."""
    found = {(cell.name, cell.check): cell for cell in cells}
    columns = [check for check in CHECKS.values() if any(check == one for _, one in found)]
    reasons: dict[str, str] = {}

    def shown(name: str, check: str) -> str:
        cell = found.get((name, check))
        if cell is not None:
            return {"passed": "✓ ", "failed": "✗ "}.get(cell.outcome, f"{cell.outcome} ") + cell.figure
        reason = left_out(check, name) or "not run"
        return f"– {reasons.setdefault(reason, chr(ord('a') + len(reasons)))}"

    rows = [["", *columns]]
    rows += [[name, *(shown(name, check) for check in columns)] for name in NAMES]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*table, *(f"{letter}: {reason}" for reason, letter in reasons.items())]
