"""Which kernels run: what the user asked for, what the device can do, and one line in the log that says so."""

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import jax
from jax.extend import backend

REQUESTS = ("auto", "pallas", "mosaic", "xla")
VARIABLE = "QLORA_JAX_KERNELS"
DTYPES = ("bfloat16", "float16", "float32")
# What Pallas' backends emit instructions of. Mosaic's kernels elect a thread by one of Hopper's; on older cards LLVM
# cannot select it, and ends the process.
OLDEST, OLDEST_MOSAIC = 80, 90
# JAX's names of devices that programs are compiled for without having one (jax.sharding.AbstractDevice).
CAPABILITIES = {
    "Tesla T4": 75,
    "A100": 80,
    "A10": 86,
    "RTX 30": 86,
    "RTX 40": 89,
    "L4": 89,
    "H100": 90,
    "H200": 90,
    "B200": 100,
    "RTX 50": 120,
}

log = logging.getLogger("qlora_jax.kernels")
# Part of jit's cache key: a function traced under one choice is traced again under another.
_requested = jax.make_user_context(default_value=None)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs, and why.

    Attributes:
      name: "triton", "mosaic" (Pallas backends) or "xla" (the reference).
      capability: CUDA compute capability, 90 for 9.0; None where the device is no NVIDIA GPU.
      reason: the words of the log line.
    """

    name: Literal["triton", "mosaic", "xla"]
    capability: int | None
    reason: str


@contextmanager
def using(request: str) -> Iterator[None]:
    """Chooses the kernels of everything that is traced inside, over the environment's choice.

    "auto" takes Pallas' Triton kernels on NVIDIA GPUs from compute capability 8.0 on, and XLA elsewhere.

    Raises:
      ValueError: an unknown name.
    """
    with _requested(_checked(request, "kernels")):
        yield


def requested() -> str:
    """The user's wish: of `using`, else of QLORA_JAX_KERNELS, else "auto"."""
    asked = _requested.value
    if asked in (None, "auto"):
        asked = _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)
    return asked


def chosen(dtype: str) -> Choice:
    """The kernels for an operation of this dtype that is being traced now. Logged once for each choice.

    Raises:
      RuntimeError: a kernel was asked for by name, and cannot run here.
    """
    choice = available(dtype)
    announce(choice)
    return choice


def available(dtype: str) -> Choice:
    """`chosen` without a word in the log: a command checks what was asked for before it begins."""
    return choose(requested(), capability(), dtype, has_triton=has_triton())


def choose(request: str, capability: int | None, dtype: str, *, has_triton: bool) -> Choice:
    """The rule behind `chosen`, as a function of what was asked for and what is there."""
    if request == "xla":
        return Choice("xla", capability, "asked for by name")
    obstacle = _obstacle(request, capability, dtype, has_triton)
    if obstacle and request == "auto":
        return Choice("xla", capability, obstacle)
    if obstacle:
        raise RuntimeError(f"kernels={request!r} cannot run: {obstacle}. Use kernels='auto' or 'xla'")
    name: Literal["triton", "mosaic"] = "mosaic" if request == "mosaic" else "triton"
    return Choice(name, capability, "asked for by name" if request != "auto" else f"compute capability {capability}")


def _obstacle(request: str, capability: int | None, dtype: str, has_triton: bool) -> str:
    """Why no kernel can run; empty if one can."""
    if capability is None:
        return f"JAX runs on {jax.default_backend()}, not on an NVIDIA GPU{_missing_plugin()}"
    oldest, name = (OLDEST_MOSAIC, "Hopper") if request == "mosaic" else (OLDEST, "Ampere")
    if capability < oldest:
        return f"compute capability {capability / 10} is below {oldest / 10} (NVIDIA {name})"
    if request != "mosaic" and not has_triton:
        return f"jax {jax.__version__} has no Pallas Triton backend (jax.experimental.pallas.triton)"
    if dtype not in DTYPES:
        return f"there is no kernel for {dtype}, only for {', '.join(DTYPES)}"
    return ""


def _missing_plugin() -> str:
    if jax.default_backend() != "cpu" or not Path("/proc/driver/nvidia/version").exists():
        return ""
    return "; there is one, but JAX's CUDA plugin is not installed or not selected: pip install 'qlora-jax[cuda13]'"


@functools.cache
def has_triton() -> bool:
    """Whether this jax still ships Pallas' Triton backend."""
    try:
        import jax.experimental.pallas.triton  # noqa: F401
    except ImportError:
        return False
    return True


def capability() -> int | None:
    """CUDA compute capability of the device that is traced for, ten times its number; None if it is no NVIDIA GPU."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is None:
        return device_capability()
    return _capability_of(abstract.device_kind) if abstract.platform in ("gpu", "cuda") else None


def device_capability() -> int | None:
    """The same of JAX's default device."""
    number = str(getattr(backend.get_default_device(), "compute_capability", ""))
    return int(number.replace(".", "")) if re.fullmatch(r"\d+\.\d", number) else None


def _capability_of(kind: str) -> int | None:
    # The longest name that fits: "A10" is also the beginning of "A100".
    names = sorted((name for name in CAPABILITIES if name in kind), key=len)
    return CAPABILITIES[names[-1]] if names else None


@functools.cache
def announce(choice: Choice) -> None:
    """Writes one line to the log the first time that a choice is met."""
    words = {"triton": "Pallas kernels (Triton)", "mosaic": "Pallas kernels (Mosaic GPU)", "xla": "XLA, no kernels"}
    log.info("NF4 runs on %s: %s", words[choice.name], choice.reason)


def _checked(request: str, origin: str) -> str:
    if request not in REQUESTS:
        raise ValueError(f"{origin}={request!r}: expected {', '.join(REQUESTS)}")
    return request
