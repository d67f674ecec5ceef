"""Llama-2-13B, 4-bit, rank 16 on all linear layers: 62,586,880 trainable parameters.

Command: python scripts/train.py --config configs/13b.py [--config.model.path=DIR]
GPU:     one of 12 GB or more
Memory:  8.44 GB, the compiled peak of the train step for h200 (512 tokens)
Time:    not yet measured on a GPU
"""

from qlora_jax.config import Config, DataSection, LoraSection, ModelSection, OptimSection, TrainSection

config = Config(
    output_dir="runs/13b",
    model=ModelSection(path="NousResearch/Llama-2-13b-hf", geometry="geometry/llama-2-13b.json", embedding="host"),
    lora=LoraSection(rank=16, alpha=16, targets="all-linear"),
    data=DataSection(train="yahma/alpaca-cleaned", eval=0.02),
    optim=OptimSection(learning_rate=2e-4),
    train=TrainSection(epochs=1, batch_size=1, grad_accum=16, seq_len=512),
)
