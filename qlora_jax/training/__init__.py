"""Fine-tuning: configuration, optimizer, step, loop, metrics and report."""
