"""The load-balancing loss of experts, as transformers adds it where a configuration asks for it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraSection, Pieces
from qlora_jax.io.hf import load_model
from qlora_jax.models.adapters import add_adapters
from qlora_jax.objective import SFT
from tests.families.checkpoints import load, make

torch = pytest.importorskip("torch")
LENGTH, PADDED = 24, 5


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def folder(request, tmp_path_factory):
    """A checkpoint whose configuration asks for the loss, with a factor that shows."""
    made = make(tmp_path_factory.mktemp("balance"), request.param)
    settings = json.loads((made / "config.json").read_text())
    settings |= {"output_router_logits": True, "router_aux_loss_coef": 0.7}
    (made / "config.json").write_text(json.dumps(settings))
    return made


def batch(vocab: int) -> dict[str, jax.Array]:
    tokens = np.random.default_rng(0).integers(20, vocab, (2, LENGTH)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[1, -PADDED:] = 0
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    arrays = {"tokens": tokens, "segment_ids": segments, "positions": positions, "scored": segments > 0}
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def test_the_loss_is_that_of_transformers(folder):
    model = load_model(folder, dtype="float32").model
    arrays = batch(model.config.vocab_size)
    objective = SFT()
    measured = objective.measure(model, arrays, Pieces(remat="none"))
    ours = measured.total / objective.weight(measured.sums)
    labels = torch.tensor(np.where(arrays["scored"], arrays["tokens"], -100), dtype=torch.long)
    with torch.no_grad():
        theirs = load(folder)(
            input_ids=torch.tensor(np.array(arrays["tokens"]), dtype=torch.long),
            attention_mask=torch.tensor(np.array(arrays["segment_ids"]), dtype=torch.long),
            labels=labels,
        )
    assert float(theirs.aux_loss) * 0.7 > 0.1
    np.testing.assert_allclose(ours, theirs.loss, rtol=2e-5)
    # What is reported is the loss of the tokens alone.
    alone = objective.metrics(measured.sums)["loss"]
    np.testing.assert_allclose(alone, theirs.loss - 0.7 * theirs.aux_loss, rtol=2e-5)


def test_adapters_feel_it_however_layers_are_recomputed(folder, tmp_path):
    def gradients(source, remat):
        model = load_model(source, dtype="float32").model
        add_adapters(model, LoraSection(rank=2, targets=("q_proj",)), jax.random.key(0))
        graphdef, trained, base = nnx.split(model, nnx.Param, ...)
        arrays = batch(model.config.vocab_size)

        def total(trained):
            return SFT().measure(nnx.merge(graphdef, trained, base), arrays, Pieces(remat=remat)).total

        return jax.tree.leaves(jax.jit(jax.grad(total))(trained))

    without = shutil.copytree(folder, tmp_path / "without")
    settings = json.loads((without / "config.json").read_text())
    (without / "config.json").write_text(json.dumps(settings | {"output_router_logits": False}))
    whole, again, plain = gradients(folder, "none"), gradients(folder, "full"), gradients(without, "none")
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(a).max() + 1e-9))
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(whole, plain, strict=True)) > 1e-3
