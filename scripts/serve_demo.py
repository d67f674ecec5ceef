"""One base and its adapters, served: the same question to each of them, then the server is yours until Ctrl-C.

    python scripts/serve_demo.py --model demo/base --adapters runs/serve-demo/adapters [--once]

`make serve-demo` trains the adapters first.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

SERVE = Path(__file__).with_name("serve.py")
# Each task of the demo can be asked about this line.
PROMPT = "Question: value = [12, 7]\nAnswer:"


def main() -> int:
    """Prints a table of answers, and waits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--adapters", required=True, metavar="DIR")
    parser.add_argument("--port", default="8000", help="default: %(default)s; 0 takes a free one")
    parser.add_argument("--prompt", default=PROMPT, help="what every model is asked")
    parser.add_argument("--once", action="store_true", help="end after the answers")
    options = parser.parse_args()
    flags = ["--quant", "nf4", "--dtype", "fp32", "--slots", "4", "--max-loras", "4", "--max-rank", "16"]
    command = [sys.executable, str(SERVE), "--model", options.model, "--adapters", options.adapters]
    command += [*flags, "--max-length", "256", "--port", options.port]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            return talk(server, options.prompt, once=options.once)
        except KeyboardInterrupt:
            server.send_signal(signal.SIGINT)  # a second one, where the terminal sent it the first: it ends at once
            return server.wait()


def talk(server: subprocess.Popen[str], prompt: str, *, once: bool) -> int:
    """Asks, then passes the server's messages on until it ends; its exit code."""
    url = address(server)
    if url is None:
        return server.wait()
    print(f"\nEvery model is asked: {prompt!r}\n")
    for model in ask(f"{url}/v1/models")["data"]:
        fields = {"model": model["id"], "prompt": prompt, "max_tokens": 8, "temperature": 0, "stop": "\n"}
        print(f"  {model['id']:<12} {ask(f'{url}/v1/completions', fields)['choices'][0]['text']!r}")
    print(f"\nOne base in memory, {url} to try them, Ctrl-C to end.", flush=True)
    if once:
        server.terminate()
    pass_on(server)
    return server.wait()


def address(server: subprocess.Popen[str]) -> str | None:
    """Where the server listens; None if it ended before. Its messages are passed on."""
    assert server.stderr
    for line in server.stderr:
        print(line, end="", file=sys.stderr)
        if found := re.search(r"on (http://\S+)", line):
            return found[1]
    return None


def pass_on(server: subprocess.Popen[str]) -> None:
    assert server.stderr
    for line in server.stderr:
        print(line, end="", file=sys.stderr)


def ask(url: str, fields: dict | None = None) -> dict:
    """The JSON that is there; with fields the answer to them."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("QLORA_JAX_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if fields is None else json.dumps(fields).encode()
    # Straight to this machine, whatever proxy the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data, headers)) as response:
        return json.load(response)


if __name__ == "__main__":
    raise SystemExit(main())
