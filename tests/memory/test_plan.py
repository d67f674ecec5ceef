"""The arithmetic of a plan: exact where it can be, near the compiler's peak elsewhere, and what it advises."""

import json
from pathlib import Path

import jax
import pytest

from qlora_jax.config import Config, LoraSection, ModelSection, TrainSection, load_config
from qlora_jax.io.hf import read_config
from qlora_jax.memory import advice
from qlora_jax.memory.advice import Change, candidates, changed, changes, largest, largest_batch, longest_sequence
from qlora_jax.memory.plan import Planner, plan
from qlora_jax.memory.targets import GPUS, Card, find_card
from qlora_jax.memory.train_step import abstract_train_step

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "base" / "config.json"
GEOMETRY = read_config(DEMO)
STORED = json.loads((ROOT / "benchmarks" / "results" / "compiled-memory.json").read_text())


# An LFM2, but for its layers.
HYBRID = dict(
    model_type="lfm2",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    block_auto_adjust_ff_dim=False,
)


def tiny(*overrides: str) -> Config:
    """Two rows of 64 tokens through the demo's base."""
    config = Config(
        model=ModelSection(weights="random", geometry=str(DEMO), dtype="fp32"),
        lora=LoraSection(rank=4),
        train=TrainSection(steps=3, batch_size=2, grad_accum=2, seq_len=64),
    )
    return changed(config, overrides)


def shipped(name: str) -> tuple:
    config = load_config(ROOT / "configs" / f"{name}.py")
    return config, read_config(Path(config.model.geometry))


# --- the arithmetic


def test_every_part_of_the_7b_config():
    """Llama-2-7B's sizes by hand: 32 layers, width 4096, 11008 inside, 32000 tokens; rank 8 on two projections."""
    projections = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    table = 32000 * 4096  # the output layer in int8; the embedding, as large, is in host memory
    matrices = 32 * 7
    adapters = 32 * 2 * (8 * 4096 + 4096 * 8)
    parts = plan(*shipped("7b")).parts()
    del parts["largest_temporary"]
    residual = parts.pop("activations")
    assert parts == {
        "codes": projections // 2 + table,
        # One byte for 64 weights, four for 256 of those; a map of 256 levels and an offset for each matrix.
        "scales": projections // 64 + projections // 64 // 256 * 4 + matrices * 257 * 4 + 32000 * 4,
        "weights": 0,
        "embeddings": 0,
        "norms": (2 * 32 + 1) * 4096 * 2,
        "adapters": adapters * 4 + 2 * 32 * 4,
        "optimizer": 2 * adapters * 4 + 2 * 4,  # two moments, and the steps counted by Adam and by the schedule
        "batch": 16 * 512 * (3 * 4 + 1 + 4096 * 2),  # ids, places, which are scored, and the embedding's rows
        "gradients": adapters * 4,
    }
    inputs = 32 * 512 * 4096 * 2  # of every layer, in bf16
    assert inputs <= residual < 1.01 * inputs


@pytest.mark.parametrize(
    "overrides",
    [
        ("quant.double=false", "quant.embedding=nf4", "lora.dropout=0.1"),
        ("quant.embedding=int8", "train.vocab_chunk=512"),
        ("method=lora", "lora.targets=q_proj"),
        ("method=full", "optim.clip=0"),
        ("optim.moments=bf16", "optim.gradients=bf16"),
        ("optim.moments=bf16", "optim.offload=host"),
    ],
    ids=",".join,
)
def test_what_lies_between_steps_is_exactly_what_the_compiled_step_takes(overrides):
    config = tiny(*overrides)
    step, arguments = abstract_train_step(config)
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    compiled = step.lower(*arguments).compile(compiler_options=fast)
    assert plan(config, GEOMETRY).arguments == compiled.memory_analysis().argument_size_in_bytes


@pytest.mark.parametrize("row", STORED["rows"], ids=lambda row: row["config"])
def test_the_shipped_configs_are_within_a_tenth_of_the_compiled_peak(row):
    arithmetic = plan(*shipped(row["config"]))
    assert arithmetic.arguments == row["arguments"]
    assert arithmetic.peak == pytest.approx(row["peak"], rel=0.1)


def test_parts_add_up_to_the_peak():
    one = plan(tiny(), GEOMETRY)
    assert sum(one.parts().values()) == one.peak
    assert one.peak - one.arguments == one.gradients + one.activations + one.largest_temporary


def test_the_loss_may_be_the_largest_temporary():
    one = plan(tiny("train.loss_chunk=128"), GEOMETRY)
    assert one.logits > one.layer
    assert one.largest_temporary == one.logits
    assert one.logits >= 128 * GEOMETRY.vocab_size * 4


