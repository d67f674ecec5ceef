"""Every family's weights in 4 bits and its arithmetic in 16, against the same weights unpacked and transformers."""

from typing import Any

import numpy as np
import pytest

from qlora_jax.models.decoder import Decoder
from qlora_jax.models.table import table
from qlora_jax.quant.nf4 import NF4Tensor, dequantize, quantize
from qlora_jax.quant.packed import is_packed
from qlora_jax.quant.rules import UNPACKED, rules_for
from tests.families import checkpoints, ours
from tests.families.table import families, has_experts

pytest.importorskip("torch")
theirs = pytest.importorskip("tests.families.theirs")

# The matrices of layers that are never packed: routers, gates of few outputs, convolutions.
WHOLE = {
    *("mlp.gate.weight", "mlp.router.weight", "beside.router.proj.weight", "mlp.shared_expert_gate.weight"),
    *("linear_attn.in_proj_a.weight", "linear_attn.in_proj_b.weight", "linear_attn.in_proj_ba.weight"),
    *("linear_attn.conv1d.weight", "conv.conv.weight", "feed_forward.gate.weight"),
}
# The root of 2, for two results that are rounded independently, and a half for chance.
ROUNDED_APART = 1.5 * 2**0.5


def every(check: str):
    return pytest.mark.parametrize("subject", families(check), indirect=True, scope="session")


def variable(model: Decoder, path: str) -> Any:
    """The variable of a parameter."""
    found: Any = model
    for step in path.split("."):
        found = getattr(found, step)
    return found


def simulated(subject, packed: Decoder, dtype: str) -> np.ndarray:
    """Logits of a model without packed weights, of which those that `packed` holds in NF4 went through it."""
    model = ours.load(subject.folder, rules=UNPACKED).model
    for path in table(model.config):
        if isinstance(variable(packed, path).get_value(), NF4Tensor):
            weight = variable(model, path)
            matrices = np.array(weight.get_value())
            for place in np.ndindex(matrices.shape[:-2]):
                matrices[place] = dequantize(quantize(matrices[place], dtype=dtype))
            weight.set_value(matrices)
    return ours.logits(model, subject.reference)


@every("NF4")
def test_nf4_is_what_it_stands_for(subject, measured):
    model = ours.load(subject.folder, rules=rules_for("nf4")).model
    whole, packed = set(), set()
    for path, param in table(model.config).items():
        assert is_packed(variable(model, path).get_value()) == (param.role in ("projection", "expert")), path
        if param.stacked and len(param.shape) > 1:
            (packed if param.matrix else whole).add(path.split(".", 1)[1])
    assert whole <= WHOLE and not packed & WHOLE
    found = ours.logits(model, subject.reference)
    assert ours.off(found, subject.plain_logits) > 0.01
    measured(off := ours.off(found, simulated(subject, model, "float32")))
    assert off < 1e-5


@every("4-bit")
def test_a_4_bit_folder_is_the_nf4_model(subject, measured):
    """Its weights are those of a model that is packed here, but for what they are dequantized to, bfloat16."""
    packed = ours.load(subject.folder, rules=rules_for("nf4")).model
    measured(off := ours.off(subject.unpacked_logits, simulated(subject, packed, "bfloat16")))
    assert off < 1e-5


@every("bnb4")
def test_bitsandbytes_unpacks_our_folder(subject, measured):
    model = theirs.dequantized(subject.packed, subject.folder)
    measured(off := ours.off(subject.unpacked_logits[:2], theirs.logits(model, subject.reference.tokens)))
    assert off < ours.CLOSE


@every("bf16")
def test_16_bits_are_as_close_as_transformers_own(subject, measured):
    """transformers' two kinds of attention round differently; or, where that shows little, as two roundings would.

    The furthest tenth of the tokens is left out. With experts it is half of them: a token that is nearly as likely to
    go to another expert may go there, in any arithmetic, and so may those that see it.
    """
    import torch

    found = ours.logits(ours.load(subject.folder, dtype="bfloat16").model, subject.reference)[:2]
    tokens, options = subject.reference.tokens, dict(dtype=torch.bfloat16)
    eager = theirs.logits(checkpoints.load(subject.folder, **options), tokens)
    share = 0.5 if has_experts(subject.name) else 0.9
    spread = 0.0
    if checkpoints.class_of(subject.folder)._supports_sdpa:
        sdpa = theirs.logits(checkpoints.load(subject.folder, attn_implementation="sdpa", **options), tokens)
        spread = ours.apart(sdpa, eager, share)
    rounding = ours.apart(eager, subject.reference.logits, share)
    off, allowed = ours.apart(found, eager, share), max(2 * spread, ROUNDED_APART * rounding)
    measured(f"{off:.0e} of {allowed:.0e}")
    assert 0 < off <= allowed
