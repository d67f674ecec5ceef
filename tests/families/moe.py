"""Text models of attention and mixtures of experts."""

from tests.families.spec import WINDOW, Family, rope, sizes, yarn

EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
LOCAL_EXPERTS = dict(num_local_experts=8, num_experts_per_tok=2)

MOE = {
    "qwen3_moe": Family(
        config="Qwen3MoeConfig", text="qwen3_moe", options=sizes(head_dim=32, norm_topk_prob=True, **EXPERTS)
    ),
    "qwen2_moe": Family(
        config="Qwen2MoeConfig",
        text="qwen2_moe",
        options=sizes(shared_expert_intermediate_size=128, norm_topk_prob=False, **EXPERTS),
    ),
    "mixtral": Family(
        config="MixtralConfig",
        text="mixtral",
        options=sizes(sliding_window=None, intermediate_size=64, **LOCAL_EXPERTS),
    ),
    "olmoe": Family(
        config="OlmoeConfig",
        text="olmoe",
        options=sizes(num_experts=8, num_experts_per_tok=2, intermediate_size=64),
    ),
    "glm4_moe": Family(
        config="Glm4MoeConfig",
        text="glm4_moe",
        options=sizes(
            head_dim=16,
            attention_bias=True,
            use_qk_norm=True,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            rope_parameters=rope(partial_rotary_factor=0.5),
        ),
    ),
    "gpt_oss": Family(
        config="GptOssConfig",
        text="gpt_oss",
        options=sizes(
            num_hidden_layers=4,
            head_dim=16,
            intermediate_size=64,
            sliding_window=WINDOW,
            swiglu_limit=1.0,  # below what the layers reach
            rope_parameters=yarn(truncate=False),
            **LOCAL_EXPERTS,
        ),
    ),
}
