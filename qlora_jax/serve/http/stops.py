"""Stop strings, which may begin in one token and end in another."""

from collections.abc import Sequence


class StopFinder:
    """Passes text on until a stop string appears, which is not part of what is passed on.

    Text that may turn out to be the beginning of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that can be passed on now; after a stop string none."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = len(text) - self._open_end(text)
        self._held = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held

    def _open_end(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string: the most."""
        longest = max(map(len, self._stops), default=1) - 1
        ends = range(min(longest, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
