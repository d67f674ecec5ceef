import pathlib

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")

from qlora_jax.data import load_tokenizer  # noqa: E402
from qlora_jax.serve.http.service import Service  # noqa: E402
from tests.serve.fake import BASE, MAX_LENGTH, FakeEngine  # noqa: E402
from tests.serve.live import serving  # noqa: E402

DEMO = pathlib.Path(__file__).parents[2] / "demo" / "base"
# Characters of one to four bytes, which the tokenizer mostly splits into single bytes.
SAYINGS = {None: " the base says café", "cook": " stir – and 🍳 fry", "poet": " rose\nis a rose"}


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(str(DEMO))


@pytest.fixture
def engine(tokenizer):
    scripts = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in SAYINGS.items()}
    engine = FakeEngine(scripts)
    yield engine
    engine.close()


@pytest.fixture
def service(engine, tokenizer):
    return Service(engine, tokenizer, base=BASE, max_length=MAX_LENGTH, vocabulary=2048)


@pytest.fixture
def url(service):
    with serving(service) as url:
        yield url
