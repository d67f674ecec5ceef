from qlora_jax.kernels.dequantize.dispatch import dequantize

__all__ = ["dequantize"]
