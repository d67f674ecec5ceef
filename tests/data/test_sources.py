import bz2
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pytest

from qlora_jax.data import Row, load_rows
from qlora_jax.data.sources import open_source
from qlora_jax.data.sources.files import split_of


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def texts(source, split="train"):
    return [row.values["text"] for row in load_rows(str(source), split)]


def test_jsonl_rows_count_lines(tmp_path):
    file = write(tmp_path / "train.jsonl", '\ufeff{"text": "a"}\r\n\n{"text": "b\u2028c"}\n')
    assert load_rows(str(file)) == [
        Row(values={"text": "a"}, origin="train.jsonl, row 1"),
        Row(values={"text": "b\u2028c"}, origin="train.jsonl, row 3"),
    ]


@pytest.mark.parametrize("content", ['[{"text": "a"}, {"text": "b"}]', '{"data": [{"text": "a"}, {"text": "b"}]}'])
def test_json(tmp_path, content):
    assert load_rows(str(write(tmp_path / "rows.json", content)))[1] == Row(
        values={"text": "b"}, origin="rows.json, row 2"
    )


def test_parquet(tmp_path):
    file = tmp_path / "train.parquet"
    datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).to_parquet(file)
    assert load_rows(str(file)) == [
        Row(values={"text": "a"}, origin="train.parquet, row 1"),
        Row(values={"text": "b"}, origin="train.parquet, row 2"),
    ]


def test_a_folder_gives_the_files_of_the_split(tmp_path):
    write(tmp_path / "train.jsonl", '{"text": "a"}')
    write(tmp_path / "train_more.json", '[{"text": "b"}]')
    write(tmp_path / "data" / "test-00000-of-00002.jsonl", '{"text": "c"}')
    write(tmp_path / "data" / "test-00001-of-00002.jsonl", '{"text": "d"}')
    write(tmp_path / "notes.jsonl", '{"text": "e"}')
    write(tmp_path / "dataset_info.json", "{}")
    assert texts(tmp_path) == ["a", "b"]
    assert texts(tmp_path, "test") == ["c", "d"]


def test_a_folder_of_files_that_name_no_split_is_training_data(tmp_path):
    for name, text in (("0001", "b"), ("0000", "a")):
        datasets.Dataset.from_list([{"text": text}]).to_parquet(tmp_path / f"{name}.parquet")
    write(tmp_path / "dataset_info.json", "{}")
    assert texts(tmp_path) == ["a", "b"]


def test_folders_of_save_to_disk(tmp_path):
    rows = datasets.Dataset.from_list([{"text": "a"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "several")
    assert load_rows(str(tmp_path / "one")) == [Row(values={"text": "a"}, origin="one, row 1")]
    assert texts(tmp_path / "several") == ["a"]
    with pytest.raises(ValueError) as error:
        load_rows(str(tmp_path / "several"), "test")
    assert str(error.value) == f"{tmp_path / 'several'}: no split 'test'; it has train"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"text": ', "not valid JSON at column 10: Expecting value"),
        (b'["b"]', "expected a JSON object of columns, found list ['b']"),
        ('{"text": "é"}'.encode("latin-1"), "not UTF-8 text at byte 10; save the file as UTF-8"),
        (b"[" * 100_000, "not valid JSON: nested too deeply"),
    ],
)
def test_a_line_that_is_no_row_is_a_row_with_a_problem(tmp_path, content, problem):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n' + content + b'\n{"text": "b"}\n')
    rows = load_rows(str(file))
    assert [(row.values, row.problem) for row in rows] == [({"text": "a"}, ""), ({}, problem), ({"text": "b"}, "")]
    assert rows[1].origin == "a.jsonl, row 2"


