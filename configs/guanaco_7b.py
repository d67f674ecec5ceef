"""Guanaco-7B: the recipe of the QLoRA paper (arXiv 2305.14314), rank 64 on all linear layers of LLaMA-7B.

Command: python scripts/train.py --config configs/guanaco_7b.py [--config.model.path=DIR]
GPU:     one of 10 GB or more
Memory:  6.83 GB, the compiled peak of the train step for h200 (512 tokens)
Time:    not yet measured on a GPU
"""

from qlora_jax.config import Config, DataSection, LoraSection, ModelSection, OptimSection, TrainSection

config = Config(
    output_dir="runs/guanaco_7b",
    model=ModelSection(path="huggyllama/llama-7b", geometry="geometry/llama-7b.json"),
    lora=LoraSection(rank=64, alpha=16, dropout=0.1, targets="all-linear"),
    # The rows are whole conversations in one "text" column, so all of it is learned; the paper did not pack.
    data=DataSection(train="timdettmers/openassistant-guanaco", eval_split="test", packing=False, train_on="all"),
    optim=OptimSection(
        learning_rate=2e-4, schedule="constant", warmup_ratio=0.0, weight_decay=0.0, beta2=0.999, clip=0.3
    ),
    train=TrainSection(steps=1875, batch_size=1, grad_accum=16, seq_len=512),
)
