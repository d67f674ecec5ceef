"""What serve.py puts together: keys, how the base is stored, the engine, and the server over it."""

import argparse
import collections
import dataclasses
import importlib.util
import ipaddress
import logging
import os
import re
import socket
from pathlib import Path

from qlora_jax.data import limit_vocabulary
from qlora_jax.io.build import Quantization
from qlora_jax.io.hf import read_config, resolve_folder
from qlora_jax.io.identity import RECORD
from qlora_jax.io.record import read_record, stored_as
from qlora_jax.run.load import open_tokenizer, stop_ids_of

logger = logging.getLogger("qlora_jax.serve")

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


def recorded_quantization(adapters: Path | None) -> Quantization | None:
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


def _stored(file: Path) -> Quantization | None:
    """How an adapter's base was stored; None where its record does not say or is faulty, which the engine logs."""
    try:
        record = read_record(file)
        return stored_as(record, file) if record.get("method") == "qlora" else None
    except (OSError, ValueError):
        return None


def public_host(text: str) -> str:
    """A name, perhaps with a port, as browsers send it. Raises ValueError for anything else, such as an address."""
    if not re.fullmatch(r"([a-z0-9_-]+\.)*[a-z0-9_-]+(:[0-9]{1,5})?|\[[0-9a-f:.]+\](:[0-9]{1,5})?", text.lower()):
        raise ValueError(f"--public-host {text!r}: expected a name such as llm.example.com, without https:// or a path")
    return text.lower()


def is_loopback(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def serve(options: argparse.Namespace) -> None:
    """Loads, warms up, listens, and returns when a signal has ended the server.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: with what is missing, wrong or unsupported.
    """
    from qlora_jax.serve.http.guard import LOOPBACK, Access
    from qlora_jax.serve.http.server import listen

    access = Access(
        api_key=key_of(options.api_key, "QLORA_JAX_API_KEY"),
        admin_key=key_of(options.admin_key, "QLORA_JAX_ADMIN_KEY"),
        public=frozenset(map(public_host, options.public_host)),
    )
    if access.admin_key is not None and access.admin_key == access.api_key:
        raise ValueError("--admin-key is the same as --api-key: whoever may ask could change what is served")
    with listen(options.host, options.port) as bound:
        loopback = is_loopback(bound)
        if not loopback and access.api_key is None:
            logger.warning(f"anybody who reaches {options.host} may use the server: set QLORA_JAX_API_KEY")
        _run(options, dataclasses.replace(access, hosts=frozenset(LOOPBACK) if loopback else None), bound)


def _run(options: argparse.Namespace, access, bound: socket.socket) -> None:
    from qlora_jax.serve import open_engine
    from qlora_jax.serve.http.app import make_app
    from qlora_jax.serve.http.server import Server
    from qlora_jax.serve.http.service import Service

    adapters = Path(options.adapters) if options.adapters else None
    if adapters is not None and not adapters.is_dir():
        raise FileNotFoundError(f"--adapters {options.adapters!r} is no folder: give one whose subfolders are adapters")
    folder = resolve_folder(options.model)
    tokenizer, geometry = open_tokenizer(folder, chosen=options.chat_template), read_config(folder)
    limit_vocabulary(tokenizer, geometry.vocab_size)
    engine = open_engine(
        folder,
        adapters,
        base_name=base_name(options.model),
        stop_ids=stop_ids_of(folder, tokenizer),
        quant=options.quant,
        dtype=options.dtype,
        quantization=recorded_quantization(adapters),
        slots=options.slots,
        max_loras=options.max_loras,
        max_rank=options.max_rank,
        max_length=options.max_length,
        queue=options.queue,
        host_adapters=options.host_adapters,
    )
    if engine.max_length < options.max_length:
        logger.info(f"the model has {engine.max_length} positions, fewer than --max-length {options.max_length}")
    logger.info("compiling for every length of prompt")
    engine.start()
    # A template on the command line holds for all; else each adapter has its own, and the base the model's.
    of_adapters = engine.adapters.chat_template if options.chat_template is None else lambda model: None
    service = Service(
        engine,
        tokenizer,
        base=engine.base_name,
        max_length=engine.max_length,
        vocabulary=geometry.vocab_size,
        chat_template_of=of_adapters,
    )
    try:
        Server(make_app(service, access), service, drain=options.drain).run(sockets=[bound])
    finally:
        service.close()
        engine.close()


def base_name(model: str) -> str:
    """What the base is called in requests: a Hub name as it is, a folder by its own name."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model
