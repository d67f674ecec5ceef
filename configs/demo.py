"""The demo: a small base that ships with the repository learns the tasks in demo/tasks, on a CPU.

Command: python scripts/train.py --config configs/demo.py
GPU:     none needed
Memory:  about 1 GB of host memory in all
Time:    at most 2 minutes on two CPU cores
"""

from qlora_jax.config import Config, DataSection, LoraSection, ModelSection, OptimSection, TrainSection

config = Config(
    output_dir="runs/demo",
    model=ModelSection(path="demo/base", dtype="fp32"),
    lora=LoraSection(rank=16, alpha=16, targets="all-linear"),
    data=DataSection(
        train="demo/tasks/train.jsonl",
        eval="demo/tasks/validation.jsonl",
        test="demo/tasks/test.jsonl",
        exact_match=True,
    ),
    # Batches are small and steps are few: a second moment with a shorter memory keeps up.
    optim=OptimSection(learning_rate=5e-3, schedule="cosine", beta2=0.95, clip=1.0),
    train=TrainSection(
        steps=400,
        batch_size=4,
        grad_accum=1,
        seq_len=128,
        remat="none",
        loss_chunk=1024,
        eval_every=100,
        save_every=50,
        log_every=10,
    ),
)
