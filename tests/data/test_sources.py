import datasets
import pytest

from qlora_jax.data import Row, load_rows


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
    write(tmp_path / "heldout.jsonl", '{"text": "e"}')
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
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": \n',
            "a.jsonl, row 2: not valid JSON at column 10: Expecting value",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n["b"]',
            "a.jsonl, row 2: expected a JSON object of columns, found list ['b']",
        ),
        (
            "a.json",
            '{"text": "a"}\n{"text": "b"}\n',
            "a.json: not valid JSON at line 2, column 1: Extra data; a file of one object per line is named .jsonl",
        ),
        ("a.json", '[{"text": "a"}, 3]', "a.json, row 2: expected a JSON object of columns, found int 3"),
        (
            "a.json",
            '{"text": "a"}',
            'a.json: expected a list of objects or {"data": [...]}; a file of one object per line is named .jsonl',
        ),
        ("a.csv", "text\na\n", "PATH: unknown file type '.csv'; expected one of .jsonl, .json, .parquet"),
        ("a.jsonl", "\n", "PATH holds no rows (split 'train'); training and evaluation need at least one"),
    ],
)
def test_unreadable_files(tmp_path, name, content, expected):
    file = write(tmp_path / name, content)
    with pytest.raises(ValueError) as error:
        load_rows(str(file))
    assert str(error.value) == expected.replace("PATH", str(file))


def test_a_file_that_is_not_utf8(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        load_rows(str(file))
    assert str(error.value) == "a.jsonl: not UTF-8 text at byte 10; save the file as UTF-8"


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
        f"{tmp_path}: no files of split 'test'; looked for test.jsonl, test.json, test.parquet and "
        "test-*.parquet, there and in data/; found train.jsonl"
    )


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
    with pytest.raises(ValueError) as error:
        load_rows("org/name", "tset")
    assert str(error.value) == (
        "Hub dataset 'org/name', split 'tset': Unknown split 'tset'. Should be one of ['train', 'test']."
    )
