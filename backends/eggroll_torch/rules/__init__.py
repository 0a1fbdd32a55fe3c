"""What PyTorch's functions do with perturbed weights, and which do something else while members run.

Importing this registers the rules, with `perturbed.rule` or in `member_mode.FUNCTIONS`.
"""

from . import (
    attention,
    autocasting,
    convolution,
    joining,
    layers,
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
    "layers",
    "lookup",
    "products",
    "randomness",
    "recurrent",
    "scaling",
    "sparse",
    "views",
]
