"""What a run has left in its folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_jax.io.checkpoint import Checkpoints
from qlora_jax.training.metrics import read_rows
from qlora_jax.training.run_folder import CHECKPOINTS, SUMMARY


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A run's folder, and what is in it when it is asked for.

    Attributes:
      folder: the run folder.
      stopped: the signal that ended the call before the run was complete, or None.
    """

    folder: Path
    stopped: int | None = None

    @property
    def adapter(self) -> Path | None:
        """The folder of the trained adapter, in PEFT's format; None in a full fine-tune, and before the end."""
        return self._existing("adapter")

    @property
    def model(self) -> Path | None:
        """The Hugging Face folder of a model that was trained in full; None with adapters, and before the end."""
        return self._existing("model")

    @property
    def report(self) -> Path | None:
        """The page with curves and answers; None before the end."""
        return self._existing("report.html")

    @property
    def steps(self) -> int:
        """Optimizer steps whose state is saved."""
        return max(Checkpoints.steps_in(self.folder / CHECKPOINTS), default=0)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, oldest first: those of steps have `loss`, those of evaluations `eval_loss`."""
        return read_rows(self.folder / "metrics.jsonl")

    @property
    def summary(self) -> dict[str, Any] | None:
        """What summary.json says of a run that is complete; None before the end."""
        file = self._existing(SUMMARY)
        return None if file is None else json.loads(file.read_text())

    def _existing(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.exists() else None
