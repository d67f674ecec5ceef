"""The stated number of operations is what the traced step contains."""

import math

import jax
import pytest
from flax import nnx
from jax.extend import core

from benchmarks.gpu.flops import forward_flops, train_flops
from qlora_jax.config import LoraSection, Pieces, QuantSection
from qlora_jax.io.build import abstract_model
from qlora_jax.models.adapters import add_adapters
from qlora_jax.objective.sft import next_token_loss
from qlora_jax.quant.rules import packed
from tests.tiny_config import windowed

CONFIG = windowed(0, 0, 0)
BATCH, LENGTH, CHUNK, RANK = 2, 24, 16, 4


def products(jaxpr: core.Jaxpr) -> int:
    """2·M·N·K of every dot_general, those inside a scan as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contract)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(products(inner) for inner in inner_jaxprs(equation))
    return total


def inner_jaxprs(equation):
    for name, value in equation.params.items():
        if name not in ("fwd_jaxpr_thunk", "bwd"):
            for item in value if isinstance(value, tuple | list) else [value]:
                if hasattr(item, "jaxpr") or hasattr(item, "eqns"):
                    yield getattr(item, "jaxpr", item)


def traced(*, grad: bool, targets):
    """The traced loss or its gradient, and the adapters' targets. Attention as a whole square: that is what it runs."""
    model = abstract_model(CONFIG, rules=packed(QuantSection()))
    found = add_adapters(model, LoraSection(rank=RANK, targets=targets), jax.random.key(0)) if targets else {}
    graphdef, adapters, base = nnx.split(model, nnx.Param, ...)
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), "int32")

    def loss(adapters, base, tokens):
        merged = nnx.merge(graphdef, adapters, base)
        hidden = merged.hidden(tokens, pieces=Pieces(remat="full" if grad else "none"))
        return next_token_loss(hidden, tokens, tokens >= 0, merged.logits, chunk=CHUNK)

    function = jax.grad(loss, has_aux=True) if grad else loss
    return jax.make_jaxpr(function)(adapters, base, tokens), found


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_a_train_step_executes_what_is_stated(targets):
    jaxpr, found = traced(grad=True, targets=targets)
    assert products(jaxpr.jaxpr) == train_flops(CONFIG, found, BATCH, LENGTH, CHUNK, share=1)


def test_a_forward_pass_executes_what_is_stated():
    jaxpr, _ = traced(grad=False, targets=None)
    assert products(jaxpr.jaxpr) == forward_flops(CONFIG, BATCH, LENGTH, CHUNK, share=1)


def test_the_causal_half_is_what_is_reported():
    whole = forward_flops(CONFIG, BATCH, LENGTH, CHUNK, share=1)
    square = 4 * BATCH * LENGTH**2 * CONFIG.num_layers * 64
    assert whole - forward_flops(CONFIG, BATCH, LENGTH, CHUNK) == square / 2
