"""Models of text and more, of which the tests use the text part."""

from tests.families.dense import SCALED_QUERIES
from tests.families.hybrid import DELTA, SHARED_EXPERTS
from tests.families.spec import HIDDEN, VOCABULARY, WINDOW, Family, rope, sizes

TINY = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
SIGLIP = dict(model_type="siglip_vision_model", image_size=28, patch_size=14, **TINY)
PIXTRAL = dict(model_type="pixtral", head_dim=16, image_size=28, patch_size=14, **TINY)
GEMMA4_VISION = dict(num_key_value_heads=2, head_dim=16, patch_size=4, position_embedding_size=16, **TINY)
QWEN_VISION = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, patch_size=4, out_hidden_size=HIDDEN)
QWEN3_VISION = dict(num_position_embeddings=16, spatial_merge_size=2, temporal_patch_size=2, **QWEN_VISION)
MUSE_VISION = dict(pos_emb_height=4, pos_emb_width=4, patch_size=4, max_position_embeddings=16, **TINY)

QWEN_TOKENS = dict(image_token_id=10, video_token_id=11, vision_start_token_id=12, vision_end_token_id=13)
GEMMA4_TOKENS = dict(
    image_token_id=10,
    boi_token_id=11,
    eoi_token_id=12,
    video_token_id=13,
    audio_token_id=14,
    boa_token_id=15,
    eoa_token_index=16,
)
INTERLEAVED = rope(partial_rotary_factor=0.25, mrope_section=[2, 1, 1])
# Global layers have larger heads and fewer of them for keys.
GEMMA4_TEXT = dict(
    head_dim=16,
    sliding_window=WINDOW,
    global_head_dim=32,
    num_global_key_value_heads=1,
    final_logit_softcapping=3.0,
)
SHARED_KEYS = (["sliding_attention"] * 3 + ["full_attention"]) * 2


def gemma4(**text) -> Family:
    """A Gemma 4 model with these options of its text part."""
    parts = dict(text_config=sizes(**{**GEMMA4_TEXT, **text}), vision_config=GEMMA4_VISION, audio_config=None)
    return Family(
        config="Gemma4Config",
        text="gemma4_text",
        options={**parts, **GEMMA4_TOKENS},
        model="Gemma4ForConditionalGeneration",
    )


def mistral3(text: str, **options) -> Family:
    """A Mistral 3 model around a text model of this kind."""
    parts = dict(text_config=sizes(model_type=text, head_dim=32, **options), vision_config=PIXTRAL)
    rest = dict(image_token_index=10, spatial_merge_size=2, tie_word_embeddings=False)
    return Family(
        config="Mistral3Config", text=text, options={**parts, **rest}, model="Mistral3ForConditionalGeneration"
    )


WRAPPERS = {
    "gemma3": Family(
        config="Gemma3Config",
        text="gemma3_text",
        options=dict(
            text_config=sizes(
                head_dim=32,
                num_hidden_layers=6,
                sliding_window=WINDOW,
                query_pre_attn_scalar=24,
                rope_scaling=dict(rope_type="linear", factor=8.0),
            ),
            vision_config=SIGLIP,
            mm_tokens_per_image=4,
            image_token_index=10,
            boi_token_index=11,
            eoi_token_index=12,
        ),
        model="Gemma3ForConditionalGeneration",
    ),
    "gemma4": gemma4(num_hidden_layers=6, attention_k_eq_v=True, hidden_size_per_layer_input=0),
    "gemma4_e": gemma4(
        num_hidden_layers=8,
        layer_types=SHARED_KEYS,
        num_global_key_value_heads=2,
        num_kv_shared_layers=4,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
    ),
    "gemma4_moe": gemma4(
        num_hidden_layers=6,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=64,
    ),
    "gemma4_unified": Family(
        config="Gemma4UnifiedConfig",
        text="gemma4_unified_text",
        options=dict(text_config=sizes(num_hidden_layers=6, **GEMMA4_TEXT), vision_config=None, audio_config=None),
        model="Gemma4UnifiedForConditionalGeneration",
    ),
    "mistral3": mistral3("mistral", sliding_window=None),
    "mistral3_ministral3": mistral3("ministral3", rope_parameters=SCALED_QUERIES),
    "muse_glimmer": Family(
        config="MuseGlimmerConfig",
        text="muse_glimmer_text",
        options=dict(
            text_config=sizes(
                num_hidden_layers=4,
                head_dim=16,
                sliding_window=WINDOW,
                final_logit_softcapping=3.0,
                output_multiplier=0.5,
                qk_scale_factor=2.5,
            ),
            vision_config=MUSE_VISION,
            out_hidden_size=128,
            projector_hidden_size=32,
        ),
        model="MuseGlimmerForConditionalGeneration",
    ),
    "qwen2_5_vl": Family(
        config="Qwen2_5_VLConfig",
        text="qwen2_5_vl_text",
        options=dict(
            text_config=sizes(rope_parameters=rope(mrope_section=[2, 3, 3])),
            vision_config=dict(fullatt_block_indexes=[0], window_size=16, **QWEN_VISION),
            **QWEN_TOKENS,
        ),
        model="Qwen2_5_VLForConditionalGeneration",
    ),
    "qwen3_vl": Family(
        config="Qwen3VLConfig",
        text="qwen3_vl_text",
        options=dict(
            text_config=sizes(
                head_dim=32,
                rope_parameters=rope(mrope_section=[8, 4, 4], mrope_interleaved=True),
                tie_word_embeddings=True,
            ),
            vision_config=dict(deepstack_visual_indexes=[0], **QWEN3_VISION),
            tie_word_embeddings=True,
            **QWEN_TOKENS,
        ),
        model="Qwen3VLForConditionalGeneration",
    ),
    "qwen3_5": Family(
        config="Qwen3_5Config",
        text="qwen3_5_text",
        options=dict(
            text_config=sizes(rope_parameters=INTERLEAVED, tie_word_embeddings=True, **DELTA),
            vision_config=QWEN3_VISION,
            tie_word_embeddings=True,
            **QWEN_TOKENS,
        ),
        model="Qwen3_5ForConditionalGeneration",
    ),
    "qwen3_5_moe": Family(
        config="Qwen3_5MoeConfig",
        text="qwen3_5_moe_text",
        options=dict(
            text_config=sizes(rope_parameters=INTERLEAVED, **DELTA, **SHARED_EXPERTS),
            vision_config=QWEN3_VISION,
            **QWEN_TOKENS,
        ),
        model="Qwen3_5MoeForConditionalGeneration",
    ),
}
