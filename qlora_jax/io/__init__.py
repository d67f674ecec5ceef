"""Reading and writing the formats of other tools: Hugging Face folders, PEFT adapters, checkpoints of a run."""
