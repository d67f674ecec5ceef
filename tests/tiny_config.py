"""A decoder small enough for every test: grouped queries, and a sliding window in one layer."""

from qlora_jax.models import ModelConfig

CONFIG = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_position=256,
    windows=(0, 6, 0),
)
