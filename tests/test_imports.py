"""The import rule of docs/architecture.md: a file imports from lower floors or its own folder only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    **{"config": 1, "device": 1, "quant": 2, "kernels": 3, "lora": 4, "models": 5, "objective": 6, "io": 6, "data": 6},
    **{"training": 7, "generation": 7, "memory": 8, "serve": 8, "report": 8, "compare": 9, "run": 10, "cli": 11},
}
FILES = sorted((ROOT / "qlora_jax").glob("*/**/*.py"))


def folders_imported(path: Path) -> set[str]:
    """The folders of qlora_jax that a file imports from, anywhere in its text."""
    package = path.relative_to(ROOT).parent.parts
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("qlora_jax.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    own = path.relative_to(ROOT / "qlora_jax").parts[0]
    for folder in folders_imported(path) - {own}:
        assert folder in FLOORS, f"qlora_jax.{folder} has no floor"
        assert FLOORS[folder] < FLOORS[own], f"{own} (floor {FLOORS[own]}) imports {folder}"


def test_the_rule_sees_every_kind_of_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "qlora_jax" / "models" / "families" / "llama.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import qlora_jax.quant.nf4.tensor as t\nfrom qlora_jax import lora\nfrom ...training import loop\n"
        "from .. import layers\ndef late():\n    from qlora_jax.io.hf import load\nfrom ... import data\n"
    )
    assert folders_imported(file) == {"quant", "lora", "training", "models", "io", "data"}


def test_importing_the_package_needs_neither_torch_nor_a_server():
    unwanted = "{'torch', 'fastapi', 'uvicorn', 'prometheus_client'}"
    code = f"import sys, qlora_jax, qlora_jax.serve; print(sorted({unwanted} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
