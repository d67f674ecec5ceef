"""A base of 113M parameters, trained from random weights on the Python library's sources, for a comparison on a GPU.

Command: python scripts/make_demo_base.py --large
GPU:     one of 4 GB or more
Time:    not measured yet
"""

from qlora_jax.config import Config, DataSection, ModelSection, OptimSection, TrainSection

config = Config(
    method="full",
    output_dir="runs/large_base/run",
    model=ModelSection(path="runs/large_base/start", weights="random", dtype="fp32"),
    data=DataSection(train="runs/large_base/corpus.jsonl", eval=0.02, train_on="all", samples=2),
    optim=OptimSection(
        learning_rate=6e-4, schedule="cosine", warmup_ratio=0.05, weight_decay=0.1, beta2=0.95, clip=1.0
    ),
    train=TrainSection(
        steps=2000,
        batch_size=16,
        grad_accum=2,
        seq_len=512,
        loss_chunk=2048,
        save_every=500,
        eval_every=500,
        log_every=10,
        keep=1,
        keep_best=False,
    ),
)
