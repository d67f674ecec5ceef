"""Settings of the process that must stand before JAX starts its backend."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# JAX takes 75 % of a card at once unless told otherwise: then 4 GB of use look like 18, and 65B does not fit 48 GB.
DEFAULTS = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}


def prepare(*, deterministic: bool = False) -> None:
    """Sets the allocator's limits and the compilation cache, unless the user's environment does.

    XLA reads its variables when the backend starts, JAX reads its own when it is imported, which may have happened.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every checkpoint there
    _show_log()
    if deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Loading compiles fifty small programs of a tenth of a second each; JAX keeps those above 1 s only.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextmanager
def planning() -> Iterator[None]:
    """Runs JAX on the CPU, whatever there is, and keeps its CUDA plugin for compiling only.

    Three reports are held back: the plugin's page of traceback about CUDA libraries that a plan does not need, which
    kernels the CPU, on which shapes are traced, would run, and XLA's that a program is too large for the card, which is
    what the plan says itself.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    log_level = os.environ["TF_CPP_MIN_LOG_LEVEL"]  # JAX sets one; the plugin reads it when it is loaded
    if log_level == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    loggers = [logging.getLogger(name) for name in ("jax._src.xla_bridge", "qlora_jax.kernels")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = log_level


def _show_log() -> None:
    """Puts the package's own log, such as which kernels run, on standard error, and of other packages the warnings.

    The handler is the root's: absl, which Orbax uses, gives the root one where it has none, and every line would then
    be there twice.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("qlora_jax").setLevel(logging.INFO)


def cache_folder() -> Path:
    """A private folder of the user's for compiled programs: nobody else may write what we would run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "qlora-jax" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="qlora-jax-xla-"))
    return folder
