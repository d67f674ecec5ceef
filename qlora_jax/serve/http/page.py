"""The playground: one HTML file, which may run its own script and style and nothing else."""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes() -> APIRouter:
    """GET /."""
    router = APIRouter()
    html = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    headers = {**HEADERS, "Content-Security-Policy": policy(html)}

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    def playground() -> HTMLResponse:
        """The page; it holds no data and asks for the key."""
        return HTMLResponse(html, headers=headers)

    return router


def policy(html: str) -> str:
    """The Content-Security-Policy that names the page's script and style by their digests."""
    return (
        f"default-src 'none'; script-src {_digest(html, 'script')}; style-src {_digest(html, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(html: str, tag: str) -> str:
    [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
