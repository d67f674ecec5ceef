"""What was measured on: the card, its driver, the processor and the packages. No names of hosts or users."""

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

OURS = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "numpy")
THEIRS = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "flash-attn", "unsloth")


def describe() -> dict[str, Any]:
    """Card and processor. Starts JAX's backend."""
    import jax

    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    driver, total = _driver() if device.platform == "gpu" else (None, None)
    return {
        "card": device.device_kind if device.platform == "gpu" else "cpu",
        "memory_mib": total,
        "usable_bytes": stats.get("bytes_limit"),
        "driver": driver,
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def versions() -> dict[str, str]:
    """Of every package that is installed."""
    found = {"python": platform.python_version()}
    for name in (*OURS, *THEIRS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def file_name(card: str) -> str:
    """`h200-2026-01-31.json`."""
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower().removeprefix("nvidia")).strip("-")
    return f"{slug}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.json"


def _driver() -> tuple[str | None, int | None]:
    """The driver's version and the card's memory in MiB, as nvidia-smi states them."""
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        driver, total = text.splitlines()[0].split(",")
        return driver.strip(), int(total)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None, None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
