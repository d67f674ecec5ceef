"""What families' tables are written with: the parts of a Hugging Face configuration that most of them share."""

import math
from typing import Any

from qlora_jax.models.blocks.activations import ACTIVATIONS
from qlora_jax.models.families.rope import number, rope_scaling, rotated_dims
from qlora_jax.models.specs import AttentionSpec, MLPSpec, MoESpec, NormSpec, Rope, RouterSpec

# Of all layers together; the largest models have some 20,000.
MOST_EXPERTS = 2**18


def model_fields(hf: Any) -> dict[str, Any]:
    """ModelConfig's fields, but for `layers`, of a transformers configuration object of a text model.

    Raises:
      ValueError, NotImplementedError: a rope scaling that cannot be, or that is not supported.
    """
    return dict(
        family=hf.model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        norm=NormSpec(eps=hf.rms_norm_eps if hasattr(hf, "rms_norm_eps") else hf.norm_eps),
        max_position=longest(hf),
        initializer_range=hf.initializer_range,
        balance=hf.router_aux_loss_coef if getattr(hf, "output_router_logits", False) else 0.0,
        tie_embeddings=getattr(hf, "tie_word_embeddings", False),
    )


def longest(hf: Any) -> int:
    """The longest text that a model was made for: where positions are stretched, the stretched length."""
    every = hf.rope_parameters if "full_attention" in hf.rope_parameters else {"": hf.rope_parameters}
    stretched = [one for one in every.values() if one and one.get("rope_type") in ("dynamic", "yarn")]
    stated = hf.max_position_embeddings
    scalings = [rope_scaling(one, max_position=stated, dims=0) for one in stretched]
    return max((scaling.longest(stated) for scaling in scalings), default=stated)


def head_dim(hf: Any) -> int:
    """Elements of an attention head. Raises ValueError where they cannot be rotated in pairs."""
    size = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    if size < 2 or size % 2:
        raise ValueError(
            f"head_dim={size} (with {hf.hidden_size} hidden_size, {hf.num_attention_heads} num_attention_heads) must "
            f"be even and at least 2: pairs of dimensions are rotated"
        )
    return size


def attention(hf: Any, **others: Any) -> AttentionSpec:
    """The attention of a configuration's sizes; `others` are AttentionSpec's other fields."""
    sizes = dict(heads=hf.num_attention_heads, kv_heads=hf.num_key_value_heads, head_dim=head_dim(hf))
    return AttentionSpec(**{**sizes, **others})


def mlp(hf: Any, **others: Any) -> MLPSpec:
    """The MLP of a configuration. Raises NotImplementedError for an activation that is not supported."""
    activation = hf.hidden_activation if hasattr(hf, "hidden_activation") else hf.hidden_act
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise NotImplementedError(f"{hf.model_type}: hidden_act {activation!r} is not supported, only {known}")
    sizes = {} if "inner" in others else dict(inner=hf.intermediate_size)
    spec = MLPSpec(**sizes, activation=activation, **others)
    if type(spec.inner) is not int or spec.inner < 1:
        raise ValueError(f"{hf.model_type}: {spec.name} of {spec.inner!r} elements, expected a whole number from 1 on")
    return spec


def positive(hf: Any, name: str) -> float | int:
    """A field that is divided by, or of which a root is taken. Raises ValueError."""
    value = getattr(hf, name)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a number above 0")
    return value


def by_layer(hf: Any, name: str) -> list[Any]:
    """A field with an entry for each layer. Raises ValueError."""
    values = getattr(hf, name)
    if len(values) != hf.num_hidden_layers:
        raise ValueError(f"{name} has {len(values)} entries, expected one for each of {hf.num_hidden_layers} layers")
    return values


def mixture(hf: Any, **others: Any) -> MoESpec:
    """The experts of a configuration; `others` are MoESpec's other fields, and those that are named otherwise there."""
    sizes = {} if "experts" in others else dict(experts=hf.num_experts)
    sizes |= {} if "inner" in others else dict(inner=hf.moe_intermediate_size)
    if "router" not in others:
        # Qwen3.5's configurations have no such field: their code always does.
        sizes["router"] = RouterSpec(renormalize=getattr(hf, "norm_topk_prob", True))
    activation = mlp(hf, inner=1).activation
    sizes |= {} if "top_k" in others else dict(top_k=hf.num_experts_per_tok)
    spec = MoESpec(**sizes, activation=activation, **others)
    _check_experts(hf, spec)
    return spec


def _check_experts(hf: Any, spec: MoESpec) -> None:
    """Refuses sizes that cannot be. Raises ValueError."""
    experts, top_k, layers, (groups, used) = spec.experts, spec.top_k, hf.num_hidden_layers, spec.router.groups
    for what, size in (("experts", experts), ("elements between an expert's projections", spec.inner)):
        if type(size) is not int or size < 1:
            raise ValueError(f"{hf.model_type}: {what}: {size!r}, expected a whole number from 1 on")
    if layers * experts > MOST_EXPERTS:
        raise ValueError(
            f"{hf.model_type}: {layers:,} layers of {experts:,} experts, expected {MOST_EXPERTS:,} at most"
        )
    if type(top_k) is not int or not 1 <= top_k <= experts:
        raise ValueError(f"{hf.model_type}: each token goes to {top_k!r} of {experts} experts, expected 1 to {experts}")
    if not 1 <= used <= groups or experts % groups or used * (experts // groups) < top_k:
        raise ValueError(
            f"{hf.model_type}: {top_k} of {experts} experts out of {used} of {groups} groups (topk_group, n_group) "
            f"cannot be chosen"
        )


def sparse_layers(hf: Any) -> list[bool]:
    """Which layers have experts, of a configuration that leaves some dense."""
    every, dense = int(positive(hf, "decoder_sparse_step")), hf.mlp_only_layers
    return [layer not in dense and (layer + 1) % every == 0 for layer in range(hf.num_hidden_layers)]


def rope(hf: Any, parameters: Any = None, **others: Any) -> Rope:
    """The rotation of a configuration, or of one of several `parameters` in it; `others` are Rope's other fields.

    Raises:
      ValueError, NotImplementedError: as `rope_scaling`.
    """
    parameters = hf.rope_parameters if parameters is None else parameters
    size = others.pop("head_dim", None) or head_dim(hf)
    dims = rotated_dims(parameters, size)
    if dims > size:
        raise ValueError(f"rope_parameters: {dims} dimensions are rotated (partial_rotary_factor), a head has {size}")
    scaling = rope_scaling(parameters, max_position=hf.max_position_embeddings, dims=dims)
    return Rope(theta=number(parameters, "rope_theta"), dims=dims, scaling=scaling, **others)


def layer_ropes(hf: Any) -> list[Rope]:
    """Each layer's rotation, where they may differ by the kind of layer."""
    if "full_attention" not in hf.rope_parameters:
        return [rope(hf)] * hf.num_hidden_layers
    return [rope(hf, hf.rope_parameters[kind]) for kind in hf.layer_types]


def windows(hf: Any) -> list[int]:
    """Each layer's window from `layer_types`.

    Raises:
      ValueError: a sliding layer without a window. NotImplementedError: another kind of layer.
    """
    kinds = set(hf.layer_types)
    if kinds - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"layer_types {sorted(kinds)} are not supported, only full_ and sliding_attention")
    if "sliding_attention" in kinds and not hf.sliding_window:
        stated = "null" if hf.sliding_window is None else hf.sliding_window
        raise ValueError(f"layer_types names sliding_attention, but sliding_window is {stated}")
    return [hf.sliding_window if kind == "sliding_attention" else 0 for kind in hf.layer_types]
