"""benchmarks/loading.py: what it measures of a small folder, and the table it writes."""

import json
from pathlib import Path

from benchmarks import loading
from tests.cli.tiny import make_model

ROOT = Path(__file__).parents[2]


def test_reading_and_loading_a_folder(tmp_path):
    folder = make_model(tmp_path / "model")
    row = loading.compare(folder, "tiny")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert row["gigabytes"] == size / 1e9
    assert row["first_gb_per_second"] > 0 and row["load_gb_per_second"] > 0 and row["read_gb_per_second"] > 0
    assert row["device_peak"] is None and row["device"] == "cpu"
    # Two packed layers, embedding and output layer in 16 bits, and the norms: less than half of the file's 16 bits.
    assert 2 * 258 * 64 * 2 < row["stored"] < 0.9 * size
    page = loading.table(row)
    assert "| read the files |" in page and "the host's" in page and page.count("\n| ") == 4


def test_the_page_shows_the_stored_figures():
    assert loading.table(json.loads(loading.RESULT.read_text())["rows"][0]) in loading.PAGE.read_text()
