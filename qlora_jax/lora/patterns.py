"""Regular expressions over module paths, as PEFT has them; those of an adapter's files are matched in bounded time."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import re2

# Enough for a rank and an alpha for each of 1,000 modules; RE2's programs for these have about 100 instructions each.
MOST_PATTERNS, LONGEST_PATTERN, MOST_INSTRUCTIONS = 2_000, 1_000, 300_000
# Bytes that RE2 may keep for a pattern; with fewer than it would like it is slower, and no less right.
MEMORY = 1 << 18
# Python reads these otherwise than RE2: "{,3}" is a count there and text here, "[:" begins a class of characters here.
READ_OTHERWISE = ("{,", "[:")


class Patterns:
    """Several patterns of which the first that matches a whole path counts.

    RE2 takes time linear in the path's length, whatever the pattern. What it does not know (lookarounds,
    back-references) is left to Python's `re`, for the patterns that a user's own config may hold: `check_patterns` has
    refused these in files from elsewhere.

    Raises:
      ValueError: one that is no regular expression.
    """

    def __init__(self, patterns: Sequence[str]):
        self._compiled = [_compiled(pattern) for pattern in patterns]
        self._found: dict[str, int | None] = {}

    def first(self, path: str) -> int | None:
        """Which pattern matches; None where none does."""
        if path not in self._found:
            matching = (i for i, pattern in enumerate(self._compiled) if pattern.fullmatch(path))
            self._found[path] = next(matching, None)
        return self._found[path]


# An adapter's are asked for several times while it is read.
@functools.lru_cache(maxsize=4)
def patterns_of(patterns: tuple[str, ...]) -> Patterns:
    """`Patterns`, compiled once."""
    return Patterns(patterns)


def check_patterns(patterns: Sequence[str]) -> None:
    """Refuses what could take long to match.

    Raises:
      ValueError: no regular expression, or more and longer ones than an adapter needs.
      NotImplementedError: what RE2 does not know, such as a lookahead.
    """
    if len(patterns) > MOST_PATTERNS:
        raise ValueError(f"{len(patterns):,} patterns for modules: at most {MOST_PATTERNS:,} are taken")
    instructions = 0
    for pattern in patterns:
        if len(pattern) > LONGEST_PATTERN:
            raise ValueError(
                f"the pattern {pattern[:40]!r}… has {len(pattern):,} characters: at most {LONGEST_PATTERN:,}"
            )
        instructions += _linear(pattern).programsize
        if instructions > MOST_INSTRUCTIONS:
            raise ValueError(f"the pattern {pattern[:80]!r} repeats too much: write it with smaller counts")


def check_syntax(pattern: str) -> None:
    """Raises ValueError for what is no regular expression of Python's."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern[:80]!r} is no regular expression ({error})") from error


def _compiled(pattern: str) -> Any:
    try:
        return _linear(pattern)
    except NotImplementedError:
        return re.compile(pattern)


def _linear(pattern: str) -> Any:
    check_syntax(pattern)
    otherwise = next((text for text in READ_OTHERWISE if text in pattern), None)
    if otherwise:
        raise NotImplementedError(f"the pattern {pattern[:80]!r} has {otherwise!r}: write it in another way")
    options = re2.Options()
    options.log_errors, options.max_mem = False, MEMORY
    try:
        return re2.compile(pattern, options)
    except (re2.error, UnicodeEncodeError) as error:
        words = error.args[0].decode("utf-8", "replace") if isinstance(error, re2.error) else str(error)
        raise NotImplementedError(
            f"the pattern {pattern[:80]!r} cannot be matched in bounded time ({words}): "
            "write it without lookarounds and back-references, or list the modules' names"
        ) from error
