"""Llama-2-7B, 4-bit, rank 8 on the query and value projections: 4,194,304 trainable parameters (0.06 %).

Command: python scripts/train.py --config configs/7b.py [--config.model.path=DIR]
GPU:     one of 6 GB or more
Memory:  3.91 GB, the compiled peak of the train step for h200 (512 tokens)
Quality: the embedding in host memory (0.26 GB there) costs none, the output layer in 8 bits less than 0.01 nats of
         held-out loss on the demo's base, where 4 bits cost 0.02 (benchmarks/results/head-quality.json)
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
    output_dir="runs/7b",
    model=ModelSection(path="NousResearch/Llama-2-7b-hf", geometry="geometry/llama-2-7b.json", embedding="host"),
    quant=QuantSection(lm_head="int8"),
    lora=LoraSection(rank=8, alpha=16, targets=("q_proj", "v_proj")),
    data=DataSection(train="yahma/alpaca-cleaned", eval=0.02),
    optim=OptimSection(learning_rate=2e-4),
    train=TrainSection(epochs=1, batch_size=1, grad_accum=16, seq_len=512, vocab_chunk=4096),
)
