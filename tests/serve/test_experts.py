"""Adapters of experts, and of the small linear layers that are never packed, in one batch with others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import random_adapters
from qlora_jax.io.hf import load_model
from qlora_jax.io.peft import attach_adapter, read_adapter
from qlora_jax.quant.rules import rules_for
from qlora_jax.serve import programs
from qlora_jax.serve.adapters.reading import Limits, read_checked
from qlora_jax.serve.request import Refused
from qlora_jax.serve.runner import empty_stacks, served
from tests.serve.parts import alone, answer, ask, loaded_base, make_engine, prompt, write_random_adapter

pytest.importorskip("transformers")

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
ADAPTERS = {
    "experts": dict(rank=2, targets=EXPERTS),
    "both": dict(rank=3, targets=("q_proj", "shared_expert_gate", *EXPERTS), rank_pattern={"gate_up_proj": 4}),
    "down": dict(rank=1, targets=EXPERTS[1:], variant="rslora"),
    "attention": dict(rank=8, targets=("q_proj", "o_proj")),
    "one-layer": dict(rank=2, targets=("model.layers.1.mlp.experts.down_proj",)),
}


@pytest.fixture(scope="module")
def base(family):
    return family("qwen2_moe")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters-of-experts")
    for seed, (name, lora) in enumerate(ADAPTERS.items(), start=1):
        write_random_adapter(folder / name, base, seed, **lora)
    return folder


@pytest.fixture(scope="module")
def engine(base, adapters):
    engine = make_engine(base, adapters, max_expert_rank=4)
    engine.start()
    yield engine
    engine.close()


def test_a_mixed_batch_equals_each_adapter_alone(engine, base, adapters):
    """Five adapters and the base on four rows and three places of the device."""
    names = [None, *ADAPTERS]
    asked = {name: ask(engine, prompt(seed, 5 + 3 * seed), name, new=6) for seed, name in enumerate(names)}
    for seed, name in enumerate(names):
        assert asked[name].finished().reason == "length", name
        model = alone(base, None if name is None else adapters / name)
        expected = model.generate([prompt(seed, 5 + 3 * seed)], max_new_tokens=6)[0]
        assert asked[name].ids == expected, name
    assert len({tuple(answer(engine, prompt(1), name, new=6)) for name in names}) == len(names)
    assert engine.view().counters["evictions"] > 0


def test_the_memory_of_experts_adapters_is_counted(engine, base, adapters):
    """Three layers and eight experts, three places and the base's, in float32; nothing where they are not asked for."""
    without = make_engine(base, adapters)
    more = [one._scheduler.runner.needs.adapters for one in (engine, without)]
    without.close()
    gate_up, down = 4 * (64 + 128), 4 * (64 + 64)
    assert more[0] - more[1] == 4 * 3 * 4 * (8 * (gate_up + down) + 2)


def limits_of(folder, **changes):
    loaded = loaded_base(folder)
    fields = dict(rank=8, nbytes=10**7, dtype="float32", base_hash=loaded.content_hash, quantization=None)
    return Limits(config=loaded.model.config, **{**fields, **changes})


@pytest.mark.parametrize(("most", "words"), [(0, "at most 0 is served"), (3, "rank on experts is 4, at most 3")])
def test_ranks_on_experts_have_a_limit_of_their_own(base, adapters, most, words):
    with pytest.raises(Refused, match=rf"adapter 'both': .*{words}.*: start with a larger max_expert_rank"):
        read_checked("both", adapters / "both", limits_of(base, expert_rank=most))
    read_checked("attention", adapters / "attention", limits_of(base, expert_rank=most))


SMALL = {
    "gemma4_moe": dict(rank=2, targets=("router.proj", "v_proj", *EXPERTS)),
    "qwen3_5_text": dict(rank=2, targets=("in_proj_a", "in_proj_b", "q_proj")),
    "gemma4_e": dict(rank=2, targets=("per_layer_model_projection", "per_layer_input_gate")),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_linear_layer_takes_adapters(family, tmp_path, name):
    """Three rows: the base, an adapter, another one."""
    loaded = load_model(family(name), dtype="float32", rules=rules_for("none"))
    folders = [tmp_path / str(seed) for seed in (1, 2)]
    for seed, folder in enumerate(folders, start=1):
        # Routing is steep: a large adapter of a router would show rounding.
        random_adapters.write_random_adapter(folder, loaded, seed, size=0.1, record={"method": "lora"}, **SMALL[name])
    config = loaded.model.config
    limits = Limits(
        config=config, rank=2, expert_rank=2, nbytes=10**7, dtype="float32", base_hash=None, quantization=None
    )
    graphdef, state = nnx.split(loaded.model)
    stacks = empty_stacks(served(config, 2, 2), 3, "float32")
    for slot, folder in enumerate(folders, start=1):
        held = read_checked(folder.name, folder, limits).weights
        assert len(held) >= len(SMALL[name]["targets"])
        for path, weights in held.items():
            stacks[path] = programs.install(stacks[path], slot, *map(jnp.asarray, weights))
    tokens = jnp.asarray(np.random.default_rng(0).integers(20, 200, (3, 7)), jnp.int32)

    @jax.jit
    def together(state, stacks, tokens):
        return programs.with_adapters(graphdef, (state,), stacks, jnp.arange(3))(tokens)

    found = together(state, stacks, tokens)
    for row, folder in enumerate([None, *folders]):
        if folder is not None:
            attach_adapter(loaded.model, read_adapter(folder), base_hash=None)
        expected = jax.jit(lambda model, tokens: model(tokens))(loaded.model, tokens[row : row + 1])
        np.testing.assert_allclose(found[row], expected[0], rtol=1e-3, atol=2e-4 * float(jnp.abs(expected).max()))
    assert not np.allclose(found[1], found[2], atol=1e-2)
