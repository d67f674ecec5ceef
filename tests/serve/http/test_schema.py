"""Requests made from the server's own OpenAPI schema, good and bad: no defect, and answers as the schema says."""

import pytest

from qlora_jax.data import load_tokenizer
from qlora_jax.serve.http.app import make_app
from qlora_jax.serve.http.guard import Access
from qlora_jax.serve.http.service import Service
from tests.serve.http.conftest import DEMO
from tests.serve.http.fake import BASE, MAX_LENGTH, FakeEngine

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis.errors import Unsatisfiable  # noqa: E402
from schemathesis import checks  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402

KEY = "root"
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
OPERATIONS = [
    ("get", "/health"),
    ("get", "/metrics"),
    ("get", "/status"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{name}"),
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("post", "/v1/load_lora_adapter"),
    ("post", "/v1/unload_lora_adapter"),
]


@pytest.fixture(scope="module")
def schema():
    engine = FakeEngine({None: [5, 6], "cook": [7]}, queue=1000)
    service = Service(engine, load_tokenizer(str(DEMO)), base=BASE, max_length=MAX_LENGTH, vocabulary=2048)
    yield schemathesis.openapi.from_asgi("/openapi.json", make_app(service, Access(admin_key=KEY)))
    engine.close()


def test_every_endpoint_is_in_the_schema(schema):
    found = [result.ok() for result in schema.get_all_operations()]
    assert sorted((operation.method, operation.path) for operation in found) == OPERATIONS


def make_servable(body):
    """What the schema cannot say: a name that is served, and messages that hold something."""
    body["model"] = BASE
    for message in body.get("messages", []):
        if message.get("content") is None:
            message["content"] = "x"


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("method, path", OPERATIONS)
def test_every_endpoint(schema, method, path, mode):
    statuses = set()

    @settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def send(case):
        if mode is GenerationMode.POSITIVE and "completions" in path:
            make_servable(case.body)
        statuses.add(case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, checks=CHECKS).status_code)

    try:
        send()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE and method == "get"  # nothing that could be wrong
        return
    assert statuses
    if mode is GenerationMode.NEGATIVE and method == "post":
        assert 400 in statuses
    if mode is GenerationMode.POSITIVE and "completions" in path:
        assert 200 in statuses
