"""Small real checkpoints, made by transformers with random weights."""

import itertools
import signal
from pathlib import Path

import pytest

# The tests may run under nohup, which lets no process hear of it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Linux gives a process 65,530 ranges of memory. Every compiled program takes several, and JAX keeps all of them.
MOST_RANGES, MAPS = 30_000, Path("/proc/self/maps")
_tests = itertools.count()


def pytest_runtest_teardown():
    """Forgets compiled programs before they are so many that the process would be aborted."""
    if next(_tests) % 10 == 0 and MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_RANGES:
        import jax

        jax.clear_caches()


SIZES = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# One entry per architecture that the decoder runs: (transformers configuration class, its arguments).
ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", dict(tie_word_embeddings=True)),
    "llama-biases": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True)),
    "llama-3.1": ("LlamaConfig", dict(rope_parameters=LLAMA3_ROPE)),
    "llama-linear-rope": (
        "LlamaConfig",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
    ),
    "mistral": ("MistralConfig", dict(sliding_window=5)),
    "mistral-no-window": ("MistralConfig", dict(sliding_window=None)),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": ("Qwen2Config", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": ("Qwen3Config", dict(head_dim=32)),
}


def make_checkpoint(folder: Path, name: str = "llama", *, dtype: str = "float32", shard: str = "5GB", **sizes) -> Path:
    """Saves a random model of an architecture, norms and biases away from their trivial values."""
    import torch
    import transformers

    kind, extra = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**{**SIZES, **extra, **sizes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for path, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in path else 0.0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(name, **options)`: the folder of a small random model, made once for each set of options."""
    made: dict[tuple, Path] = {}

    def get(name: str = "llama", **options) -> Path:
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(name), name, **options)
        return made[key]

    return get


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Encoded rows are kept apart from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
