"""Gradients of adapters against torch's through PEFT, for one family of each kind of block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qlora_jax.io.peft import TrainedOn, read_adapter, write_adapter
from tests.families import ours
from tests.families.table import families

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("tests.families.theirs")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@functools.partial(jax.jit, static_argnums=0)
def _gradients(graph, trained, rest, tokens, weights):
    def value(trained):
        return jnp.sum(nnx.merge(graph, trained, rest)(tokens) * weights)

    return jax.grad(value)(trained)


def our_gradients(subject, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Of Σ logits · weights, by the names that PEFT's file has for what they are of."""
    adapter = read_adapter(subject.adapter)
    graph, trained, rest = nnx.split(ours.load(subject.folder, adapter=subject.adapter).model, nnx.Param, ...)
    found = _gradients(graph, trained, rest, jnp.asarray(subject.reference.tokens, jnp.int32), weights)
    out = subject.scratch / "gradients"
    write_adapter(out, nnx.merge(graph, found, rest), adapter.lora, adapter.targets, TrainedOn("base"))
    return load_file(out / "adapter_model.safetensors")


def their_gradients(subject, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The same by torch."""
    model = theirs.adapted(subject.folder, subject.adapter, is_trainable=True)
    logits = model(input_ids=torch.from_numpy(subject.reference.tokens)).logits
    (logits * torch.from_numpy(weights)).sum().backward()
    return {name: value.grad.numpy() for name, value in theirs.adapter_tensors(model).items()}


@pytest.mark.parametrize("subject", families("gradients"), indirect=True, scope="session")
def test_gradients_of_adapters(subject, measured):
    weights = np.random.default_rng(0).standard_normal(subject.reference.logits.shape, np.float32)
    found, expected = our_gradients(subject, weights), their_gradients(subject, weights)
    assert found.keys() == expected.keys()
    largest = max(np.abs(value).max() for value in expected.values())
    worst = 0.0
    for name, value in expected.items():
        assert np.abs(value).max() > 1e-4 * largest, name
        worst = max(worst, ours.off(found[name], value))
    assert worst < ours.CLOSE
    measured(worst)
