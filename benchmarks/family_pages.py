"""Writes the lists of families in docs/models.md and the example of docs/adding-a-model.md.

    python benchmarks/family_pages.py

What is special about a family is the first line of its table file.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the checkout's root

from benchmarks.pages import fill_part  # noqa: E402
from qlora_jax.models.families import FAMILIES, WRAPPERS  # noqa: E402

MODELS, ADDING = ROOT / "docs" / "models.md", ROOT / "docs" / "adding-a-model.md"
EXAMPLE = "olmo"


def sections() -> dict[Path, dict[str, str]]:
    """The parts of each page by name."""
    source = (ROOT / "qlora_jax" / "models" / "families" / f"{EXAMPLE}.py").read_text()
    return {
        MODELS: {"families": families(), "wrappers": ", ".join(f"`{name}`" for name in WRAPPERS) + "\n"},
        ADDING: {EXAMPLE: f"```python\n{source}```\n"},
    }


def families() -> str:
    """A row for each table file."""
    rows = ["| `model_type` | what it is |", "| --- | --- |"]
    for table in dict.fromkeys(FAMILIES.values()):
        names = ", ".join(f"`{name}`" for name, own in FAMILIES.items() if own is table)
        rows.append(f"| {names} | {(table.__doc__ or '').splitlines()[0]} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    for page, parts in sections().items():
        for name, text in parts.items():
            fill_part(page, name, text)


if __name__ == "__main__":
    main()
