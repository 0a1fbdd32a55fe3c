"""SGD, Adam (arXiv 1412.6980) and AdamW (arXiv 1711.05101) in NumPy, with the names and defaults of optax."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .report import InexpressibleError

__all__ = ["OPTIONS", "check_options", "optimizer"]

Tree = Mapping[str, np.ndarray]
Step = Callable[[Tree, Tree], dict[str, np.ndarray]]

_ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
# Optax's names and defaults, of the options that NumPy and PyTorch have counterparts of.
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": None, "nesterov": False},
    "adam": _ADAM,
    "adamw": {**_ADAM, "weight_decay": 1e-4},
}


def check_options(solver: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of an optimizer, those that are not given at optax's defaults."""
    if solver not in OPTIONS or (unknown := set(options) - set(OPTIONS[solver])):
        what = f"optax.{solver}" if solver not in OPTIONS else f"optax.{solver} with {sorted(unknown)}"
        raise InexpressibleError(f"{what} has no counterpart here")
    return {**OPTIONS[solver], **options}


def optimizer(solver: str, learning_rate: float, options: Mapping[str, Any]) -> Step:
    """``step(parameters, gradient) -> parameters``, which keeps its own state; float64 inside, float32 outside.

    Raises:
        InexpressibleError: another optimizer, or an option that is not in `OPTIONS`.
    """
    chosen = check_options(solver, options)
    find = _sgd(**chosen) if solver == "sgd" else _adam(**chosen)

    def step(parameters: Tree, gradient: Tree) -> dict[str, np.ndarray]:
        return {
            name: (value - learning_rate * find(name, gradient[name].astype(np.float64), value)).astype(np.float32)
            for name, value in parameters.items()
        }

    return step


def _sgd(momentum: float | None, nesterov: bool) -> Callable[[str, np.ndarray, np.ndarray], np.ndarray]:
    trace: dict[str, np.ndarray] = {}

    def find(name: str, gradient: np.ndarray, value: np.ndarray) -> np.ndarray:
        if not momentum:
            return gradient
        trace[name] = gradient + momentum * trace.get(name, 0.0)
        return gradient + momentum * trace[name] if nesterov else trace[name]

    return find


def _adam(
    b1: float, b2: float, eps: float, weight_decay: float = 0.0
) -> Callable[[str, np.ndarray, np.ndarray], np.ndarray]:
    moments: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}

    def find(name: str, gradient: np.ndarray, value: np.ndarray) -> np.ndarray:
        count, m, v = moments.get(name, (0, np.zeros_like(gradient), np.zeros_like(gradient)))
        count, m, v = count + 1, b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        moments[name] = count, m, v
        return m / (1 - b1**count) / (np.sqrt(v / (1 - b2**count)) + eps) + weight_decay * value

    return find
