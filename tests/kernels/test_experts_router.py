"""Routers and the load-balancing loss against transformers' own modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from qlora_jax.kernels.experts.router import balance, balance_loss, sigmoid_top_k, softmax_top_k, top_k_softmax

torch = pytest.importorskip("torch")
T, E, D, SCALE = 23, 16, 8, 2.5
LOGITS = np.random.default_rng(0).normal(0, 2, (T, E)).astype(np.float32)
CORRECTION = np.random.default_rng(1).normal(0, 0.5, E).astype(np.float32)
SIZES = dict(num_experts_per_tok=4, num_local_experts=E, num_experts=E, hidden_size=E)


def same(routed, weights, experts):
    """Equal as sets of (expert, weight): transformers leaves the order of some open."""
    assert routed.weights.dtype == jnp.float32 and routed.experts.dtype == jnp.int32
    ours, theirs = (
        np.stack([np.sort(e, 1), np.take_along_axis(w, np.argsort(e, 1), 1)])
        for w, e in ((np.asarray(routed.weights), np.asarray(routed.experts)), (weights.numpy(), experts.numpy()))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def theirs(module, kind, config):
    """(weights, experts) of a router of theirs whose logits are LOGITS."""
    import importlib

    router = getattr(importlib.import_module(f"transformers.models.{module}"), kind)(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias.copy_(torch.from_numpy(CORRECTION))
        return router(torch.from_numpy(LOGITS))[1:]


@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_of_all(renormalize):
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(**SIZES, norm_topk_prob=renormalize)
    expected = theirs("qwen3_moe.modeling_qwen3_moe", "Qwen3MoeTopKRouter", config)
    same(softmax_top_k(jnp.asarray(LOGITS), 4, renormalize=renormalize), *expected)


def test_softmax_of_the_chosen():
    from transformers import GptOssConfig

    config = GptOssConfig(**SIZES)
    same(top_k_softmax(jnp.asarray(LOGITS), 4), *theirs("gpt_oss.modeling_gpt_oss", "GptOssTopKRouter", config))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (8, 3)])
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_sigmoid_with_a_correction_and_groups(family, groups, renormalize):
    import transformers

    name, kind = {"glm4_moe": ("Glm4Moe", "Glm4MoeTopkRouter"), "deepseek_v3": ("DeepseekV3", "DeepseekV3TopkRouter")}[
        family
    ]
    config = getattr(transformers, f"{name}Config")(
        **SIZES, n_routed_experts=E, n_group=groups[0], topk_group=groups[1], norm_topk_prob=renormalize,
        routed_scaling_factor=SCALE,
    )  # fmt: skip
    expected = theirs(f"{family}.modeling_{family}", kind, config)
    options = dict(correction=jnp.asarray(CORRECTION), groups=groups, renormalize=renormalize, scaling=SCALE)
    same(sigmoid_top_k(jnp.asarray(LOGITS), 4, **options), *expected)


def test_each_experts_own_scale():
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    router = Gemma4TextRouter(Gemma4TextConfig(hidden_size=D, num_experts=E, top_k_experts=4))
    x, scale = torch.randn(T, D), torch.rand(E) + 0.5
    with torch.no_grad():
        router.proj.weight.normal_()
        router.per_expert_scale.copy_(scale)
        _, weights, experts = router(x)
        logits = router.proj(router.norm(x) * router.scale * router.scalar_root_size)
    ours = softmax_top_k(jnp.asarray(logits.numpy()), 4, renormalize=True, expert_scale=jnp.asarray(scale.numpy()))
    same(ours, weights, experts)


def test_derivatives_of_the_weights():
    """By differences: the choice is a step, everything else is smooth."""
    for route in (
        lambda z: softmax_top_k(z, 4, renormalize=True).weights,
        lambda z: top_k_softmax(z, 4).weights,
        lambda z: sigmoid_top_k(z, 4, correction=jnp.asarray(CORRECTION), groups=(4, 2), renormalize=True).weights,
    ):
        check_grads(
            lambda z, route=route: route(jnp.asarray(z)), (LOGITS[:3],), order=1, modes=["rev"], atol=0.01, rtol=0.01
        )


def test_groups_that_do_not_fit():
    with pytest.raises(ValueError, match="experts=16 in groups=5 of which used=2: expected equal groups"):
        sigmoid_top_k(jnp.asarray(LOGITS), 4, correction=jnp.zeros(E), groups=(5, 2), renormalize=True)


@pytest.mark.parametrize("masked", [False, True])
def test_the_balancing_loss_and_its_derivative(masked):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    layers = np.random.default_rng(2).normal(0, 1, (3, 2, 5, E)).astype(np.float32)
    counted = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]) if masked else None
    gates = tuple(torch.tensor(layer.reshape(-1, E), requires_grad=True) for layer in layers)
    expected = load_balancing_loss_func(gates, E, 4, None if counted is None else torch.tensor(counted))
    expected.backward()

    @jax.value_and_grad
    def ours(layers):
        mask = None if counted is None else jnp.asarray(counted.reshape(-1), bool)
        sums = [balance(layer.reshape(-1, E), 4, mask) for layer in layers]
        return balance_loss(jax.tree.map(lambda *a: sum(a), *sums))

    loss, gradient = ours(jnp.asarray(layers))
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    their_gradient = np.stack([gate.grad.numpy() for gate in gates]).reshape(layers.shape)
    np.testing.assert_allclose(gradient, their_gradient, rtol=1e-4, atol=1e-8)


def test_what_does_not_count_may_be_nan():
    logits = jnp.asarray(LOGITS).at[-1].set(jnp.nan)
    counted = jnp.arange(T) < T - 1
    loss, gradient = jax.value_and_grad(lambda z: balance_loss(balance(z, 4, counted)))(logits)
    np.testing.assert_allclose(loss, balance_loss(balance(logits[:-1], 4)), rtol=1e-6)
    assert float(balance_loss(balance(logits, 4, counted & False))) == 0
    assert bool(jnp.isfinite(gradient[:-1]).all())
