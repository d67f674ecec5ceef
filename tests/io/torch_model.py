"""What transformers makes of a folder."""

import numpy as np
import torch
import transformers

TOKENS = [[3, 17, 42, 5, 88, 9, 61]]


def load(folder, **options):
    """transformers' model of a folder, in float32 unless told otherwise."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def logits(model) -> np.ndarray:
    """float32 logits of TOKENS from a torch model."""
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.float().numpy()
