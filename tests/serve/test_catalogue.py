"""Names are looked up among those that a folder lists, and never become paths."""

import os
import unicodedata

import pytest

from qlora_jax.serve.adapters.catalogue import Catalogue, is_name

FILES = ("adapter_config.json", "adapter_model.safetensors")


def make(folder):
    folder.mkdir(parents=True)
    for file in FILES:
        (folder / file).write_text("{}")
    return folder


@pytest.fixture
def root(tmp_path):
    for name in ("one", "two-2.b_C@x+y"):
        make(tmp_path / "adapters" / name)
    make(tmp_path / "outside")
    return tmp_path / "adapters"


@pytest.mark.parametrize("name", ["a", "0", "one", "two-2.b_C@x+y", "a" * 128])
def test_plain_names(name):
    assert is_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../one", "one/../one", "/one", "/etc/passwd", "one/", "a/b", "a\\b", "C:\\x", "~", "~root"),
        *(
            "one\0",
            "\0",
            "one\n",
            "one ",
            " one",
            "-one",
            ".hidden",
            "_one",
            "a" * 129,
            "a" * 100_000,
            "%2e%2e",
            "$HOME",
        ),
        *("ｏｎｅ", "оne", "one\u200b", "one\u202e", "é", "e\u0301", unicodedata.normalize("NFD", "ö"), "ﬁne", "①"),
    ],
    ids=ascii,
)
def test_what_is_no_name(root, name):
    assert not is_name(name)
    assert Catalogue(root).find(name) is None


def test_the_subfolders_with_an_adapter_are_listed(root):
    (root / "empty").mkdir()
    (root / "a-file").write_text("")
    make(root / "ｏｎｅ")
    catalogue = Catalogue(root)
    assert catalogue.names() == ["one", "two-2.b_C@x+y"]
    assert catalogue.find("one") == root / "one"
    assert [catalogue.find(name) for name in ("empty", "a-file", "outside", "adapters", "ONE")] == [None] * 5


def test_what_comes_and_goes_is_seen(root):
    catalogue = Catalogue(root)
    assert catalogue.find("new") is None
    (root / "new").mkdir()
    assert catalogue.find("new") is None
    for file in FILES:
        (root / "new" / file).write_text("{}")
    assert catalogue.find("new") == root / "new"
    (root / "new" / FILES[0]).unlink()
    assert catalogue.find("new") is None


def test_links_that_leave_the_folder_are_not_listed(root):
    (root / "away").symlink_to(root.parent / "outside")
    (root / "above").symlink_to(root.parent)
    (root / "itself").symlink_to(root)
    (root / "loop").symlink_to("loop")
    (root / "alias").symlink_to(root / "one")
    for file in (*FILES, "qlora_jax.json"):
        other = make(root / f"linked-{file}")
        (other / file).unlink(missing_ok=True)
        (root.parent / "outside" / file).touch()
        (other / file).symlink_to(root.parent / "outside" / file)
    assert Catalogue(root).names() == ["alias", "one", "two-2.b_C@x+y"]


def test_a_link_that_is_put_there_later_is_not_followed(root):
    catalogue = Catalogue(root)
    assert catalogue.find("one")
    os.replace(root / "one" / FILES[1], root.parent / "moved")
    (root / "one" / FILES[1]).symlink_to(root.parent / "moved")
    assert catalogue.find("one") is None


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Catalogue(tmp_path / "nowhere")
