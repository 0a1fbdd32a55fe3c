"""What PyTorch's functions do with perturbed weights; importing this registers the rules."""

from . import (
    attention,
    autocasting,
    convolution,
    joining,
    lookup,
    products,
    randomness,
    recurrent,
    scaling,
    sparse,
    views,
)

__all__ = [
    "attention",
    "autocasting",
    "convolution",
    "joining",
    "lookup",
    "products",
    "randomness",
    "recurrent",
    "scaling",
    "sparse",
    "views",
]
