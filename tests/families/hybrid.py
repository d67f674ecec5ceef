"""Text models of which some layers mix tokens by a recurrence or a convolution."""

from tests.families.spec import Family, rope, sizes

# Three of four layers are gated DeltaNet, with fewer heads for keys than for values.
DELTA = dict(
    num_hidden_layers=4,
    head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
)
SHARED_EXPERTS = dict(
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64
)
CONVOLUTIONS = dict(num_hidden_layers=4, layer_types=["conv", "conv", "full_attention", "conv"], conv_L_cache=3)
PARTIAL = rope(partial_rotary_factor=0.25)

HYBRID = {
    "qwen3_5_text": Family(
        config="Qwen3_5TextConfig", text="qwen3_5_text", options=sizes(rope_parameters=PARTIAL, **DELTA)
    ),
    "qwen3_next": Family(
        config="Qwen3NextConfig",
        text="qwen3_next",
        options=sizes(rope_parameters=PARTIAL, **DELTA, **SHARED_EXPERTS),
    ),
    "lfm2": Family(
        config="Lfm2Config",
        text="lfm2",
        options=sizes(block_auto_adjust_ff_dim=False, block_multiple_of=16, **CONVOLUTIONS),
    ),
    "lfm2_moe": Family(
        config="Lfm2MoeConfig",
        text="lfm2_moe",
        options=sizes(
            num_dense_layers=1,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            use_expert_bias=True,
            **CONVOLUTIONS,
        ),
    ),
}
