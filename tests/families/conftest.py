"""Each family's checkpoint is made once in a session, whichever process needs it first; a table ends the run."""

import os
from pathlib import Path

import jax
import pytest
from filelock import FileLock

from tests.families import table
from tests.families.checkpoints import make
from tests.families.table import CHECKS, Cell


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(name)`: the folder of a family's checkpoint."""
    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have a folder each, side by side.
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "families"
    out.mkdir(exist_ok=True)

    def get(name: str) -> Path:
        done = out / name / "reference.npz"  # what is written last
        with FileLock(out / f"{name}.lock"):
            return done.parent if done.exists() else make(out, name)

    return get


@pytest.fixture(scope="session")
def subject(request, checkpoint, tmp_path_factory):
    """The Subject of a family; tests of one family stand side by side, so that its models are loaded once."""
    from tests.families.checkpoints import one_thread
    from tests.families.subject import Subject

    with one_thread():
        yield Subject(request.param, checkpoint(request.param), tmp_path_factory.mktemp(request.param))
    # Nobody runs this family's programs again: all families' together would take gigabytes.
    jax.clear_caches()


@pytest.fixture
def measured(request, record_property):
    """`measured(figure)`: what the table shows for this family and this check."""
    check = CHECKS[request.node.originalname]
    name = request.node.callspec.params.get("name") or request.node.callspec.params["subject"]
    record_property("family", (name, check))

    def record(figure: float | str) -> None:
        record_property("figure", figure if isinstance(figure, str) else f"{figure:.0e}" if figure else "0")

    return record


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """Prints the table where its tests ran."""
    cells = []
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            found = dict(getattr(report, "user_properties", ()))
            if "family" in found and report.when == "call":
                cells.append(Cell(*found["family"], outcome, found.get("figure", "")))
    if cells:
        terminalreporter.section("families")
        for line in table.lines(cells):
            terminalreporter.write_line(line)
