import shutil
from pathlib import Path

import pytest

from qlora_jax.cli.train import main as train
from tests.cli.commands import contents, exit_code
from tests.cli.tiny import make_model, write_config, write_rows


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """A folder with a model, rows, a configuration and a finished run of them."""
    folder = tmp_path_factory.mktemp("sound")
    model, rows = make_model(folder / "model"), write_rows(folder / "rows.jsonl")
    config = write_config(folder / "config.py", model, rows)
    assert train(["--config", str(config), f"--config.output_dir={folder / 'run'}"]) == 0
    return folder


@pytest.fixture
def model(sound, tmp_path) -> Path:
    """A copy of the model, for damaging."""
    return shutil.copytree(sound / "model", tmp_path / "damaged")


@pytest.fixture
def run(sound, tmp_path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(sound / "run", tmp_path / "run")


@pytest.fixture
def fails(sound, tmp_path, capsys):
    """`fails(main, argv, *words)`: the command ends with `code` and a line with the words; files stay."""

    def files() -> dict:
        return contents(sound) | contents(tmp_path)

    def check(main, argv, *words: str, code: int = 1) -> str:
        before = files()
        capsys.readouterr()
        assert exit_code(main, argv) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Traceback" not in printed.err
        [line] = [line for line in printed.err.splitlines() if "error: " in line]
        assert printed.err.endswith(line + "\n")
        # argparse's own errors end with 2 and open with the command's name.
        assert line.startswith("error: ") == (code == 1)
        assert [word for word in words if word not in line] == [], line
        assert files() == before
        return line

    return check
