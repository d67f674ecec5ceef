"""A trained model's folder: what transformers makes of it."""

import numpy as np
import torch
import transformers

from qlora_jax.io.hf import load_model
from qlora_jax.io.save import write_model
from qlora_jax.quant.rules import rules_for


def test_transformers_loads_the_weights_in_the_dtype_that_they_were_trained_in(checkpoint, tmp_path):
    source = checkpoint(dtype="bfloat16")
    model = load_model(source, dtype="float32", rules=rules_for("none")).model
    # Half of bfloat16's spacing at 1: lost where the configuration still says bfloat16.
    value = np.full(model.norm.weight.get_value().shape, 1 + 2**-9, np.float32)
    model.norm.weight.set_value(value)
    write_model(model, tmp_path / "model", source)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.dtype == torch.float32
    np.testing.assert_array_equal(loaded.model.norm.weight.detach().numpy(), value)
