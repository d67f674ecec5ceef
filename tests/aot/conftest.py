"""What the ahead-of-time tests need, and the table that they fill."""

import importlib.util
import os

import pytest

COLUMNS = ("what", "gpu", "SASS/weight", "registers", "temporaries", "budget")


@pytest.fixture(scope="session")
def cuda_wheels():
    """Skips where nothing can be compiled for a GPU; in `make test-aot` that is an error."""
    if any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        return
    assert "AOT_REQUIRED" not in os.environ, "make test-aot has installed no CUDA plugin"
    pytest.skip("needs JAX's CUDA plugin and ptxas: pip install '.[aot]'")


@pytest.fixture
def measured(record_property):
    """`measured(what=, gpu=, budget=, …)`: a row of the table at the end of the run, by the names in COLUMNS."""

    def record(**cells: str) -> None:
        assert not cells.keys() - set(COLUMNS), f"{cells.keys()} are not {COLUMNS}"
        record_property("aot", cells)

    return record


def pytest_terminal_summary(terminalreporter):
    # Properties travel with the reports from pytest-xdist's workers to the process that prints.
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    rows = [cells for report in reports for name, cells in report.user_properties if name == "aot"]
    if rows:
        terminalreporter.section("ahead-of-time budgets")
        for line in table(sorted(rows, key=lambda cells: (cells["what"], cells["gpu"]))):
            terminalreporter.line(line)


def table(rows: list[dict[str, str]]) -> list[str]:
    """Aligned lines under a header; a cell that does not apply is a dash."""
    cells = [COLUMNS, *(tuple(row.get(column, "-") for column in COLUMNS) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
