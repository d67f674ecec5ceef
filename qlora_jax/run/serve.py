"""A server and what belongs to it: keys, how the base is stored, the engine, and HTTP over it."""

import collections
import dataclasses
import importlib.util
import ipaddress
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_jax.config import QuantSection
from qlora_jax.data import limit_vocabulary
from qlora_jax.io.hf import read_config, resolve_folder
from qlora_jax.io.identity import RECORD
from qlora_jax.io.record import read_record, stored_as
from qlora_jax.run.load import open_tokenizer, stop_ids_of
from qlora_jax.serve import EngineOptions
from qlora_jax.serve.loading import engine_of

if TYPE_CHECKING:  # the extra `serve` need not be installed
    from qlora_jax.serve.http.guard import Access
    from qlora_jax.serve.http.service import Service

logger = logging.getLogger("qlora_jax.serve")

POLL = 0.1  # seconds
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def check_extra() -> None:
    """Raises ValueError where the packages of the extra `serve` are missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the server needs {', '.join(missing)}: pip install 'qlora-jax[serve]'")


def key_of(given: str | None, variable: str) -> str | None:
    """The key on the command line, else in the environment, where a list of processes does not show it."""
    key = os.environ.get(variable) or None if given is None else given
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise ValueError(f"{variable}: a key must be printable ASCII without spaces around it")
    return key


def recorded_quantization(adapters: Path | None) -> QuantSection | None:
    """How the bases were stored that the adapters were trained on; the most frequent way, and None where none says.

    The others are refused when they are asked for: they would answer otherwise than they were trained to.
    """
    files = [] if adapters is None else sorted(adapters.glob(f"*/{RECORD}"))
    found = collections.Counter(filter(None, map(_stored, files)))
    if not found:
        return None
    [(most, count)] = found.most_common(1)
    if count < found.total():
        logger.warning(
            f"{found.total() - count} of {found.total()} adapters were trained on a base that is stored otherwise than "
            f"{most}: they are refused; serve them from a folder of their own"
        )
    return most


def _stored(file: Path) -> QuantSection | None:
    """How an adapter's base was stored; None where its record does not say or is faulty, which the engine logs."""
    try:
        record = read_record(file)
        return stored_as(record) if record.get("method") == "qlora" else None
    except (OSError, ValueError):
        return None


def public_host(text: str) -> str:
    """A name, perhaps with a port, as browsers send it. Raises ValueError for anything else, such as an address."""
    if not re.fullmatch(r"([a-z0-9_-]+\.)*[a-z0-9_-]+(:[0-9]{1,5})?|\[[0-9a-f:.]+\](:[0-9]{1,5})?", text.lower()):
        raise ValueError(f"--public-host {text!r}: expected a name such as llm.example.com, without https:// or a path")
    return text.lower()


def is_loopback(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a server listens, and to whom.

    Attributes:
      host, port: its address; port 0 takes a free one, which the log says.
      public_hosts: names by which a proxy before the server is called, such as "llm.example.com".
      api_key: asked of every client; None is QLORA_JAX_API_KEY's, or none.
      admin_key: allows adapters to be loaded and unloaded; None is QLORA_JAX_ADMIN_KEY's, or none.
      drain: seconds for running answers once the server is to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    public_hosts: Sequence[str] = ()
    api_key: str | None = None
    admin_key: str | None = None
    drain: float = 30.0


def serve(
    model: str | Path,
    adapters: str | Path | None = None,
    *,
    engine: EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
    listening: Listening = Listening(),  # noqa: B008 (frozen)
    chat_template: str | None = None,
    until: threading.Event | None = None,
) -> None:
    """Loads the model, listens, and returns when the server has ended: by SIGTERM or Ctrl-C in the main thread.

    Args:
      model: a Hugging Face folder, or a name on the Hub.
      adapters: a folder whose subfolders are PEFT adapters; None serves the model only.
      engine: its `quantization` is taken from the adapters' records where it is None.
      chat_template: a Jinja file, or "chatml", for all; else each adapter has its own, and the base the model's.
      until: ends the server when it is set, as a signal does: how one in another thread is ended.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: with what is missing, wrong or unsupported.
    """
    check_extra()
    from qlora_jax.serve.http.guard import LOOPBACK, Access
    from qlora_jax.serve.http.server import listen

    access = Access(
        api_key=key_of(listening.api_key, "QLORA_JAX_API_KEY"),
        admin_key=key_of(listening.admin_key, "QLORA_JAX_ADMIN_KEY"),
        public=frozenset(map(public_host, listening.public_hosts)),
    )
    if access.admin_key is not None and access.admin_key == access.api_key:
        raise ValueError("--admin-key is the same as --api-key: whoever may ask could change what is served")
    with listen(listening.host, listening.port) as bound:
        loopback = is_loopback(bound)
        if not loopback and access.api_key is None:
            logger.warning(f"anybody who reaches {listening.host} may use the server: set QLORA_JAX_API_KEY")
        access = dataclasses.replace(access, hosts=frozenset(LOOPBACK) if loopback else None)
        with open_service(model, adapters, engine, chat_template) as service:
            _answer(service, access, bound, listening.drain, until)


@contextmanager
def open_service(
    model: str | Path, adapters: str | Path | None, options: EngineOptions, chat_template: str | None
) -> "Iterator[Service]":
    """A service whose engine is started; both end with the block. The arguments are those of `serve`."""
    from qlora_jax.serve.http.service import Service

    adapters = Path(adapters) if adapters else None
    if adapters is not None and not adapters.is_dir():
        raise FileNotFoundError(f"--adapters {str(adapters)!r} is no folder: give one whose subfolders are adapters")
    folder = resolve_folder(str(model))
    tokenizer, model_config = open_tokenizer(folder, chosen=chat_template), read_config(folder)
    limit_vocabulary(tokenizer, model_config.vocab_size)
    if options.quantization is None:
        options = dataclasses.replace(options, quantization=recorded_quantization(adapters))
    stop_ids = stop_ids_of(folder, tokenizer)
    engine = engine_of(folder, adapters, options, base_name=base_name(str(model)), stop_ids=stop_ids)
    if engine.max_length < options.max_length:
        logger.info(f"the model has {engine.max_length} positions, fewer than --max-length {options.max_length}")
    logger.info("compiling for every length of prompt")
    engine.start()
    # A chosen template holds for all; else each adapter has its own, and the base the model's.
    of_adapters = engine.adapters.chat_template if chat_template is None else lambda model: None
    service = Service(
        engine,
        tokenizer,
        base=engine.base_name,
        max_length=engine.max_length,
        vocabulary=model_config.vocab_size,
        chat_template_of=of_adapters,
    )
    try:
        yield service
    finally:
        service.close()
        engine.close()


def _answer(
    service: "Service", access: "Access", bound: socket.socket, drain: float, until: threading.Event | None
) -> None:
    """Answers until a signal comes, or `until` is set."""
    from qlora_jax.serve.http.app import make_app
    from qlora_jax.serve.http.server import Server

    server, ended = Server(make_app(service, access), service, drain=drain), threading.Event()

    def watch(until: threading.Event) -> None:
        while not ended.is_set():
            if until.wait(POLL):
                return server.handle_exit(signal.SIGTERM, None)

    watcher = None if until is None else threading.Thread(target=watch, args=(until,), name="until", daemon=True)
    if watcher:
        watcher.start()
    try:
        server.run(sockets=[bound])
    finally:
        ended.set()
        if watcher:
            watcher.join()


def base_name(model: str) -> str:
    """What the base is called in requests: a Hub name as it is, a folder by its own name."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model
