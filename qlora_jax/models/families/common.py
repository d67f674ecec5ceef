"""The part of a Hugging Face configuration that all families share."""

from typing import Any

from qlora_jax.models.families.rope import number, rope_scaling


def shared_fields(family: str, hf: Any) -> dict[str, Any]:
    """ModelConfig fields of a transformers configuration object `hf`.

    Raises:
      ValueError, NotImplementedError: an activation or a rope scaling that cannot be, or that is not supported.
    """
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    if hf.hidden_act not in ("silu", "swish"):
        raise NotImplementedError(f"{family}: hidden_act {hf.hidden_act!r} is not supported, only 'silu'")
    scaling = rope_scaling(hf.rope_parameters, max_position=hf.max_position_embeddings, head_dim=head_dim)
    return dict(
        family=family,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        norm_eps=hf.rms_norm_eps,
        max_position=scaling.longest(hf.max_position_embeddings),
        initializer_range=hf.initializer_range,
        tie_embeddings=hf.tie_word_embeddings,
        rope_theta=number(hf.rope_parameters, "rope_theta"),
        rope_scaling=scaling,
    )
