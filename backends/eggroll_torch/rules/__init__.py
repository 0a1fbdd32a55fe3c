"""What PyTorch's functions do with perturbed weights; importing this registers the rules."""

from . import attention, convolution, lookup, products, randomness, recurrent, views

__all__ = ["attention", "convolution", "lookup", "products", "randomness", "recurrent", "views"]
