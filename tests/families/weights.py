"""Random weights in which every option of a model shows."""

import re

# (what a parameter's name ends with, mean, standard deviation); the first that fits. Without a mean, noise is added to
# what transformers initialises: norms' weights are near 1 or, where a family adds 1 to them, near 0.
RULES = (
    (r"\.A_log", -1.0, 1.0),  # slow decay: what stands many tokens back is still noticed
    (r"\.dt_bias", 0.0, 0.5),
    (r"\.sinks", 1.0, 1.0),
    (r"\.(e_score_correction_bias|expert_bias)", 0.0, 0.3),
    (r"[._]bias", 0.0, 0.2),
    (r"\.experts\.(gate_up_proj|down_proj)", 0.0, 0.15),
    (r"(router|\.gate)(\.proj)?\.weight", 0.0, 0.3),
    (r"", None, 0.2),
)


def spread(model, seed: int) -> None:
    """Draws biases, norms, routers, experts and the like anew; matrices stay as transformers drew them."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for path, value in model.state_dict().items():
            mean, deviation = next((m, d) for end, m, d in RULES if re.search(f"{end}$", path))
            if not value.is_floating_point() or (mean is None and value.ndim > 1):
                continue
            noise = torch.randn(value.shape, generator=generator) * deviation
            value.copy_((value if mean is None else mean) + noise)
