"""Qwen3.5-9B, 4-bit, rank 16 on all linear layers: 43,278,336 trainable parameters.

Command: python scripts/train.py --config configs/qwen3.5-9b.py [--config.model.path=DIR]
GPU:     one of 12 GB or more
Memory:  6.74 GB, the compiled peak of the train step for h200 (2,048 tokens)
Time:    not yet measured on a GPU
"""

from qlora_jax.config import (
    Config,
    DataSection,
    LoraSection,
    ModelSection,
    OptimSection,
    QuantSection,
    TrainSection,
)

config = Config(
    output_dir="runs/qwen3.5-9b",
    model=ModelSection(path="Qwen/Qwen3.5-9B", geometry="geometry/qwen3.5-9b.json", embedding="host"),
    quant=QuantSection(lm_head="int8"),
    lora=LoraSection(rank=16, alpha=16, targets="all-linear"),
    data=DataSection(train="yahma/alpaca-cleaned", eval=0.02),
    optim=OptimSection(learning_rate=2e-4),
    train=TrainSection(epochs=1, batch_size=1, grad_accum=16, seq_len=2048, vocab_chunk=4096),
)
