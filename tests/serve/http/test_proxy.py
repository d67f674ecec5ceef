"""Behind a real nginx, with the settings of docs/serving.md."""

import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.serve.http.fake import BASE
from tests.serve.http.live import serving

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
NAME = "llm.example.com"
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


def settings(folder, port, url, location):
    places = "".join(
        f"{kind}_temp_path {folder}/{kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""
daemon off; pid {folder}/pid; error_log {folder}/errors;
events {{}}
http {{ access_log off; {places}
  server {{ listen 127.0.0.1:{port}; server_name {NAME}; {location.replace("http://127.0.0.1:8000", url)} }} }}
"""


def of_the_page():
    """The location that the page shows."""
    [shown] = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return shown


@pytest.fixture(params=["as documented", "with nginx' own defaults"])
def proxied(request, service, tmp_path):
    """A client of the proxy."""
    with socket.socket() as free, serving(service, public=(NAME,)) as url:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        location = (
            of_the_page() if request.param == "as documented" else "location / { proxy_pass http://127.0.0.1:8000; }"
        )
        (tmp_path / "conf").write_text(settings(tmp_path, port, url, location))
        free.close()
        nginx = subprocess.Popen([NGINX, "-p", tmp_path, "-e", tmp_path / "errors", "-c", tmp_path / "conf"])
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Host": NAME}, timeout=30) as client:
                for _ in range(1000):
                    try:
                        client.get("/health")
                        break
                    except httpx.ConnectError:
                        assert nginx.poll() is None, (tmp_path / "errors").read_text()
                        time.sleep(0.02)
                yield client
        finally:
            nginx.terminate()
            nginx.wait(30)


def test_page_and_clients_work(proxied):
    assert proxied.get("/").status_code == 200
    page = {"Origin": f"https://{NAME}"}
    assert proxied.get("/v1/models", headers=page).status_code == 200
    body = {"model": "poet", "prompt": "Hi"}
    assert proxied.post("/v1/completions", json=body, headers=page).json()["choices"][0]["text"] == " rose\nis a rose"
    assert proxied.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403


def test_streams_are_passed_on_as_they_come(proxied, engine):
    """The engine is stopped after the first event: the client has it all the same."""
    engine.pace = 0.02
    with proxied.stream("POST", "/v1/completions", json={"model": "poet", "prompt": "x", "stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        engine.gate.clear()
        time.sleep(0.1)
        said = engine.tickets[0].said
        engine.gate.set()
        rest = [line for line in lines if line]
    assert said < len(engine.scripts["poet"])
    assert rest[-1] == "data: [DONE]"


def test_refusals_keep_their_status(proxied):
    for body, status in (
        ({"model": "poisoned", "prompt": "x", "stream": True}, 400),
        ({"model": "no", "prompt": "x"}, 404),
    ):
        assert proxied.post("/v1/completions", json=body).status_code == status
    assert proxied.post("/v1/completions/", json={"model": BASE, "prompt": "x"}).status_code == 404
