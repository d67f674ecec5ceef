"""What the engine shows of itself."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from qlora_jax.serve.adapters import AdapterStore
from qlora_jax.serve.adapters.device import Slot
from qlora_jax.serve.job import Row

State = Literal["starting", "serving", "draining", "closed", "dead"]


@dataclasses.dataclass(frozen=True)
class SlotView:
    """A row of the cache.

    Attributes:
      adapter: whose request it serves; None for the base's, or where the row is free.
      tokens: how many the cache holds there.
      prompt: the length of the request's prompt, 0 where the row is free.
    """

    state: Literal["free", "reading", "writing"]
    adapter: str | None
    tokens: int
    prompt: int


@dataclasses.dataclass(frozen=True)
class AdapterView:
    """An adapter: `where` its fastest copy lies. `hash` is empty and `rank` 0 for one that has not been read.

    After a change of its files an adapter can be there twice, with two hashes.
    """

    name: str
    hash: str
    rank: int
    where: Literal["disk", "host", "device"]
    users: int


@dataclasses.dataclass(frozen=True)
class View:
    """The engine at one moment.

    Attributes:
      state: "dead" after a fault that it could not recover from; `error` says which.
      slots: the rows, by the name that /status and the option have for them.
      waiting: requests without a row.
      counters: what has been counted since the start, by name: requests, and how they ended (stop, length, cancelled,
        failed); prompt_tokens that were read, cached_tokens that need not be, tokens that were drawn, steps that drew
        them; loads of adapters from disk, installs on the device and evictions from it; compilations.
      broken: what lies in the adapters' folder and cannot be served, by the subfolder's name, with the reason.
    """

    state: State
    error: str
    slots: tuple[SlotView, ...]
    waiting: int
    adapters: tuple[AdapterView, ...]
    counters: Mapping[str, int]
    broken: Mapping[str, str] = dataclasses.field(default_factory=dict)


def slot_views(rows: Sequence[Row]) -> tuple[SlotView, ...]:
    """The rows as they are; the engine's thread may go on meanwhile."""
    found = []
    for row in rows:
        job = row.job
        if job is None:
            found.append(SlotView("free", None, len(row.tokens), 0))
        else:
            state: Literal["reading", "writing"] = "reading" if job.pieces else "writing"
            found.append(SlotView(state, job.request.adapter, len(row.tokens), len(job.request.prompt)))
    return tuple(found)


def adapter_views(store: AdapterStore, slots: Sequence[Slot]) -> tuple[AdapterView, ...]:
    """Every adapter by the fastest place that has it: device, host memory, disk."""
    found = [AdapterView(slot.name, slot.key, slot.rank, "device", slot.users) for slot in slots if slot.key]
    keys = {slot.key for slot in slots}
    found += [AdapterView(name, a.key, a.rank, "host", 0) for name, a in store.held() if a.key not in keys]
    names = {adapter.name for adapter in found}
    return (*found, *(AdapterView(name, "", 0, "disk", 0) for name in store.names() if name not in names))
