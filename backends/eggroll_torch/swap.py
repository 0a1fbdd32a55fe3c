"""Other values for a model's parameters, or for PyTorch's generators, for a while, with a sure way back."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eggroll import prng

__all__ = ["attributes_restored", "named_tensors", "replaced", "restored", "seeded", "swapped", "uninterrupted"]


@contextlib.contextmanager
def swapped(model: nn.Module, parameters: dict[str, Tensor]) -> Iterator[None]:
    """The model with other values for some parameters, and with copies of its frozen parameters and buffers.

    The model's own storage is never written to: the body may change all weights and buffers in place.
    """
    with restored(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.data = parameters[name] if name in parameters else parameter.data.clone()
                parameter.grad = None
            for buffer in model.buffers():
                buffer.data = buffer.data.clone()
        yield


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """On the way out every parameter and buffer is in its place again and points to its own storage and gradient.

    Also when the body raises, is interrupted, or put other tensors in their place.
    """
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (table, dict(table)) for module in model.modules() for table in (module._parameters, module._buffers)
    ]
    parameters = [(parameter, parameter.data, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.data) for buffer in model.buffers()]

    def restore() -> None:
        for table, entries in tables:
            table.clear()
            table.update(entries)
        for parameter, storage, gradient in parameters:
            parameter.grad = None
            parameter.data = storage
            parameter.grad = gradient
        for buffer, storage in buffers:
            buffer.data = storage

    try:
        yield
    finally:
        try:
            with uninterrupted():
                restore()
        except BaseException:
            # An interrupt may have come before it was held back; restoring twice does no harm.
            restore()
            raise


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What tensors a model's modules hold, each by its first name: parameters, buffers, and plain attributes."""
    found: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    seen = {id(tensor) for tensor in found.values()}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and id(value) not in seen:
                seen.add(id(value))
                found[f"{prefix}.{name}" if prefix else name] = value
    return found


_LISTS_OF_WEIGHTS = ("_flat_weights", "_flat_weight_refs")


@contextlib.contextmanager
def replaced(model: nn.Module, names: dict[str, Tensor], tensors: dict[str, Tensor]) -> Iterator[None]:
    """Other tensors in the places of a model's own, wherever its modules hold these.

    Not `torch.func.functional_call`, which leaves its tensors in a module that has two names.

    Args:
        model: the model.
        names: its tensors, see `named_tensors`.
        tensors: others for some of them, of any kind.
    """
    others = {id(names[name]): other for name, other in tensors.items()}
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            attributes = vars(module)
            if isinstance(module, nn.RNNBase):  # which makes lists of its weights when it sees others
                undo += [(attributes, name, attributes[name]) for name in _LISTS_OF_WEIGHTS if name in attributes]
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, attributes)
            for table in tables:
                for name, value in list(table.items()):
                    if isinstance(value, Tensor) and id(value) in others:
                        undo.append((table, name, value))
                        table[name] = others[id(value)]
        yield
    finally:
        for table, name, value in undo:
            table[name] = value


@contextlib.contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """On the way out the attributes of the model's modules are again what they were, whatever the body set."""
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (table, dict(table))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for table in (module._parameters, module._buffers, vars(module))
    ]
    try:
        yield
    finally:
        for table, entries in tables:
            table.clear()
            table.update(entries)


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
        if pending:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def seeded(key: Tensor, data: int, device: torch.device) -> Iterator[None]:
    """PyTorch's global generators, seeded from a key and a number, and put back afterwards.

    Args:
        key: int32, shape ``(2,)``, on the CPU.
        data: folded into the key; -1 for what belongs to no member.
        device: whose generator is seeded besides that of the CPU.
    """
    devices = [device] if device.type == "cuda" else []
    # Neither PyTorch's operations, which a mode may be watching, nor torch.manual_seed, which formats a stack trace
    # for devices that are not there yet: each costs a millisecond, for every member.
    high, low = prng.fold_in(key.numpy().view(np.uint32), data & 0xFFFFFFFF).tolist()
    seed = (high << 32) | low
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
