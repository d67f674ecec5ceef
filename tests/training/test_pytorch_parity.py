"""Fifty steps of QLoRA by transformers + PEFT + bitsandbytes and by this project: the same losses and adapters.

Both start from the same checkpoint and the same adapter, take the same batches, and have every setting of AdamW away
from its default, so that one that is lost on the way shows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config import Config, LoraSection, ModelSection, OptimSection, TrainSection
from qlora_jax.data import Batches, Encoded
from qlora_jax.io.peft import TrainedOn, read_adapter, write_adapter
from qlora_jax.training.setup import base_folder, make_trainer

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

# PEFT asks transformers for what the latter is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

STEPS, LAYERS, COUNTED, LENGTH = 50, 2, 12, 24
# Relative; of an adapter: of how far it moved. Measured on a CPU: losses 2e-7 apart, norms 4e-6, adapters 5e-6.
LOSS_TOLERANCE, NORM_TOLERANCE, ADAPTER_TOLERANCE = 1e-4, 1e-3, 1e-3


@pytest.fixture(scope="module")
def config(checkpoint) -> Config:
    return Config(
        seed=3,
        model=ModelSection(path=str(checkpoint(dtype="bfloat16", num_hidden_layers=LAYERS)), dtype="fp32"),
        lora=LoraSection(rank=4, alpha=12, targets="all-linear"),
        optim=OptimSection(
            learning_rate=5e-3,
            schedule="cosine",
            warmup_ratio=0.1,
            weight_decay=0.1,
            beta1=0.8,
            beta2=0.98,
            eps=1e-4,
            clip=0.5,
        ),
        train=TrainSection(steps=STEPS, batch_size=4, grad_accum=2, seq_len=LENGTH),
    )


@pytest.fixture(scope="module")
def batches(config):
    """Rows of different lengths, each with its prompt unscored: a pattern that can be learned."""
    rng, documents = np.random.default_rng(0), []
    for _ in range(64):
        ids = (rng.integers(COUNTED) + np.arange(rng.integers(8, LENGTH + 1))) % COUNTED
        documents.append(Encoded(ids=ids.astype(np.int32), scored=np.arange(len(ids)) >= rng.integers(1, 5)))
    section = config.train
    sizes = {"seq_len": LENGTH, "batch_size": section.batch_size, "grad_accum": section.grad_accum}
    made = Batches(encoded=documents, **sizes, packing=False, seed=0, pad_id=0)
    return [made.at(step) for step in range(STEPS)]


def our_run(config, batches, folder):
    """Our losses and gradient norms, and the adapter as it was before (`before`) and after the steps (`after`)."""

    def write(name):
        lora, base = config.lora, config.model.path
        write_adapter(folder / name, trainer.parts.merge(), lora, trainer.targets, TrainedOn(base))

    trainer = make_trainer(config, base_folder(config), STEPS)
    write("before")
    losses, norms = [], []
    for batch in batches:
        arrays = jax.tree.map(jnp.asarray, batch)
        state = (trainer.parts.trained, trainer.opt_state, trainer.parts.base)
        adapters, trainer.opt_state, metrics = trainer.train_step(*state, arrays, None)
        trainer.parts = trainer.parts._replace(trained=adapters)
        losses.append(metrics["loss"].item())
        norms.append(metrics["grad_norm"].item())
    write("after")
    return losses, norms


def their_model(folder, adapter):
    """The checkpoint in NF4 with double quantization, and our adapter on it, ready to train."""
    packed = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=packed, dtype=torch.float32, device_map="cpu"
    )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # train(), not eval(): there bitsandbytes computes in bfloat16 on some processors.
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def their_optimizer(model, optim):
    """(AdamW, its schedule: a linear warm-up, then a cosine)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(
        trained,
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    warmup = round(optim.warmup_ratio * STEPS)

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        return (1 + np.cos(np.pi * (step - warmup) / (STEPS - warmup))) / 2

    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, factor)


def their_run(config, batches, folder):
    """Their losses and gradient norms; writes their adapter to `theirs`."""
    model = their_model(config.model.path, folder / "before")
    optimizer, schedule = their_optimizer(model, config.optim)
    losses, norms = [], []
    for batch in batches:
        count, total = int(batch["scored"].sum()), 0.0
        for tokens, segments, _, scored in zip(*map(torch.from_numpy, batch.values()), strict=True):
            labels = tokens.long().masked_fill(~scored, -100)
            loss = model(
                input_ids=tokens.long(), attention_mask=(segments > 0).long(), labels=labels, num_items_in_batch=count
            ).loss
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    model.save_pretrained(folder / "theirs")
    return losses, norms


@pytest.fixture(scope="module")
def runs(config, batches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other on matrices this small
    yield our_run(config, batches, folder), their_run(config, batches, folder), folder
    torch.set_num_threads(threads)


def test_every_step_has_the_same_loss(runs):
    (ours, _), (theirs, _), _ = runs
    assert len(ours) == STEPS
    np.testing.assert_allclose(ours, theirs, rtol=LOSS_TOLERANCE)
    assert ours[-1] < ours[0] - 1  # there was something to learn, and it was learned


def test_every_step_has_the_same_gradient_norm_and_some_are_clipped(runs):
    (_, ours), (_, theirs), _ = runs
    np.testing.assert_allclose(ours, theirs, rtol=NORM_TOLERANCE)
    assert min(ours) < 0.5 < max(ours)


def test_the_final_adapters_are_the_same(runs):
    folder = runs[2]
    before, ours, theirs = (read_adapter(folder / name).weights for name in ("before", "after", "theirs"))
    assert set(ours) == set(theirs) and len(ours) == LAYERS * 7
    for name in ours:
        for start, mine, other in zip(before[name], ours[name], theirs[name], strict=True):
            moved = np.linalg.norm(np.asarray(other, np.float64) - start)
            assert np.linalg.norm(np.asarray(mine, np.float64) - other) <= ADAPTER_TOLERANCE * moved, name
