"""The parts of benchmarks/gpu_suite.py: one file a question."""
