"""Other values for a model's parameters, for a while, with a way back that nothing can block."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["swapped", "uninterrupted"]


@contextlib.contextmanager
def swapped(model: nn.Module, parameters: dict[str, Tensor]) -> Iterator[None]:
    """The model with other values for some parameters; its own storage is never written to.

    On the way out every parameter points to its own storage again and every buffer holds its old values, also when
    the body raises or is interrupted.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if name in parameters}
    storage = {name: parameter.data for name, parameter in own.items()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def restore() -> None:
        for name, parameter in own.items():
            parameter.data = storage[name]
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)

    try:
        for name, parameter in own.items():
            parameter.data = parameters[name]
        yield
    finally:
        try:
            with uninterrupted():
                restore()
        except KeyboardInterrupt:
            # It may have come before Ctrl-C was held back; restoring twice does no harm.
            restore()
            raise


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the body is done: what must happen whole happens whole."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    pending: list[Any] = []
    previous = signal.signal(signal.SIGINT, lambda *signal_and_frame: pending.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending and callable(previous):
            previous(*pending[0])
