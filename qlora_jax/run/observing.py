"""The `progress` argument of the functions that take long."""

from qlora_jax.report.progress import Terminal
from qlora_jax.training.observer import Observer

# True shows what is going on on standard error; False leaves it to the log; an Observer hears of it.
Progress = bool | Observer


def observer_of(progress: Progress) -> Observer:
    """Who hears what the call does."""
    if isinstance(progress, Observer):
        return progress
    return Terminal() if progress else Observer()
