"""Text models whose layers are attention and an MLP."""

from tests.families.spec import WINDOW, Family, rope, sizes, yarn

MULTIPLIERS = dict(embedding_multiplier=3.0, attention_multiplier=0.1, residual_multiplier=0.5, logits_scaling=4.0)
LONG_ROPE = dict(
    type="longrope", short_factor=[1 + 0.1 * i for i in range(6)], long_factor=[1 + 0.9 * i for i in range(6)]
)
SCALED_QUERIES = yarn(mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)

DENSE = {
    "llama": Family(config="LlamaConfig", text="llama", options=sizes()),
    "mistral": Family(config="MistralConfig", text="mistral", options=sizes(sliding_window=WINDOW)),
    "ministral3": Family(
        config="Ministral3Config", text="ministral3", options=sizes(head_dim=32, rope_parameters=SCALED_QUERIES)
    ),
    "qwen2": Family(
        config="Qwen2Config",
        text="qwen2",
        options=sizes(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    ),
    "qwen3": Family(config="Qwen3Config", text="qwen3", options=sizes(head_dim=32)),
    "gemma2": Family(
        config="Gemma2Config",
        text="gemma2",
        options=sizes(
            head_dim=32,
            num_hidden_layers=4,
            sliding_window=WINDOW,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3_text": Family(
        config="Gemma3TextConfig",
        text="gemma3_text",
        options=sizes(head_dim=32, num_hidden_layers=7, sliding_window=WINDOW, query_pre_attn_scalar=24),
    ),
    "phi3": Family(config="Phi3Config", text="phi3", options=sizes(sliding_window=WINDOW)),
    "phi4_mini": Family(
        config="Phi3Config",
        text="phi3",
        options=sizes(
            tie_word_embeddings=True,
            original_max_position_embeddings=32,
            rope_scaling=LONG_ROPE,
            partial_rotary_factor=0.75,
            rope_theta=10000.0,
        ),
    ),
    "smollm3": Family(config="SmolLM3Config", text="smollm3", options=sizes(num_hidden_layers=4)),
    "olmo2": Family(config="Olmo2Config", text="olmo2", options=sizes()),
    "olmo3": Family(
        config="Olmo3Config",
        text="olmo3",
        options=sizes(num_hidden_layers=4, sliding_window=WINDOW, rope_scaling=yarn(attention_factor=1.2)),
    ),
    "exaone4": Family(
        config="Exaone4Config",
        text="exaone4",
        options=sizes(num_hidden_layers=4, sliding_window=WINDOW, sliding_window_pattern=4),
    ),
    "granite": Family(config="GraniteConfig", text="granite", options=sizes(tie_word_embeddings=True, **MULTIPLIERS)),
    "granite4_dense": Family(
        config="GraniteMoeHybridConfig",
        text="granitemoehybrid",
        options=sizes(
            tie_word_embeddings=True,
            num_local_experts=0,
            shared_intermediate_size=128,
            position_embedding_type="rope",
            layer_types=["full_attention"] * 3,
            mamba_n_heads=8,
            mamba_d_state=16,
            mamba_d_head=16,
            mamba_expand=2,
            **MULTIPLIERS,
        ),
    ),
    "granite_swa": Family(
        config="GraniteSWAConfig",
        text="granite_swa",
        options=sizes(
            num_hidden_layers=4,
            tie_word_embeddings=True,
            sliding_window=WINDOW,
            layer_rope_theta=[10000.0, 0, 500.0, 10000.0],
            **MULTIPLIERS,
        ),
    ),
    "glm4": Family(
        config="Glm4Config",
        text="glm4",
        options=sizes(head_dim=16, attention_bias=True, rope_parameters=rope(partial_rotary_factor=0.5)),
    ),
    "seed_oss": Family(
        config="SeedOssConfig",
        text="seed_oss",
        options=sizes(head_dim=32, attention_bias=True, attention_out_bias=False),
    ),
    "hunyuan_v1_dense": Family(config="HunYuanDenseV1Config", text="hunyuan_v1_dense", options=sizes(head_dim=16)),
    "ernie4_5": Family(config="Ernie4_5Config", text="ernie4_5", options=sizes(head_dim=16)),
}
