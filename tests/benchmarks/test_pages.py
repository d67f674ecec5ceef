"""benchmarks/pages.py: a marked part of a page."""

import pytest

from benchmarks.pages import fill_part, read_part


def test_a_part_is_filled_again_and_again(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one: begin -->\nold\n<!-- one: end -->\nafter\n")
    for text in ("a\\1\n", "b\nc\n"):
        fill_part(page, "one", text)
        assert read_part(page, "one") == text
        assert page.read_text() == f"before\n<!-- one: begin -->\n{text}<!-- one: end -->\nafter\n"


def test_a_page_without_the_part(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n")
    with pytest.raises(ValueError, match=r"page.md has no part '<!-- one: begin -->'"):
        fill_part(page, "one", "a\n")
    assert page.read_text() == "text\n"
