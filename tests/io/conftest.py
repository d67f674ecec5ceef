import shutil

import pytest

from tests.families.conftest import checkpoint as family  # noqa: F401
from tests.io.adapters import written_by_peft


@pytest.fixture(scope="session")
def base(checkpoint, tmp_path_factory):
    """A folder with a bfloat16 Llama of three layers and a few of a tokenizer's files."""
    folder = shutil.copytree(checkpoint(dtype="bfloat16"), tmp_path_factory.mktemp("models") / "base")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE.txt").write_text("licence")
    (folder / "notes.txt").write_text("not part of a model")
    return folder


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """An adapter of PEFT's on q_proj, to be damaged in copies."""
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    written_by_peft(base, folder, target_modules=["q_proj"])
    return folder
