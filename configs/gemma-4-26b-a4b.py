"""Gemma-4-26B-A4B, experts in NF4, 4-bit, rank 16 on all linear layers: 18,585,600 trainable parameters.

Command: python scripts/train.py --config configs/gemma-4-26b-a4b.py [--config.model.path=DIR]
GPU:     one of 24 GB or more
Memory:  15.51 GB, the compiled peak of the train step for h200 (2,048 tokens)
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
    output_dir="runs/gemma-4-26b-a4b",
    model=ModelSection(path="google/gemma-4-26B-A4B-it", geometry="geometry/gemma-4-26b-a4b.json"),
    quant=QuantSection(embedding="int8"),
    lora=LoraSection(rank=16, alpha=16, targets="all-linear"),
    data=DataSection(train="yahma/alpaca-cleaned", eval=0.02),
    optim=OptimSection(learning_rate=2e-4),
    train=TrainSection(epochs=1, batch_size=1, grad_accum=16, seq_len=2048, vocab_chunk=4096),
)
