"""compare.json: its keys, its figures, and that each can be computed again; and the page that shows it."""

import json
import re

import pytest

from qlora_jax.compare.results import comparison, share
from qlora_jax.compare.study import Study
from qlora_jax.report.comparison import ablation_charts, write_comparison
from tests.compare.study import CONFIG, Trainer, outcomes

ABOUT = {
    "machine": {"device": "cpu", "platform": "cpu", "cpu": "<b>Xeon</b>", "arch": "x86_64"},
    "versions": {"jax": "1"},
}
MEMORY = {
    "model": "Llama-2-7B",
    "tokens": 512,
    "gpu": None,
    "how": "arithmetic",
    "not_compiled": "not asked for",
    "rows": [
        {"method": m, "dtype": d, "weights_bytes": w, "total_bytes": t, "trainable": n, "trainable_share": n / 1e10}
        for m, d, w, t, n in (
            ("full", "fp32", 27_000_000_000, 108_000_000_000, 10_000_000_000),
            ("lora", "bf16", 13_500_000_000, 14_000_000_000, 4_194_304),
            ("qlora", "nf4", 3_500_000_000, 3_900_000_000, 4_194_304),
        )
    ],
}


@pytest.fixture
def result(tmp_path):
    study = Study(CONFIG, tmp_path / "out", "default")
    found = comparison(study, list(outcomes(study, Trainer())), MEMORY, ABOUT)
    return json.loads(json.dumps(found))


def test_rows_have_what_is_promised(result):
    assert [row["method"] for row in result["rows"]] == ["base", "full", "lora", "qlora"]
    names = {"method", "seeds", "trainable", "peak_bytes", "heldout_loss", "exact_match", "gain_kept"}
    assert all(names <= set(row) for row in result["rows"])
    base, full, lora, qlora = result["rows"]
    assert (base["seeds"], base["trainable"], base["heldout_loss"], base["exact_match"]) == ([], 0, 5.0, 0.25)
    assert (full["seeds"], full["trainable"], full["peak_bytes"]) == ([7, 8, 9], 1000, 8_000_000)
    assert [row["heldout_loss"] for row in (full, lora, qlora)] == pytest.approx([1.01, 1.11, 1.21])
    assert (qlora["train_loss"], qlora["tokens_per_second"]) == (pytest.approx(4 / 3), 200.0)
    assert qlora["spread"]["heldout_loss"] == pytest.approx([1.2, 1.22])
    assert [one["chosen"] for one in result["search"]] == pytest.approx([1e-2, 1e-2, 3e-3])


def test_every_share_can_be_computed_again(result):
    base, full, lora, qlora = result["rows"]
    assert (base["gain_kept"], full["gain_kept"]) == (0.0, pytest.approx(1.0))
    for row in (full, lora, qlora):
        gain = base["heldout_loss"] - row["heldout_loss"]
        assert row["gain_kept"] == pytest.approx(gain / (base["heldout_loss"] - full["heldout_loss"]))
        assert row["heldout_loss"] == pytest.approx(sum(run["heldout_loss"] for run in row["runs"]) / 3)
    assert qlora["gain_kept"] == pytest.approx(3.79 / 3.99)
    assert qlora["exact_match_kept"] == 1.0


@pytest.mark.parametrize(
    ("base", "method", "full", "expected"),
    [(5.0, 2.0, 1.0, 0.75), (0.25, 0.5, 0.75, 0.5), (None, 0.5, 1.0, None), (1.0, 0.5, 1.0, None)],
)
def test_share(base, method, full, expected):
    assert share(base, method, full) == expected


def test_the_page_shows_it(result, tmp_path):
    page = write_comparison(tmp_path, result).read_text()
    for text in (
        "95.0%",  # what QLoRA keeps
        "4,194,304 (0.04%)",
        "3.90 GB, 6.9× less than 32-bit weights",
        "1.2100 [1.2000, 1.2200]",
        "0.001: 0.0020; 0.003: 0.0000 (chosen); 0.01: 0.0070",
        "&lt;b&gt;Xeon&lt;/b&gt;",
        "<td>lora.alpha</td><td>32.0</td>",
    ):
        assert text in page, text
    assert page.count("<polyline") == 3
    widths = [float(width) for width in re.findall(r"width: ([\d.]+)%", page)]
    assert max(widths) == 100 and 50.0 in widths  # LoRA's weights beside the full ones
    assert "<script" not in page and not re.search(r"(?:src|href|action)=|url\(|@import|https?://", page)


def test_the_page_of_ablations_shows_each_beside_what_it_changes(tmp_path):
    study = Study(CONFIG, tmp_path / "out", "ablations")
    result = comparison(study, list(outcomes(study, Trainer())), MEMORY, ABOUT)
    adapters = {row["method"]: row for row in result["rows"]}
    adapters["qlora-qv"]["trainable"] += 1  # the trainer gives all methods the same
    storage, others = ablation_charts(result["rows"])
    assert [bar.name for bar in storage.bars[:3]] == ["LoRA", "QLoRA", "QLoRA, no double quantization"]
    assert [bar.name for bar in others.bars] == ["QLoRA", "QLoRA on q and v only"]
    assert len(storage.bars) + len(others.bars) == len(adapters) - 2 + 1  # QLoRA is in both
    page = write_comparison(tmp_path, result).read_text()
    assert page.index("Storage of the base") < page.index("Ranks and layers of the adapters")
    assert ablation_charts(result["rows"][:4]) == []


def test_a_run_without_exact_matches_has_none(tmp_path):
    import dataclasses

    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, exact_match=False))
    study = Study(config, tmp_path / "out", "quick")
    result = comparison(study, list(outcomes(study, Trainer())), MEMORY, ABOUT)
    assert {row["exact_match"] for row in result["rows"]} == {None}
    assert {row["exact_match_kept"] for row in result["rows"]} == {None}
    assert "Exact match" not in write_comparison(tmp_path, result).read_text()
