"""Patterns over module paths: PEFT's meaning, in bounded time."""

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.config import LoraSection
from qlora_jax.lora import resolve_targets
from qlora_jax.lora.patterns import MOST_PATTERNS, Patterns, check_patterns, patterns_of

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.gate_up_proj")
PATHS = ["lm_head", "proj", *(f"model.layers.{i}.{part}" for i in (0, 1, 10) for part in PARTS)]
# What people's adapters hold, then whatever else both languages know.
COMMON = (
    *("q_proj", ".*q_proj", r".*\.(q|k)_proj", r"model\.layers\.\d+\.self_attn\.[qk]_proj", "proj", ".*proj$"),
    *(r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj)))",),
    *(r"model.layers.(0|1)\..*", r"(?i)MODEL.*_PROJ", r"[^.]+", r"(model\.)?lm_head", r".{0,12}", r"", r"a|.*up_proj|"),
)
# Python's `re` needs longer than anybody waits for each of these, or RE2 another syntax.
SLOW = (
    "(a+)+!",
    "((a|_|\\w)+)+!",
    "(.*)*(.*)*(.*)*(.*)*(.*)*x_proj",
    "(\\w+\\.?)+!",
    "(x+x+)+y",
    "(.|.)*(.|.)*(.|.)*!",
)
REFUSED = {
    "a lookahead": ("^(?!.*visual).*", NotImplementedError, "cannot be matched in bounded time"),
    "a lookbehind": ("(?<=q)_proj", NotImplementedError, "cannot be matched in bounded time"),
    "a back-reference": ("(.)\\1.*", NotImplementedError, "without lookarounds and back-references"),
    "a possessive count": ("a++", NotImplementedError, "cannot be matched in bounded time"),
    "another meaning": ("a{,3}", NotImplementedError, "'{,'"),
    "a class of RE2's": ("[:alpha:]", NotImplementedError, "'\\[:'"),
    "half a surrogate pair": ("\ud83c", NotImplementedError, "surrogates"),
    "RE2's own syntax": ("\\Qq_proj\\E", ValueError, "no regular expression"),
    "no expression": ("*q", ValueError, "nothing to repeat"),
    "no end": ("(", ValueError, "no regular expression"),
    "long": ("a" * 1001, ValueError, "1,001 characters"),
    "many repeats": ("((a{1,100}){1,100}){1,100}", NotImplementedError, "repetition"),
}


@pytest.mark.parametrize("pattern", COMMON)
def test_patterns_match_as_in_peft(pattern):
    check_patterns([pattern])
    assert [path for path in PATHS if Patterns([pattern]).first(path) == 0] == [
        path for path in PATHS if re.fullmatch(pattern, path)
    ]


ATOMS = st.sampled_from(["q", "_", "proj", r"\.", ".", r"\d", r"\w", "[a-m]", "[^.]", "layers", r"\b", "^", "$"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{1,3}", "{2}", "*?"])).map(lambda two: f"({two[0]}){two[1]}"),
    ),
    max_leaves=5,
)


@given(pattern=EXPRESSIONS, end=st.sampled_from(["", "_proj", ".*"]), path=st.sampled_from(PATHS))
def test_any_pattern_that_is_taken_means_what_it_means_in_python(pattern, end, path):
    pattern += end
    try:
        check_patterns([pattern])
    except NotImplementedError:
        return
    assert (Patterns([pattern]).first(path) == 0) == (re.fullmatch(pattern, path) is not None)


def test_no_pattern_takes_long():
    """In a process that can be ended: Python's `re` would hold this one for ever."""
    code = f"""
from qlora_jax.lora.patterns import Patterns, check_patterns
paths = ["model.layers.%d.self_attn.qqqqaaaa_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa_proj" % i for i in range(500)]
check_patterns({SLOW!r})
print([Patterns([p]).first(path) for p in {SLOW!r} for path in paths].count(None))"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout == f"{500 * len(SLOW)}\n"


@pytest.mark.parametrize("what", REFUSED)
def test_what_could_take_long_is_refused(what):
    pattern, error, words = REFUSED[what]
    with pytest.raises(error, match=words):
        check_patterns(["q_proj", pattern])


def test_their_number_is_bounded():
    check_patterns(["a"] * MOST_PATTERNS)
    with pytest.raises(ValueError, match="2,001 patterns for modules: at most 2,000"):
        check_patterns(["a"] * (MOST_PATTERNS + 1))
    with pytest.raises(ValueError, match="repeats too much"):
        check_patterns(["(.?){900}"] * 100)


def test_a_key_stands_for_whole_names_as_in_peft():
    """ "proj" is not the end of "q_proj"; the first key that matches counts."""
    peft = pytest.importorskip("peft.utils.other", reason="peft is not installed")
    keys = {"proj": 3, r"layers\.0\..*_proj": 4, "q_proj": 5, "self_attn.k_proj": 6, ".*up_proj": 7}
    config = LoraSection(rank=2, targets="all-linear", rank_pattern=keys)
    found = {name: target.rank for name, target in resolve_targets(config, PATHS).items()}
    expected = {name: keys.get(peft.get_pattern_key(keys, name), 2) for name in PATHS if name != "lm_head"}
    assert found == expected
    assert (found["proj"], found["model.layers.1.self_attn.q_proj"]) == (3, 5)


def test_what_a_users_own_config_holds_is_matched_all_the_same():
    assert [path for path in PATHS if patterns_of((r"(?!.*layers\.1).*q_proj",)).first(path) == 0] == [PATHS[2]]
