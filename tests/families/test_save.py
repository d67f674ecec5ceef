"""A full fine-tune's folder, of models that are more than a stack of equal layers."""

import numpy as np
import pytest

from qlora_jax.io.hf import load_model
from qlora_jax.io.save import write_model
from tests.families.checkpoints import read_reference

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")


# A wrapper with a tower and layers of several kinds, experts in a checkpoint's own way, and a corrected router.
@pytest.mark.parametrize("name", ["qwen3_5", "gpt_oss", "glm4_moe"])
def test_transformers_loads_every_tensor(name, checkpoint, tmp_path):
    folder = checkpoint(name)
    write_model(load_model(folder, dtype="float32").model, tmp_path / "saved", folder)
    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    model, report = kind.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    reference = read_reference(folder)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(np.asarray(reference.tokens))).logits.numpy()
    np.testing.assert_allclose(logits, reference.logits, atol=1e-4 * np.abs(reference.logits).max())
