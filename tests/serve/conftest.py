"""One small base and its adapters for all tests of serving."""

import pytest

from qlora_jax.config import QuantSection
from qlora_jax.serve.adapters.reading import Limits
from tests.cli.tiny import make_model
from tests.families.conftest import checkpoint as family  # noqa: F401
from tests.serve.parts import ADAPTERS, alone, loaded_base, make_engine, write_random_adapter


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("served") / "base")


@pytest.fixture(scope="session")
def adapters(base, tmp_path_factory):
    """A folder of ADAPTERS."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, lora) in enumerate(ADAPTERS.items(), start=1):
        write_random_adapter(folder / name, base, seed, **lora)
    return folder


@pytest.fixture
def limits(base):
    """What an adapter of this base must keep to."""
    loaded = loaded_base(base)
    return Limits(
        config=loaded.model.config,
        rank=12,
        nbytes=10**6,
        dtype="float32",
        base_hash=loaded.content_hash,
        quantization=QuantSection(),
    )


@pytest.fixture(scope="session")
def alone_answers(base, adapters):
    """`alone_answers(name, prompt, new)`: greedy tokens of one adapter by itself, through Generator."""
    generators = {}

    def get(name, prompt, new=8, **options):
        if name not in generators:
            generators[name] = alone(base, None if name is None else adapters / name)
        return generators[name].generate([prompt], max_new_tokens=new, **options)[0]

    return get


@pytest.fixture(scope="module")
def engine(base, adapters):
    """A started engine with fewer places on the device than there are adapters."""
    engine = make_engine(base, adapters)
    engine.start()
    yield engine
    engine.close()
