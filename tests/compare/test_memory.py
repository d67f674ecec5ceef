"""The 7B rows: 28, 14 and 4 GB, and the 0.06 % that is trained."""

from pathlib import Path

import pytest

from qlora_jax.compare import memory
from qlora_jax.compare.memory import LLAMA_2_7B, memory_in_a_process
from qlora_jax.io.hf import read_config
from qlora_jax.memory.compile import CompilerMissing

ROOT = Path(__file__).parents[2]


def test_the_geometry_is_llama_2_7bs():
    assert read_config(ROOT / "configs/geometry/llama-2-7b.json") == LLAMA_2_7B


def test_what_cannot_be_compiled_is_arithmetic_and_says_why(monkeypatch):
    def missing(*arguments):
        raise CompilerMissing("needs the plugin")

    monkeypatch.setattr(memory, "compile_for", missing)
    found = memory.memory_of_7b("h200")
    assert (found["gpu"], found["how"], found["not_compiled"]) == (
        None,
        "arithmetic of scripts/plan.py",
        "needs the plugin",
    )


def test_weights_and_totals_by_arithmetic():
    found = memory_in_a_process(None)
    rows = {row["method"]: row for row in found["rows"]}
    assert {method: row["weights_bytes"] for method, row in rows.items()} == {
        "full": 4 * 6_738_415_616,
        "lora": 2 * 6_738_415_616,
        "qlora": 3_540_351_108,
    }
    totals = {method: row["total_bytes"] / 1e9 for method, row in rows.items()}
    assert totals == pytest.approx({"full": 108.6, "lora": 13.94, "qlora": 3.92}, rel=0.01)
    assert {method: row["trainable"] for method, row in rows.items()} == {
        "full": 6_738_415_616,
        "lora": 4_194_304,
        "qlora": 4_194_304,
    }
    assert f"{rows['qlora']['trainable_share']:.2%}" == "0.06%"
    assert (found["gpu"], {row["compiled"] for row in rows.values()}) == (None, {False})
