"""Llama-3.1-8B, 4-bit, rank 16 on all linear layers: 41,943,040 trainable parameters.

Command: python scripts/train.py --config configs/8b.py [--config.model.path=DIR]
GPU:     one of 12 GB or more
Memory:  5.24 GB, the compiled peak of the train step for h200 (512 tokens)
Quality: the embedding in host memory (1.05 GB there) costs none, the output layer in 8 bits less than 0.01 nats of
         held-out loss on the demo's base; lm_head="nf4" saves 0.25 GB more and costs 0.02 (head-quality.json)
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
    output_dir="runs/8b",
    model=ModelSection(path="NousResearch/Meta-Llama-3.1-8B", geometry="geometry/llama-3.1-8b.json", embedding="host"),
    quant=QuantSection(lm_head="int8"),
    lora=LoraSection(rank=16, alpha=16, targets="all-linear"),
    data=DataSection(train="yahma/alpaca-cleaned", eval=0.02),
    optim=OptimSection(learning_rate=2e-4),
    train=TrainSection(epochs=1, batch_size=1, grad_accum=16, seq_len=512, vocab_chunk=4096),
)
