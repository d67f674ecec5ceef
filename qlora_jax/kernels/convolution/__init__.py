from qlora_jax.kernels.convolution.dispatch import causal_convolution

__all__ = ["causal_convolution"]
