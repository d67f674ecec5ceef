"""LLaMA-65B, 4-bit, rank 16 on all linear layers: 199,884,800 trainable parameters, on one 48 GB card.

Command: python scripts/train.py --config configs/65b.py [--config.model.path=DIR]
GPU:     one of 48 GB or more, e.g. L40S or RTX A6000
Memory:  38.56 GB, the compiled peak of the train step for h200 (512 tokens)
Time:    not yet measured on a GPU
"""

from qlora_jax.config import Config, DataSection, LoraSection, ModelSection, OptimSection, TrainSection

config = Config(
    output_dir="runs/65b",
    model=ModelSection(path="huggyllama/llama-65b", geometry="geometry/llama-65b.json", embedding="host"),
    lora=LoraSection(rank=16, alpha=16, targets="all-linear"),
    data=DataSection(train="yahma/alpaca-cleaned", eval=0.02),
    optim=OptimSection(learning_rate=1e-4),  # half of the smaller models' rate from 30B on: arXiv 2305.14314
    train=TrainSection(epochs=1, batch_size=1, grad_accum=16, seq_len=512),
)
