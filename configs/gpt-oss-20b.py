"""gpt-oss-20b, its experts in MXFP4 as published, rank 16 on all linear layers: 7,962,624 trainable parameters.

Command: python scripts/train.py --config configs/gpt-oss-20b.py [--config.model.path=DIR]
GPU:     one of 16 GB or more
Memory:  12.33 GB, the compiled peak of the train step for h200 (2,048 tokens)
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
    output_dir="runs/gpt-oss-20b",
    model=ModelSection(path="openai/gpt-oss-20b", geometry="geometry/gpt-oss-20b.json", embedding="host"),
    quant=QuantSection(lm_head="int8"),
    lora=LoraSection(rank=16, alpha=16, targets="all-linear"),
    data=DataSection(train="yahma/alpaca-cleaned", eval=0.02),
    optim=OptimSection(learning_rate=2e-4),
    train=TrainSection(epochs=1, batch_size=1, grad_accum=16, seq_len=2048, vocab_chunk=4096),
)
