"""Recurrent layers with perturbed weights, which PyTorch cannot run under `vmap` as they are.

The input's share of the gates is one product for all time steps; the recurrent share is one product a step.
Formulas: the documentation of `torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..autocast import autocast_operands
from ..member_mode import FUNCTIONS
from ..perturbed import PerturbedWeight, rule
from ..policy import UnsupportedOperationError
from .autocasting import linear
from .layers import dropout

Step = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _lstm_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The next ``(h, c)`` from the gates' shares of the input and of the hidden state."""
    i, f, g, o = (x + h).chunk(4, dim=-1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x_r, x_z, x_n = x.chunk(3, dim=-1)
    h_r, h_z, h_n = h.chunk(3, dim=-1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return ((1 - z) * n + z * state[0],)


def _tanh_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.tanh(x + h),)


def _relu_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.relu(x + h),)


def _run_layers(
    step: Step,
    input: Any,
    initial: tuple[Tensor, ...],
    weights: Any,
    has_biases: bool,
    num_layers: int,
    rate: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """All layers and directions: outputs, then the final state tensors, each ``(layers * directions, ...)``."""
    x = input.transpose(0, 1) if batch_first and input.ndim == 3 else input  # (time, ..., features)
    directions = 2 if bidirectional else 1
    per_cell = len(weights) // (num_layers * directions)
    final: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            cell = layer * directions + direction
            parts = list(weights[cell * per_cell : (cell + 1) * per_cell])
            state = tuple(tensor[cell] for tensor in initial)
            out, state = _run_direction(step, x, state, parts, has_biases, reverse=direction == 1)
            outputs.append(out)
            final.append(state)
        x = torch.cat(outputs, dim=-1) if directions == 2 else outputs[0]
        if rate and train and layer < num_layers - 1:
            x = dropout(x, rate)
    out = x.transpose(0, 1) if batch_first and input.ndim == 3 else x
    return out, *(torch.stack(tensors) for tensors in zip(*final, strict=True))


def _run_direction(
    step: Step, x: Tensor, state: tuple[Tensor, ...], parts: Sequence[Any], has_biases: bool, reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    w_ih, w_hh = parts[:2]
    b_ih, b_hh = parts[2:4] if has_biases else (None, None)
    w_hr = parts[-1] if len(parts) % 2 else None  # an LSTM's projection of the hidden state
    shares = linear(x, w_ih, b_ih)
    outputs: list[Tensor] = []
    for time in range(x.shape[0] - 1, -1, -1) if reverse else range(x.shape[0]):
        state = step(shares[time], linear(state[0], w_hh, b_hh), state)
        if w_hr is not None:
            state = (linear(state[0], w_hr), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _lstm(input, hx, params, has_biases, num_layers, rate, train, bidirectional, batch_first):
    _refuse_packed(has_biases)
    input, *hx = autocast_operands(input, *hx)  # which leaves other recurrent layers alone on a CPU
    return _run_layers(
        _lstm_step, input, tuple(hx), params, has_biases, num_layers, rate, train, bidirectional, batch_first
    )


def _one_state(step: Step) -> Callable[..., Any]:
    def run(input, hx, params, has_biases, num_layers, rate, train, bidirectional, batch_first):
        _refuse_packed(has_biases)
        return _run_layers(
            step, input, (hx,), params, has_biases, num_layers, rate, train, bidirectional, batch_first
        )

    return run


def _cell(step: Step, states: int) -> Callable[..., Any]:
    def run(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
        state = tuple(hx) if states == 2 else (hx,)
        new = step(linear(input, w_ih, b_ih), linear(state[0], w_hh, b_hh), state)
        return new if states == 2 else new[0]

    return run


_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.lstm: _lstm,
    torch.gru: _one_state(_gru_step),
    torch.rnn_tanh: _one_state(_tanh_step),
    torch.rnn_relu: _one_state(_relu_step),
    torch.lstm_cell: _cell(_lstm_step, 2),
    torch.gru_cell: _cell(_gru_step, 1),
    torch.rnn_tanh_cell: _cell(_tanh_step, 1),
    torch.rnn_relu_cell: _cell(_relu_step, 1),
}
for _function, _answer in _ANSWERS.items():
    rule(_function)(_answer)
    FUNCTIONS[_function] = _answer


def _refuse_packed(has_biases: Any) -> None:
    if isinstance(has_biases, bool):
        return
    # The variants for packed sequences have a tensor of batch sizes in second place, and the weights in fourth.
    names = [weight.noise.name for weight in has_biases if isinstance(weight, PerturbedWeight)]
    which = f" (parameters {', '.join(map(repr, names))})" if names else ""
    raise UnsupportedOperationError(f"packed sequences have no rule for a population{which}: pad them instead")