def test_a_json_file_of_one_object_per_line(tmp_path):
    assert texts(write(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n')) == ["a", "b"]
    assert texts(write(tmp_path / "b.json", '{"text": "a"}')) == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", "[1, 2", "a.json: not valid JSON at line 1, column 6: Expecting ',' delimiter"),
        ("a.csv", "text\na\n", "PATH: unknown file type '.csv'; expected one of .jsonl, .ndjson, .json, .parquet"),
        ("a.jsonl", "\n", "PATH holds no rows (split 'train'); training and evaluation need at least one"),
        ("a.parquet", "no parquet", "PATH: cannot be read as Parquet: Parquet magic bytes not found in footer."),
        ("a.jsonl.gz", "no gzip", "PATH: cannot be read: Not a gzipped file (b'no')"),
    ],
)
def test_unreadable_files(tmp_path, name, content, expected):
    file = write(tmp_path / name, content)
    with pytest.raises(ValueError) as error:
        load_rows(str(file))
    assert str(error.value).startswith(expected.replace("PATH", str(file)))


def test_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("data/train.jsonl", "train.jsonl", "./data/train", "data", "a/b/c"):
        with pytest.raises(FileNotFoundError) as error:
            load_rows(source)
        assert str(error.value) == (
            f"no file or folder {source!r} (looked for {(tmp_path / source).absolute()}); data is a .jsonl, "
            ".json or "
            '.parquet file, a folder of them, or a Hub dataset named "org/name"'
        )


def test_a_folder_without_the_split(tmp_path):
    write(tmp_path / "train.jsonl", '{"text": "a"}')
    with pytest.raises(FileNotFoundError) as error:
        load_rows(str(tmp_path), "test")
    assert str(error.value) == (
        f"{tmp_path}: no files of split 'test'; a file's name or its folder's says the split (train, validation or "
        "test), and for training those count that say none; found train.jsonl (train)"
    )


CONTENT = b'{"text": "a"}\n{"text": "b"}\n'


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("rows.JSONL", lambda content: content),
        ("rows.ndjson", lambda content: content),
        ("rows.jsonl.gz", gzip.compress),
        ("rows.json.BZ2", bz2.compress),
        ("rows.jsonl.zst", lambda content: pyarrow.compress(content, "zstd", asbytes=True)),
    ],
)
def test_suffixes_of_any_case_and_compressions(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(CONTENT))
    assert texts(tmp_path / name) == ["a", "b"]
    assert texts(tmp_path) == ["a", "b"]


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train.jsonl", "train"),
        ("my-test.jsonl", "test"),
        ("heldout.parquet", "test"),
        ("Validation_1.json", "validation"),
        ("dev/rows.jsonl", "validation"),
        ("train/part-0.jsonl", "train"),
        ("test/train-like.jsonl", "train"),
        ("contest.jsonl", None),
        ("data/rows.jsonl", None),
    ],
)
def test_a_name_tells_the_split(file, split):
    assert split_of(Path(file)) == split


def test_what_lies_beside_is_named_and_not_read(tmp_path):
    for name in ("rows.jsonl", "deep/more.jsonl", "my-test.jsonl", "val/rows.jsonl", "README.md", ".hidden.jsonl"):
        write(tmp_path / name, json.dumps({"text": name}))
    source = open_source(str(tmp_path))
    assert [row.origin for row in source.rows()] == ["deep/more.jsonl, row 1", "rows.jsonl, row 1"]
    assert source.words() == (
        f"{tmp_path}, train split: deep/more.jsonl (1 rows), rows.jsonl (1 rows); "
        "beside it and not read: README.md (no data file), "
        "my-test.jsonl (test), val/rows.jsonl (validation)"
    )
    assert texts(tmp_path, "validation") == ["val/rows.jsonl"]
    assert texts(tmp_path, "eval") == ["val/rows.jsonl"]


def test_patterns_choose_the_split_too(tmp_path):
    for name in ("a/train.jsonl", "b/train.jsonl", "b/test.jsonl"):
        write(tmp_path / name, json.dumps({"text": name}))
    assert texts(tmp_path / "*" / "*.jsonl") == ["a/train.jsonl", "b/train.jsonl"]
    assert texts(tmp_path / "**" / "*.jsonl", "test") == ["b/test.jsonl"]
    with pytest.raises(FileNotFoundError, match="no files of split 'validation'"):
        load_rows(str(tmp_path / "*" / "*.jsonl"), "validation")


def test_nulls_that_arrow_adds_are_gone_at_every_level(tmp_path):
    rows = [{"a": {"x": [{"y": 1}]}}, {"a": {"x": [{"z": None, "w": {"u": None}}], "v": 2}}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert [row.values for row in load_rows(str(tmp_path / "rows.parquet"))] == [
        {"a": {"x": [{"y": 1}]}},
        {"a": {"x": [{"w": {}}], "v": 2}},
    ]


def test_identity_is_the_content(tmp_path):
    first, second = write(tmp_path / "a.jsonl", '{"text": "a"}'), write(tmp_path / "b" / "a.jsonl", '{"text": "a"}')
    assert open_source(str(first)).identity() == open_source(str(second)).identity()
    before = open_source(str(first)).identity()
    write(first, '{"text": "b"}')
    assert open_source(str(first)).identity() != before


def test_hub_names_reach_datasets(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("org/name", "test") == [Row(values={"text": "a"}, origin="org/name, row 1")]
    load_rows("org/name.v2:small")
    assert asked == [("org/name", None, "test"), ("org/name.v2", "small", "train")]


def test_the_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as error:
        load_rows("org/name")
    text = str(error.value)
    assert text.startswith("'org/name' is no file or folder here, and the Hugging Face Hub did not give it (")
    assert text.endswith(
        "); check the name and the connection, or pass a local .jsonl, .json or .parquet file or a folder of them"
    )


def test_an_unknown_split_on_the_hub(monkeypatch):
    def load_dataset(name, config, *, split):
        raise ValueError("Unknown split 'tset'. Should be one of ['train', 'test'].")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "test"])
    with pytest.raises(ValueError) as error:
        load_rows("org/name", "tset")
    assert str(error.value) == (
        "Hub dataset 'org/name', split 'tset': Unknown split 'tset'. Should be one of ['train', 'test']."
    )


def test_a_hub_data_set_may_call_its_validation_otherwise(monkeypatch):
    def load_dataset(name, config, *, split):
        if split != "dev":
            raise ValueError(f"Unknown split {split!r}.")
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "dev"])
    assert open_source("org/name", "validation").words() == "org/name, dev split (1 rows)"
