"""docs/architecture.md says where things are added, and the code keeps to the shape that makes these lists short."""

import re
from pathlib import Path

import pytest

from benchmarks import house

ROOT = Path(__file__).parents[1]
FILES = house.sources(ROOT)
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_files_that_an_addition_changes_exist():
    rows = PAGE.partition("## Where do I add")[2].partition("\n## ")[0]
    listed = re.findall(r"(?<!\*)`([a-z_]+/[a-z_/]*\.py)`", rows)
    assert len(listed) > 12
    assert [file for file in listed if not (ROOT / "qlora_jax" / file).exists()] == []


def test_additions_touch_few_files():
    counts = {what: len(files) for what, files in house.additions(ROOT).items()}
    most = {"a model family": 2, "a stored format": 4, "a kernel": 3, "an adapter kind": 3, "an objective": 3}
    for name, limit in most.items():
        [count] = [count for what, count in counts.items() if what.startswith(name)]
        assert count <= limit, name


def test_every_folder_has_a_row():
    folders = {file.split("/")[0] for file in FILES if "/" in file}
    assert folders == set(re.findall(r"^\| \d+ \| `(\w+)/` \|", PAGE, re.MULTILINE))


@pytest.mark.parametrize("pattern", house.WORDS.values(), ids=house.WORDS)
def test_what_stands_once_stands_once(pattern):
    assert len(house.naming(FILES, pattern)) == (2 if "mlp_chunk" in pattern else 1)


def test_the_shape_of_the_code():
    assert house.ladders(FILES) == []
    assert house.long_signatures(FILES) == []
    assert house.circles(FILES) == []
    assert [name for name, text in FILES.items() if len(text.splitlines()) > house.MOST_LINES] == []


def test_the_measures_see_what_they_look_for(tmp_path):
    package = tmp_path / "qlora_jax" / "io"
    package.mkdir(parents=True)
    (package / "a.py").write_text("from qlora_jax.io.b import f\n\ndef g(a, b, c, d, e, *f, h, **i):\n    pass\n")
    (package / "b.py").write_text("from qlora_jax.io import a\n\nknown = isinstance(x, NF4Tensor | str)\n")
    files = house.sources(tmp_path)
    assert house.long_signatures(files) == ["io/a.py:g (8)"]
    assert house.ladders(files) == ["io/b.py:3"]
    assert house.circles(files) == ["io/a.py", "io/b.py"]
