"""The run's numbers: `metrics.jsonl`, one JSON object a line, and the same in TensorBoard."""

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboardX import SummaryWriter

Row = Mapping[str, Any]
logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends rows to `run_dir/metrics.jsonl` and `run_dir/tensorboard`.

    A training row has `step` and `loss`, an evaluation row `step` and `eval_loss`; no row has both.
    With `restored_step`, the rows up to that step are kept (`kept`) and later ones dropped, because they will be
    written again; without it the log starts empty.
    """

    def __init__(self, run_dir: str | Path, *, restored_step: int | None = None) -> None:
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        whole = [] if restored_step is None else repaired_rows(path)
        self.kept = [row for row in whole if row["step"] <= restored_step]
        replace_rows(path, self.kept)
        self._file = path.open("a", encoding="utf-8")
        purge = None if restored_step is None else restored_step + 1
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, row: Row) -> None:
        """Append a row at once. ValueError unless it has `step` and just one of `loss` and `eval_loss`."""
        if "step" not in row or ("loss" in row) == ("eval_loss" in row):
            raise ValueError(f"row {dict(row)}: expected `step` and either `loss` or `eval_loss`")
        self._file.write(to_line(row))
        self._file.flush()
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def to_line(row: Row) -> str:
    """One line of JSON. JSON has no word for NaN and infinity: they become null."""
    infinite = {name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps({name: None if name in infinite else value for name, value in row.items()}) + "\n"


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl, oldest first; none if there is no such file.

    A last line without its newline is what a killed process leaves, and is skipped. So are damaged lines.
    """
    return [row for _, row in _lines(Path(path)) if row is not None]


def repaired_rows(path: Path) -> list[dict[str, Any]]:
    """`read_rows`; says which lines are damaged, and then keeps the file as it is beside its own place."""
    lines = list(_lines(path))
    damaged = [number for number, row in lines if row is None]
    if damaged:
        copy = path.with_suffix(".damaged.jsonl")
        shutil.copyfile(path, copy)
        shown = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
        logger.warning(f"{path}: damaged and left out: line {shown}; {copy.name} holds the file as it was")
    return [row for _, row in lines if row is not None]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The number of each line, from 1, and its row; None where it is damaged."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, or no text
            row = None
        yield number, row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def replace_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows in place of the file's own, all or nothing."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(to_line(row) for row in rows), encoding="utf-8")
    os.replace(fresh, path)
