"""The part of a Hugging Face configuration that all families share."""

from typing import Any

from qlora_jax.models.config import RopeScaling


def shared_fields(family: str, hf: Any) -> dict[str, Any]:
    """ModelConfig fields of a transformers configuration object `hf`.

    Raises:
      NotImplementedError: an activation or a rope scaling that the decoder does not have.
    """
    if hf.hidden_act != "silu":
        raise NotImplementedError(f"{family}: hidden_act {hf.hidden_act!r} is not supported, only 'silu'")
    return dict(
        family=family,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        norm_eps=hf.rms_norm_eps,
        max_position=hf.max_position_embeddings,
        initializer_range=hf.initializer_range,
        tie_embeddings=hf.tie_word_embeddings,
        rope_theta=hf.rope_parameters["rope_theta"],
        rope_scaling=rope_scaling(family, hf.rope_parameters),
    )


def rope_scaling(family: str, parameters: dict) -> RopeScaling:
    """The rope scaling of a configuration's `rope_parameters`."""
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind=kind, factor=parameters["factor"])
    if kind == "llama3":
        return RopeScaling(
            kind=kind,
            factor=parameters["factor"],
            low_freq_factor=parameters["low_freq_factor"],
            high_freq_factor=parameters["high_freq_factor"],
            original_max_position=parameters["original_max_position_embeddings"],
        )
    raise NotImplementedError(f"{family}: rope scaling {kind!r} is not supported, only default, linear and llama3")
