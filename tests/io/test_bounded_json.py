"""JSON from outside is refused by its size, its depth and its numbers of parts before anything is built of it."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.io.bounded_json import Bounds, check_structure, read_object

SMALL = Bounds(depth=3, containers=5, names=4, values=6)
TREES = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(alphabet='a"\\,:[]{}\n\u2028é', max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text('b",\\{', max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


def counts(tree) -> tuple[int, int, int, int]:
    """(depth, containers, names, members beyond the first of each container) of a tree."""
    if not isinstance(tree, list | dict):
        return 0, 0, 0, 0
    members = list(tree.values()) if isinstance(tree, dict) else tree
    below = [counts(member) for member in members]
    depth = 1 + max((count[0] for count in below), default=0)
    containers, names, values = (sum(count[i] for count in below) for i in (1, 2, 3))
    return (
        depth,
        containers + 1,
        names + (len(tree) if isinstance(tree, dict) else 0),
        values + max(0, len(members) - 1),
    )


@given(tree=TREES, ascii=st.booleans(), indent=st.sampled_from([None, 1]))
def test_exactly_what_is_within_the_bounds_is_taken(tree, ascii, indent):
    text = json.dumps(tree, ensure_ascii=ascii, indent=indent).encode()
    within = all(n <= most for n, most in zip(counts(tree), (3, 5, 4, 6), strict=True))
    if within:
        check_structure(text, SMALL)
    else:
        with pytest.raises(ValueError, match="at most [3456]"):
            check_structure(text, SMALL)


@pytest.mark.parametrize(
    "text",
    [
        b'"' + b'\\"' * 2_000_000,
        b'"\\' * 1_000_000,
        b"\\" * 2_000_000,
        b'"' * 2_000_001,
        b'"a' * 1_000_001,
        b"]" * 2_000_000,
    ],
    ids=["no end", "escapes", "backslashes", "quotes", "halves", "brackets"],
)
def test_no_text_takes_more_than_one_pass(text):
    """Each would take hours in quadratic time."""
    check_structure(text, Bounds(containers=1 << 30))


BAD = {
    "empty": (b"", "is no JSON"),
    "a list": (b"[]", "holds a list, no JSON object"),
    "a number": (b"5", "holds a int"),
    "deep": (b'{"a":' * 65 + b"1" + b"}" * 65, "nested 65 deep, at most 64"),
    "very deep": (b"[" * 100_000, "100,000 lists and objects"),
    "many names": (json.dumps(dict.fromkeys(map(str, range(50_001)))).encode(), "50,001 names"),
    "NaN": (b'{"a": NaN}', "NaN is no finite number"),
    "infinite": (b'{"a": 1e999}', "1e999 is no finite number"),
    "many digits": (b'{"a": ' + b"9" * 100_000 + b"}", "4300 digits"),
    "UTF-16": (json.dumps({"a": 1}).encode("utf-16"), "zero bytes"),
    "no UTF-8": (b'{"a": "\xff"}', "is no JSON"),
    "large": (b" " * (1 << 20) + b"{}", "has 1,048,578 bytes, at most 1,048,576"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_named(tmp_path, what):
    text, words = BAD[what]
    file = tmp_path / "settings.json"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=f"settings.json .*{words}"):
        read_object(file)


def test_good_files_are_read(tmp_path):
    file = tmp_path / "settings.json"
    for text in (b'{"a": [1, 2.5, null]}', b'\xef\xbb\xbf{"a": [1, 2.5, null]}'):
        file.write_bytes(text)
        assert read_object(file) == {"a": [1, 2.5, None]}


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(ValueError, match="is no file"):
            read_object(tmp_path / name)
