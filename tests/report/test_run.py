"""report.html: complete, escaped, without external resources; and the curves in it."""

import re
from html.parser import HTMLParser

import pytest

from qlora_jax.config import Config, LoraSection, apply_overrides
from qlora_jax.report.curves import Series, average_down, line_chart, ticks
from qlora_jax.report.page import Bar, BarChart
from qlora_jax.report.run import Sample, make_chart, settings_table, write_report

ROWS = [
    {"step": 0, "eval_loss": 3.0},
    *({"step": step, "loss": 3 / step, "learning_rate": 1e-3} for step in range(1, 9)),
    {"step": 8, "eval_loss": 0.5, "exact_match": 0.75},
]


@pytest.fixture
def page(tmp_path) -> str:
    path = write_report(
        tmp_path,
        rows=ROWS,
        samples=[Sample(prompt="<b>2 & 2?</b>", before="<script>alert(1)</script>", after="4", expected="4")],
        config=Config(lora=LoraSection(targets=("q_proj", "v_proj"))),
        facts={"Trainable parameters": "4,194,304 (0.06 %)", "Peak memory": "5.1 GiB"},
        memory=BarChart(
            title="Memory",
            bars=[
                Bar(name="full", value=30, rest=70, words="100 GB", style="second"),
                Bar(name="QLoRA (this run)", value=4, rest=1, words="5 GB", style="third", chosen=True),
            ],
            note="by arithmetic",
        ),
    )
    assert path == tmp_path / "report.html"
    return path.read_text()


def test_the_page_holds_everything(page):
    for text in (
        "4,194,304 (0.06 %)",
        "5.1 GiB",
        "training, last 0.375",
        "evaluation, last 0.5",
        "Exact match",
    ):
        assert text in page
    assert "<td>lora.targets</td><td>q_proj,v_proj</td>" in page
    assert "<td>optim.clip</td><td>0.3</td>" in page
    assert re.search(r"<td>jax</td><td>\d+\.\d+", page)
    assert "Gradient norm" not in page  # no row has it


def test_memory_is_shown_as_bars_of_one_scale(page):
    assert re.findall(r'style="width: ([\d.]+)%', page) == ["30.00", "70.00", "4.00", "1.00"]
    assert '<div class="bar third chosen">' in page and "by arithmetic" in page


def test_it_follows_the_dark_scheme_and_the_width_of_a_phone(page):
    assert "@media (prefers-color-scheme: dark)" in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page


def test_text_is_escaped(page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&lt;b&gt;2 &amp; 2?&lt;/b&gt;" in page
    assert "<script" not in page and "<b>" not in page


def test_nothing_is_loaded_from_elsewhere(page):
    assert not re.search(r"(?:src|href|action)=|url\(|@import|https?://", page)


def test_tags_are_balanced(page):
    class Checker(HTMLParser):
        open: list[str] = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "line", "circle", "polyline"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            if tag not in ("line", "circle", "polyline"):
                assert self.open.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert checker.open == []


def test_a_run_without_rows_or_samples_has_a_report(tmp_path):
    text = write_report(tmp_path, rows=[], samples=[], config=Config(), facts={}).read_text()
    assert "Configuration" in text and "<svg" not in text and "Before and after" not in text


def test_a_chart_leaves_null_out():
    chart = make_chart("Loss", {"loss": "training"}, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}])
    assert chart.legend == [("first", "training", "2")]
    assert make_chart("Loss", {"loss": "training"}, [{"step": 1, "eval_loss": 2.0}]) is None


def test_large_values_are_written_out():
    chart = make_chart("Speed", {"speed": "tokens"}, [{"step": 1, "speed": 24490.2}])
    assert chart.legend == [("first", "tokens", "24,490")] and "e+04" not in chart.svg


def test_points_lie_where_they_should():
    svg = line_chart([Series(name="a", style="first", points=[(0, 0.0), (10, 4.0)])], label="Loss")
    assert 'points="68.0,200.0 496.0,12.0"' in svg  # bottom left to top right of the plot


@pytest.mark.parametrize("value", [0.0, 2.5, -1e-9])
def test_a_single_point_is_drawn(value):
    svg = line_chart([Series(name="a", style="first", points=[(3, value)])], label="Loss")
    assert svg.count("<circle") == 1 and "nan" not in svg


def test_long_series_are_averaged():
    points = average_down([(step, step % 2) for step in range(1000)])
    assert len(points) == 250 and points[0] == (1.5, 0.5)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 4, [0, 1, 2, 3, 4]),
        (0.3, 1.1, [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]),
        (0, 1000, [0, 500, 1000]),
        (5, 5, [4, 6]),
    ],
)
def test_ticks(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_settings_are_shown_as_the_command_line_takes_them():
    words = [
        "--config.lora.targets=q_proj,v_proj",
        '--config.data.train=[{"path": "a", "weight": 2}, {"path": "b", "weight": 1}]',
    ]
    shown = dict(settings_table(apply_overrides(Config(), words)))
    assert [f"--config.{name}={shown[name]}" for name in ("lora.targets", "data.train")] == words
