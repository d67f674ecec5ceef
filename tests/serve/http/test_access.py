"""Who may ask, from where; what only the admin may do."""

import httpx
import pytest

from tests.serve.http.fake import BASE
from tests.serve.http.live import serving

ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


@pytest.fixture
def locked(service):
    with serving(service, api_key="sesame", admin_key="root") as url, httpx.Client(base_url=url) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_the_key_opens_all_but_health_and_the_page(locked):
    assert [locked.get(path).status_code for path in ("/health", "/")] == [200, 200]
    paths = ("/v1/models", "/metrics", "/status", "/openapi.json", "/v1/models/cook", "/nothing")
    assert {locked.get(path).status_code for path in paths} == {401}
    found = [locked.get(path, headers=bearer("sesame")).status_code for path in paths]
    assert found == [200, 200, 200, 200, 200, 404]


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer sesam", "Bearer sesame2", "sesame", "Basic sesame", "Bearer ü"]
)
def test_a_wrong_key(locked, given):
    body = {"model": BASE, "prompt": "a"}
    response = locked.post("/v1/completions", json=body, headers={"Authorization": given.encode("latin-1")})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert "sesame" not in response.text


def test_the_page_holds_no_data(locked, client):
    assert locked.get("/").text == client.get("/").text
    assert not any(name in locked.get("/").text for name in ("cook", BASE))
    assert locked.get("/").headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")


@pytest.mark.parametrize("path", ADMIN)
def test_admin_endpoints_are_off_without_an_admin_key(client, service, path):
    response = client.post(path, json={"lora_name": "new"})
    assert response.status_code == 404
    assert "--admin-key" in response.json()["error"]["message"]
    assert path not in client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("path", ADMIN)
@pytest.mark.parametrize("key", ["x", "sesame", "roots"])
def test_the_admin_has_a_key_of_its_own(locked, path, key):
    assert locked.post(path, json={"lora_name": "new"}, headers=bearer(key)).status_code == 401


def test_the_admin_key_opens_nothing_else(locked):
    assert locked.get("/v1/models", headers=bearer("root")).status_code == 401


def test_loading_and_unloading(locked):
    def change(path: str, **fields):
        return locked.post(path, json=fields, headers=bearer("root"))

    def names():
        return [model["id"] for model in locked.get("/v1/models", headers=bearer("sesame")).json()["data"]]

    load, unload = ADMIN
    assert change(load, lora_name="new").json() == {"object": "adapter", "id": "new", "status": "loaded"}
    assert change(load, lora_name="alias", lora_path="new").status_code == 200
    assert names() == [BASE, "cook", "poet", "new", "alias"]
    assert change(unload, lora_name="new").json()["status"] == "unloaded"
    response = change(unload, lora_name="new")
    assert (response.status_code, response.json()["error"]["param"]) == (404, "lora_name")
    response = change(load, lora_name="absent")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "lora_name")
    assert change(load).json()["error"]["param"] == "lora_name"
    assert names() == [BASE, "cook", "poet", "alias"]


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost:80", 200),
        ("127.0.0.1:5", 200),
        ("[::1]:9", 200),
        ("LOCALHOST", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("[", 403),
        ("user@evil.example", 403),
    ],
)
def test_a_page_cannot_reach_the_loopback_address_by_another_name(client, host, status):
    assert client.get("/health", headers={"Host": host}).status_code == status


def test_pages_of_other_origins_are_refused(client):
    for origin in ("http://evil.example", "null", "http://localhost:1"):
        assert client.get("/v1/models", headers={"Origin": origin}).status_code == 403
    own = str(client.base_url).rstrip("/")
    response = client.get("/v1/models", headers={"Origin": own})
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_models_have_their_parent(client):
    models = client.get("/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in models] == [(BASE, None), ("cook", BASE), ("poet", BASE)]
    assert client.get("/v1/models/cook").json() == models[1]
    assert client.get("/v1/models/demo-base").json()["object"] == "model"


def test_metrics(client):
    client.post("/v1/completions", json={"model": "poet", "prompt": "a"})
    client.post("/v1/completions", json={"model": "nope", "prompt": "a"})
    client.get("/secret-path")
    lines = client.get("/metrics").text.splitlines()
    assert 'qlora_jax_answers_total{path="/v1/completions",status="200"} 1.0' in lines
    assert 'qlora_jax_answers_total{path="/v1/completions",status="404"} 1.0' in lines
    assert 'qlora_jax_answers_total{path="other",status="404"} 1.0' in lines
    assert 'qlora_jax_tokens_total{kind="generated"} 7.0' in lines
    assert 'qlora_jax_slots{state="free"} 4.0' in lines
    assert 'qlora_jax_adapters{where="device"} 2.0' in lines
    assert "qlora_jax_first_token_seconds_count 1.0" in lines


PUBLIC = ("llm.example.com", "other.example:8443")


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "llm.example.com"}, 200),
        ({"Host": "LLM.example.com:444"}, 200),
        ({"Host": "other.example:8443"}, 200),
        ({"Host": "other.example"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "llm.example.com.evil.example"}, 403),
        ({"Origin": "https://llm.example.com"}, 200),
        ({"Origin": "https://llm.example.com", "Host": "llm.example.com"}, 200),
        ({"Origin": "https://other.example:8443"}, 200),
        ({"Origin": "https://other.example"}, 403),
        ({"Origin": "https://evil.example", "Host": "llm.example.com"}, 403),
        ({"Origin": "https://llm.example.com.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"X-Forwarded-Host": "llm.example.com", "X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.1"}, 200),
        ({"X-Forwarded-Host": "llm.example.com, 127.0.0.1"}, 200),
        ({"X-Forwarded-Host": "evil.example"}, 403),
        ({"Host": "evil.example", "X-Forwarded-Host": "llm.example.com"}, 403),
    ],
    ids=str,
)
def test_a_proxy_is_called_by_its_public_name(service, headers, status):
    with serving(service, public=PUBLIC) as url:
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status


def test_no_header_makes_a_name_public(client):
    for name in ("Host", "X-Forwarded-Host", "Forwarded", "X-Forwarded-Server"):
        found = client.get("/v1/models", headers={name: "llm.example.com", "Origin": "https://llm.example.com"})
        assert found.status_code == 403
        assert "--public-host" in found.json()["error"]["message"]


@pytest.mark.parametrize("path", ["acme/base", "acme%2Fbase", "a/b/c", "a%2Fb%2Fc"])
def test_a_model_whose_name_has_slashes(client, engine, path):
    engine.scripts |= {"acme/base": [5], "a/b/c": [5]}
    response = client.get(f"/v1/models/{path}")
    assert response.status_code == 200
    assert response.json()["id"] == path.replace("%2F", "/")


def test_a_path_is_served_as_it_is(client):
    """A redirect would lead past a proxy."""
    for path in ("/v1/models/", "/v1/nothing/", "/status/"):
        assert client.get(path, follow_redirects=False).status_code == 404
