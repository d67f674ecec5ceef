"""The demo's tasks on a base of 113M parameters, which `python scripts/make_demo_base.py --large` trains first.

Command: python scripts/train.py --config configs/large.py
         python scripts/compare.py --config configs/large.py --out runs/compare-large
GPU:     one of 4 GB or more
Time:    not measured yet
"""

from qlora_jax.config import Config, DataSection, LoraSection, ModelSection, OptimSection, TrainSection

config = Config(
    output_dir="runs/large",
    model=ModelSection(path="runs/large_base/base"),
    lora=LoraSection(rank=16, alpha=16, targets="all-linear"),
    data=DataSection(
        train="demo/tasks/train.jsonl",
        eval="demo/tasks/validation.jsonl",
        test="demo/tasks/test.jsonl",
        exact_match=True,
    ),
    optim=OptimSection(learning_rate=1e-3, schedule="cosine", beta2=0.95, clip=1.0),
    train=TrainSection(
        steps=400,
        batch_size=4,
        grad_accum=1,
        seq_len=128,
        loss_chunk=1024,
        eval_every=100,
        save_every=100,
        log_every=10,
    ),
)
