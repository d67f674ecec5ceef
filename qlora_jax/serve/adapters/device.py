"""Which adapter lies in which slot of the device's stacks, and who uses it."""

from dataclasses import dataclass


@dataclass
class Slot:
    """One place in the stacks: what lies there, how many rows use it, and when it was last taken."""

    key: str | None = None
    name: str = ""
    rank: int = 0
    users: int = 0
    used: int = 0


class DeviceSlots:
    """The least recently used adapter makes room for another, but never one that a row uses.

    Slot 0 is the base's: no adapter. Not thread-safe.

    Attributes:
      evictions: how many adapters have made room.
    """

    def __init__(self, count: int):
        self.slots = [Slot() for _ in range(count)]
        self.evictions = 0
        self._clock = 0
        self._claimed: set[int] = set()

    def find(self, key: str) -> int | None:
        """The slot, from 1 on, that an adapter lies in; None if it lies in none."""
        return next((number for number, slot in enumerate(self.slots, start=1) if slot.key == key), None)

    def take(self, number: int) -> bool:
        """A row uses what lies in the slot; not where another adapter has claimed it, or it would be used for ever."""
        if number in self._claimed:
            return False
        self._clock += 1
        slot = self.slots[number - 1]
        slot.users, slot.used = slot.users + 1, self._clock
        return True

    def room(self) -> int | None:
        """A slot that no row uses; None where there is none. Then the one with the fewest users is claimed."""
        unclaimed = [number for number in range(1, len(self.slots) + 1) if number not in self._claimed]
        if not unclaimed:
            return None
        order = lambda number: (self.slots[number - 1].users, self.slots[number - 1].used)  # noqa: E731
        chosen = min(unclaimed, key=order)
        if self.slots[chosen - 1].users:
            self._claimed.add(chosen)
            return None
        return chosen

    def put(self, number: int, key: str, name: str, rank: int) -> None:
        """Notes that an adapter lies in a slot now."""
        slot = self.slots[number - 1]
        assert not slot.users, f"{slot} is in use"
        self.evictions += slot.key is not None
        self.slots[number - 1] = Slot(key, name, rank)

    def empty(self, number: int) -> None:
        """Notes that nothing lies in a slot."""
        self.slots[number - 1] = Slot()

    def release(self, number: int) -> None:
        """A row uses the slot no longer."""
        if number:
            self.slots[number - 1].users -= 1
            assert self.slots[number - 1].users >= 0

    def forget_claims(self) -> None:
        """Before the waiting requests are looked at anew, oldest first."""
        self._claimed.clear()
