"""Full fine-tuning, LoRA and QLoRA side by side: memory, speed and quality."""
