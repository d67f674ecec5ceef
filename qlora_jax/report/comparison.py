"""The comparison's report.html: bars side by side, curves, and every row of compare.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.config import from_dict
from qlora_jax.report.curves import Series, line_chart
from qlora_jax.report.methods import STYLES, TITLES
from qlora_jax.report.page import Bar, BarChart, write_page
from qlora_jax.report.run import Chart, settings_table
from qlora_jax.report.words import figures, gigabytes, percent, range_of, rate

Result = Mapping[str, Any]
COLUMNS = ("method", "rate", "trained", "held-out loss", "exact match", "gain kept", "tokens/s", "step's peak")
MODES = {"quick": "one seed, fewer steps", "default": "three seeds", "ablations": "three seeds, with ablations"}


def write_comparison(out: Path, result: Result) -> Path:
    """Writes `out/report.html` from what compare.json holds, and returns its path."""
    settings = settings_table(from_dict(result["config"]))
    return write_page(
        out / "report.html",
        "comparison.html",
        facts=facts(result),
        memory=memory_charts(result["memory"]),
        quality=quality_charts(result["rows"]),
        ablations=ablation_charts(result["rows"]),
        cost=cost_charts(result["rows"]),
        curves=curves(result["rows"]),
        columns=COLUMNS,
        rows=[cells(row) for row in result["rows"]],
        searches=[search_cells(one) for one in result["search"]],
        settings=[(name, value) for name, value in settings if name not in ("method", "output_dir")],
        versions=list(result["versions"].items()),
    )


def facts(result: Result) -> dict[str, str]:
    """What people read first."""
    rows = {row["method"]: row for row in result["rows"]}
    seven = {row["method"]: row for row in result["memory"]["rows"]}
    ratio = seven["full"]["weights_bytes"] / seven["qlora"]["total_bytes"]
    found = {
        "QLoRA keeps of the full fine-tune's gain": percent(rows["qlora"]["gain_kept"]),
        "and of its gain in exact matches": percent(rows["qlora"]["exact_match_kept"]),
        "Trained, of a 7B model": f"{seven['qlora']['trainable']:,} ({seven['qlora']['trainable_share']:.2%})",
        "QLoRA's 7B train step": f"{gigabytes(seven['qlora']['total_bytes'])}, {ratio:.1f}× less than 32-bit weights",
        "Runs": f"{MODES[result['mode']]}, {result['machine']['cpu']} ({result['machine']['device']})",
    }
    return {name: value for name, value in found.items() if value != "-"}


def memory_charts(memory: Result) -> list[BarChart]:
    """The weights alone, and the whole train step, of a 7B model."""
    bars = {
        name: [
            Bar(name=TITLES[row["method"]], value=row[name], words=gigabytes(row[name]), style=STYLES[row["method"]])
            for row in memory["rows"]
        ]
        for name in ("weights_bytes", "total_bytes")
    }
    step = f"One row of {memory['tokens']} tokens: weights, gradients, optimizer state, activations; {memory['how']}."
    return [
        BarChart(
            title=f"{memory['model']}: the stored weights",
            bars=bars["weights_bytes"],
            note="32 bits each in a full fine-tune, 16 under LoRA, NF4 with double quantization under QLoRA.",
        ),
        BarChart(title=f"{memory['model']}: the whole train step", bars=bars["total_bytes"], note=step),
    ]


def main_rows(rows: Sequence[Result]) -> list[Result]:
    """The base and the three methods."""
    return [row for row in rows if row["method"] in TITLES]


def bar_chart(title: str, rows: Sequence[Result], name: str, form: str, note: str = "") -> list[BarChart]:
    """The chart of one figure, the seeds' range beside each bar; none where no row has the figure."""
    bars = [
        Bar(
            name=TITLES.get(row["method"]) or row["title"],
            value=max(row[name], 0),
            words=form.format(row[name]) + range_of(row["spread"].get(name), form),
            style=STYLES.get(row["method"], "fourth"),
        )
        for row in rows
        if row[name] is not None
    ]
    return [BarChart(title=title, bars=bars, note=note)] if bars else []


def quality_charts(rows: Sequence[Result]) -> list[BarChart]:
    """What was learned, on the test rows."""
    shown = main_rows(rows)
    kept = "Of the full fine-tune's fall in held-out loss. In brackets: lowest and highest of the seeds."
    return [
        *bar_chart("Gain kept", shown, "gain_kept", "{:.1%}", kept),
        *bar_chart("Held-out loss", shown, "heldout_loss", "{:.4f}", "Nats per scored token; shorter is better."),
        *bar_chart("Exact match", shown, "exact_match", "{:.1%}", "Whole answers that are right."),
    ]


def ablation_charts(rows: Sequence[Result]) -> list[BarChart]:
    """The ablations beside LoRA and QLoRA, those with the same adapters and those with others; no chart without any."""
    if len(rows) == len(main_rows(rows)):
        return []
    own = next(row["trainable"] for row in rows if row["method"] == "qlora")
    adapters = [row for row in rows if row["method"] not in ("base", "full")]
    same = [row for row in adapters if row["trainable"] == own]
    others = [row for row in adapters if row["trainable"] != own or row["method"] == "qlora"]
    note = "Held-out loss, nats per scored token; shorter is better."
    return [
        *bar_chart("Storage of the base", same, "heldout_loss", "{:.4f}", note),
        *bar_chart("Ranks and layers of the adapters", others, "heldout_loss", "{:.4f}", note),
    ]


def cost_charts(rows: Sequence[Result]) -> list[BarChart]:
    """What it took, on this machine."""
    shown = main_rows(rows)
    measured = any(row["device_peak_bytes"] for row in shown)
    name, words = ("device_peak_bytes", "measured") if measured else ("peak_bytes", "compiled")
    megabytes = [{**row, name: row[name] and row[name] / 1e6} for row in shown]
    return [
        *bar_chart(f"Memory of the train step, {words}", megabytes, name, "{:,.1f} MB"),
        *bar_chart("Tokens per second", shown, "tokens_per_second", "{:,.0f}", "Median of the logged steps."),
    ]


def curves(rows: Sequence[Result]) -> list[Chart]:
    """The training losses of each method's first seed."""
    series = [
        Series(name=TITLES[row["method"]], style=STYLES[row["method"]], points=row["runs"][0]["losses"])
        for row in main_rows(rows)
        if row["runs"]
    ]
    title = f"Training loss, seed {rows[1]['seeds'][0]}"
    return [Chart(title=title, svg=line_chart(series, label=title), legend=[(s.style, s.name, "") for s in series])]


def cells(row: Result) -> list[str]:
    """A row of the whole table."""
    peak = row["device_peak_bytes"] or row["peak_bytes"]
    found = figures(row) | {"step's peak": f"{peak / 1e6:,.1f} MB" if peak else "-"}
    return [found[column] for column in COLUMNS]


def search_cells(search: Result) -> tuple[str, str]:
    """The method, and the validation loss at each rate that was tried."""
    tried = [
        f"{rate(one['learning_rate'])}: "
        + ("diverged" if one["validation_loss"] is None else f"{one['validation_loss']:.4f}")
        + (" (chosen)" if one["learning_rate"] == search["chosen"] else "")
        for one in search["tried"]
    ]
    return search["method"], "; ".join(tried)