def test_activations_grow_with_rows_and_with_what_is_not_computed_again():
    planner = Planner(tiny(), GEOMETRY)
    assert planner.at(6, 64).activations == 6 * planner.at(1, 64).activations
    full, none = (Planner(tiny(f"train.remat={name}"), GEOMETRY).at(1, 64).activations for name in ("full", "none"))
    assert none > 5 * full > 0


def test_each_layer_of_a_unit_keeps_its_input(tmp_path):
    """Two kinds of mixers in turn: what a scan over pairs of layers stacks is in the layers, not in the loss."""
    geometry = dict(HYBRID, layer_types=["conv", "full_attention"] * 2, num_hidden_layers=4)
    (tmp_path / "config.json").write_text(json.dumps(geometry))
    config = tiny(f"model.geometry={tmp_path / 'config.json'}")
    one = plan(config, read_config(tmp_path / "config.json"))
    inputs = 4 * 2 * 64 * HYBRID["hidden_size"] * 4
    assert inputs <= one.activations < 1.1 * inputs


def test_what_is_offloaded_lies_in_the_hosts_memory():
    here, there = (plan(tiny(f"train.remat={name}"), GEOMETRY) for name in ("full", "offload"))
    inputs = GEOMETRY.num_layers * 2 * 64 * GEOMETRY.hidden_size * 4
    assert (here.host, there.host) == (0, inputs)
    assert here.activations - there.activations == inputs == here.peak - there.peak
    assert "host" not in there.parts()


def test_storage_of_the_optimizer():
    wide, narrow, paged = (
        plan(tiny(*overrides), GEOMETRY)
        for overrides in [(), ("optim.moments=bf16", "optim.gradients=bf16"), ("optim.offload=host",)]
    )
    count, counters = wide.gradients // 4, 2 * 4
    assert (wide.optimizer, narrow.optimizer, paged.optimizer) == (8 * count + counters, 6 * count + counters, 0)
    assert (wide.gradients, narrow.gradients, paged.gradients) == (4 * count, 2 * count, 4 * count)
    # Each page has counters of its own, which lie on the device but are too few to be counted.
    assert (wide.host, narrow.host) == (0, 0)
    assert paged.host == 8 * count


def test_an_mlp_in_chunks_of_tokens_needs_less():
    whole, chunked = (plan(tiny(f"train.mlp_chunk={chunk}", "train.seq_len=1024"), GEOMETRY) for chunk in (0, 128))
    assert chunked.layer < whole.layer and chunked.arguments == whole.arguments


def test_nothing_is_allocated():
    """A plan of 65B on a laptop is shapes only: no array as large as a layer's adapter is made."""
    before = {id(array) for array in jax.live_arrays()}
    step, arguments = abstract_train_step(shipped("65b")[0])
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(arguments))
    assert sum(array.nbytes for array in jax.live_arrays() if id(array) not in before) < 10_000


# --- advice


def test_candidates_come_with_the_least_harm_first():
    config = tiny("train.remat=dots", "quant.double=false", "train.seq_len=128")
    assert [one for one in candidates(config) if not one[0].startswith(("quant.lm_head", "quant.embedding"))] == [
        ("train.batch_size=1", "train.grad_accum=4"),
        ("train.remat=full",),
        ("optim.offload=host",),
        ("model.embedding=host",),
        ("train.mlp_chunk=1024",),
        ("train.loss_chunk=64",),
        ("train.vocab_chunk=4096",),
        ("quant.double=true",),
        ("optim.moments=bf16",),
        ("optim.gradients=bf16",),
        ("lora.rank=2",),
        ("train.seq_len=64",),
    ]
    assert ("quant.lm_head=nf4",) in candidates(config)
    least = tiny("method=full", "train.batch_size=1", "train.loss_chunk=64", "train.mlp_chunk=1024")
    least = changed(least, ("train.vocab_chunk=512",))
    assert list(candidates(least)) == [
        ("train.remat=offload",),
        ("optim.offload=host",),
        ("method=qlora",),
        ("optim.moments=bf16",),
    ]


def test_an_embedding_in_host_memory_is_advised_before_packing_it():
    config, geometry = shipped("guanaco_7b")
    advised = {change.overrides[0]: change for change in changes(config, geometry)}
    table = 32_000 * 4096 * 2
    rows = 16 * 512 * 4096 * 2
    assert advised["model.embedding=host"].saves == table - rows
    assert not any("quant.embedding" in name for name in advised)
    moved = plan(changed(config, ("model.embedding=host",)), geometry)
    assert moved.host == table and moved.batch - plan(config, geometry).batch == rows


def test_a_full_fine_tune_has_its_embedding_on_the_device():
    here, there = (plan(tiny("method=full", f"model.embedding={place}"), GEOMETRY) for place in ("device", "host"))
    assert here == there and here.host == 0


