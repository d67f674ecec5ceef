"""Which stored comparison a compare.json becomes, and how its table is made."""

import pytest

from benchmarks.quality_pages import FILES, kind_of, stored, table


def comparison(base: str, mode: str) -> dict:
    return {"mode": mode, "config": {"model": {"path": base}}, "rows": []}


@pytest.mark.parametrize(
    ("base", "mode", "kind"),
    [
        ("demo/base", "default", "default"),
        ("demo/base", "ablations", "ablations"),
        ("runs/large_base/base", "default", "large"),
        ("runs/large_base/base", "quick", "large"),
    ],
)
def test_a_comparison_has_its_place(base, mode, kind):
    assert kind_of(comparison(base, mode)) == kind
    assert kind in FILES


@pytest.mark.parametrize(("base", "mode"), [("demo/base", "quick"), ("somebody/else", "default")])
def test_others_are_refused(base, mode):
    with pytest.raises(ValueError, match=f"a {mode} comparison of {base}: expected"):
        kind_of(comparison(base, mode))


def test_another_file_is_refused():
    with pytest.raises(ValueError, match=r"no compare\.json"):
        kind_of({"mode": "default"})


def test_a_column_can_be_left_out():
    whole, less = (table(stored()["default"], without).splitlines() for without in ((), ("tokens/s",)))
    assert [line.count("|") for line in whole] == [9] * 6
    assert [line.count("|") for line in less] == [8] * 6
    assert "tokens/s" in whole[0] and "tokens/s" not in less[0] and less[0].endswith("gain kept |")
