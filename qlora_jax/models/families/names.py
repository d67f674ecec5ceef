"""Where a checkpoint keeps the language model: on its own, or as a part of a model of images, sounds and text."""

from collections.abc import Collection

from qlora_jax.models.names import Names

# Where the decoder lies in transformers: on its own, and in a wrapper.
ALONE, WRAPPED = "model", "model.language_model"
# Where checkpoints keep it, of either kind and every age.
DECODERS = ("model.language_model", "language_model.model", "model")
HEADS = ("lm_head.weight", "language_model.lm_head.weight")
# Towers for images and sounds, what leads from them to the language model, and heads for several tokens at once.
_OTHERS = (
    *("visual", "vision_tower", "vision_model", "vision_adapter", "vision_projection", "audio_tower", "embed_audio"),
    *("embed_vision", "multi_modal_projector", "vision_embedder"),
)
# The modules of transformers that they are, for settings that name modules.
OTHER_MODULES = tuple(f"{prefix}{name}" for name in _OTHERS for prefix in ("model.", ""))
OTHER_PARTS = (*(f"{prefix}{name}." for name in _OTHERS for prefix in ("", "model.")), "mtp.")


def names_in(names: Names, *, wrapped: bool, architecture: str, found: Collection[str]) -> Names:
    """A family's names as a checkpoint has them.

    Args:
      wrapped: whether config.json is of a model of more than text.
      architecture: the class that config.json names; its adapters carry that class's names.
      found: the checkpoint's tensors; none where there are no weights to look at.
    """
    decoder = WRAPPED if wrapped and "ForCausalLM" not in architecture else ALONE
    stored = next((one for one in DECODERS if any(name.startswith(f"{one}.layers.") for name in found)), decoder)
    head = next((one for one in HEADS if one in found), HEADS[0])
    files = [(HEADS[0], head)] if head != HEADS[0] else []
    passed = OTHER_PARTS if wrapped else ()
    experts = names.experts
    if any(".experts." in name for name in found):
        fused = any(name.endswith(".experts.gate_up_proj") for name in found)
        joint = any(".experts.0.gate_up_proj." in name for name in found)
        experts = "fused" if fused else "joint" if joint else "each"
    return names._replace(
        decoder=decoder,
        stored="" if stored == decoder else stored,
        experts=experts,
        files=(*names.files, *files),
        passed=(*names.passed, *passed),
    )