def test_what_a_tied_model_cannot_have_is_not_advised():
    advised = [change.overrides for change in changes(tiny(), GEOMETRY)]
    assert ("quant.embedding=nf4",) in advised and not any("lm_head" in one[0] for one in advised)
    assert ("model.embedding=host",) not in advised


def test_a_slice_of_the_vocabulary_needs_less():
    whole, sliced = (plan(tiny("quant.embedding=int8", f"train.vocab_chunk={n}"), GEOMETRY) for n in (0, 256))
    assert sliced.logits < whole.logits / 4 and sliced.arguments == whole.arguments


def test_changes_say_what_they_save(monkeypatch):
    """Alone and together; one that saves nothing is left out, and the first of two values for a field stays."""
    choices = [("seed=1",), ("train.seq_len=32",), ("train.remat=full",), ("train.seq_len=48",)]
    monkeypatch.setattr(advice, "candidates", lambda config: choices)
    config = tiny("train.remat=none", "method=lora")
    before, short, full, longer, both = (
        plan(changed(config, overrides), GEOMETRY).peak for overrides in [(), *choices[1:], choices[1] + choices[2]]
    )
    assert both < full < before and both < short < longer < before
    assert changes(config, GEOMETRY) == [
        Change(choices[1], saves=before - short, peak=short, peak_together=short),
        Change(choices[2], saves=before - full, peak=full, peak_together=both),
        Change(choices[3], saves=before - longer, peak=longer, peak_together=both),
    ]


def test_the_largest_batch_fits_and_one_more_does_not():
    planner = Planner(tiny(), GEOMETRY)
    budget = 3 * planner.at(2, 64).peak
    rows = largest_batch(planner, budget)
    assert planner.at(rows, 64).peak <= budget < planner.at(rows + 1, 64).peak
    assert largest_batch(planner, planner.at(1, 64).peak) == 1
    assert largest_batch(planner, planner.at(1, 64).peak - 1) == 0


def test_the_longest_sequence_fits_and_more_does_not():
    planner = Planner(tiny("model.max_position=8000", "lora.targets=q_proj"), GEOMETRY)
    budget = planner.at(2, 1000).peak
    assert longest_sequence(planner, budget) == 960
    assert planner.at(2, 960).peak <= budget < planner.at(2, 1024).peak
    assert longest_sequence(planner, planner.at(2, 64).peak - 1) == 0
    assert longest_sequence(planner, 10**15) == 8000


def test_the_models_positions_end_the_longest_sequence():
    assert longest_sequence(Planner(tiny(), GEOMETRY), 10**15) == GEOMETRY.max_position


@pytest.mark.parametrize("measure", [lambda n: 7 * n + 3, lambda n: n * n, lambda n: 1000 * (n // 50)])
def test_largest_is_what_trying_all_would_find(measure):
    for budget in (0, 3, 10, 1000, 5000, 10**9):
        tried = [n for n in range(1, 200) if measure(n) <= budget]
        assert largest(measure, budget, 199) == max(tried, default=0)


def test_largest_measures_little_where_memory_is_linear():
    calls = []
    assert largest(lambda n: calls.append(n) or 13 * n, 13 * 700, 2048) == 700
    assert len(calls) < 8


# --- cards


def test_cards_are_known_by_key_or_by_size():
    assert find_card("l40s") == Card("l40s", 47_700_000_000, "l40s")
    assert find_card("48GB") == Card("48GB", 48_000_000_000, "l40s")
    assert find_card("48 gb").capacity == 48_000_000_000
    assert find_card("80GB").compiled_as in ("a100", "h100")
    assert find_card("16GB").compiled_as != "t4"  # which would run other kernels
    assert find_card("48GB").stands_in and not find_card("t4").stands_in


def test_every_promised_card_is_there():
    promised = "rtx3060 rtx3090 rtx4070 rtx4090 rtx5090 t4 l4 a10 a100-40 a100 l40s h100 h200 b200"
    assert list(GPUS) == promised.split()
    assert GPUS["t4"].capability == (7, 5) and GPUS["rtx5090"].capability == (12, 0)
    for gpu in GPUS.values():
        assert "feature_extension: ACCELERATED" in gpu.target_config() or gpu.capability < (9, 0)


@pytest.mark.parametrize(
    ("name", "words"),
    [("rtx9999", "rtx3060, rtx3090, "), ("48", r"did you mean 48GB\?"), ("0GB", "unknown GPU '0GB'"), ("", "48GB")],
)
def test_an_unknown_card_is_refused(name, words):
    with pytest.raises(ValueError, match=words):
        find_card(name)
