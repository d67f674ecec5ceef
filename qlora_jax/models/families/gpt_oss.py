"""gpt-oss: sinks, biases, a window in every other layer, and experts that checkpoints keep in MXFP4."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mixture, model_fields, rope, windows
from qlora_jax.models.names import Names
from qlora_jax.models.specs import LayerKind, LayerSpec, NormSpec, RouterSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' GptOssConfig."""
    feed_forward = mixture(
        hf,
        experts=hf.num_local_experts,
        inner=hf.intermediate_size,
        router=RouterSpec(rule="top_k_softmax", bias=True, name="router"),
        clipped=(hf.swiglu_alpha, hf.swiglu_limit),
        interleaved=True,
        transposed=True,
        bias=True,
    )
    bias = hf.attention_bias
    kind = LayerKind(attention(hf, qkv_bias=bias, output_bias=bias, sinks=True), feed_forward)
    fields = model_fields(hf) | dict(norm=NormSpec(eps=hf.rms_norm_eps, wide=True), names=Names(experts="fused"))
    return ModelConfig(**fields, layers=tuple(LayerSpec(kind, window, rope(hf)) for window in windows(hf)))
