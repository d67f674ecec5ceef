"""The demo's base, trained from random weights on Python's own documentation; its data come from the script.

Command: python scripts/make_demo_base.py
GPU:     none needed
Time:    about ten minutes on two CPU cores
"""

from qlora_jax.config import Config, DataSection, ModelSection, OptimSection, TrainSection

config = Config(
    method="full",
    output_dir="runs/demo_base/run",
    model=ModelSection(path="runs/demo_base/start", weights="random", dtype="fp32"),
    data=DataSection(train="runs/demo_base/corpus.jsonl", eval=0.02, train_on="all", samples=2),
    optim=OptimSection(
        learning_rate=3e-3, schedule="cosine", warmup_ratio=0.05, weight_decay=0.1, beta2=0.95, clip=1.0
    ),
    train=TrainSection(
        steps=2400,
        batch_size=4,
        grad_accum=1,
        seq_len=256,
        remat="none",
        loss_chunk=1024,
        save_every=800,
        eval_every=400,
        log_every=10,
    ),
)
