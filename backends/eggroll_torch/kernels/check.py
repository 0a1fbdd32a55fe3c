"""Whether the kernels compute on a device what the array-API core defines: tried once, on small sizes, before use.

A compiler or a driver that gets one of them wrong would otherwise show in nothing but a run that does not learn.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eggroll import perturbation, prng
from eggroll.update import dense_sum, low_rank_sum

from .dense import add_dense_sum_drawn_, dense_of_members
from .launch import dot_precision
from .linear import linear_of_members, linear_of_members_drawn
from .noise import draw_rows, fold_in
from .update import add_low_rank_sum_, add_low_rank_sum_drawn_

__all__ = ["problem"]

_DRAWS, _ROWS, _OUT, _IN, _RANK, _SCALE = 3, 5, 40, 136, 2, 0.5
_SMALL = 24, 24  # a matrix that is one tile of the update, which draws its noise itself
_SIGNS = np.asarray([1.0, -1.0] * _DRAWS, dtype=np.float32)
# Relative to the largest number; what is wrong is wrong by more.
_TOLERANCES = {"equal": 0.0, "ieee": 1e-5, "tf32": 5e-3, "bfloat16": 3e-2}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}

Comparison = tuple[str, str, Callable[[], Tensor], np.ndarray]


@torch.no_grad()
def problem(device: torch.device, rng: prng.Rng) -> str | None:
    """What is wrong with the kernels that draw with a generator on a device, in words; None if nothing is.

    Raises:
        torch.OutOfMemoryError: the device has no room for some hundred kilobytes.
    """
    with torch.autocast(device.type, enabled=False):
        for name, tolerance, run, expected in _comparisons(device, rng):
            try:
                found = run().double().cpu().numpy()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                reason = (str(error).splitlines() or [""])[0]
                return f"{name} raises {type(error).__name__} ({reason})"
            off = float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))
            if not off <= _TOLERANCES[tolerance]:  # NaN is not
                return f"{name} is off by {off:.1e} of the largest number"
    return None


def _comparisons(device: torch.device, rng: prng.Rng) -> Iterator[Comparison]:
    """What to compare, how closely, how the kernels compute it, and what it is."""
    key = prng.key(0)
    keys = prng.fold_in(key, np.arange(_DRAWS, dtype=np.int32))
    on_device = _words(keys, device)
    draws = torch.arange(_DRAWS, dtype=torch.int32, device=device)
    yield "fold_in", "equal", lambda: fold_in(_words(key[None, :], device), draws)[:, 0], _signed(keys)
    # An argument of 1 is compiled apart.
    yield "fold_in", "equal", lambda: fold_in(_words(key[None, :], device), draws[1:2])[:, 0], _signed(keys[1:2])

    coefficients = np.linspace(-1.0, 2.0, _DRAWS)
    c = torch.from_numpy(coefficients).to(device, torch.float32)
    yield from _vectors(rng, keys, on_device, coefficients, c, device)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _products(dtype, rng, keys, on_device, coefficients, c, device)


def _by(rng: prng.Rng) -> str:
    return "" if rng == "threefry" else f" by {rng}"


def _vectors(
    rng: prng.Rng, keys: np.ndarray, on_device: Tensor, coefficients: np.ndarray, c: Tensor, device: torch.device
) -> Iterator[Comparison]:
    """Rows of noise, and dense noise in the forward pass and in the update."""
    elements = 4 if rng == "philox" else 1  # of a block, whose row and stream are 0
    places = torch.arange(_IN // elements, dtype=torch.int32, device=device)
    zeros = torch.zeros_like(places)
    counter = torch.stack([places, zeros, zeros]) if rng == "philox" else places
    rows = prng.normal(keys, (_IN,), rng=rng)
    yield f"draw_rows{_by(rng)}", "ieee", lambda: draw_rows(on_device[:, None], zeros, counter, rng=rng), rows

    vector = np.linspace(-1.0, 1.0, _OUT).astype(np.float32)
    noise = perturbation.dense_noise(keys, (_OUT,), rng=rng)
    signs = torch.from_numpy(_SIGNS).to(device)
    yield (
        f"dense_of_members{_by(rng)}",
        "ieee",
        lambda: dense_of_members(torch.from_numpy(vector).to(device), on_device, _SCALE * signs, rng=rng),
        vector + _SCALE * _SIGNS[:, None] * np.repeat(noise, 2, axis=0),
    )

    def total() -> Tensor:
        summed = torch.zeros(_OUT, dtype=torch.float32, device=device)
        add_dense_sum_drawn_(summed, c, on_device, rng=rng)
        return summed

    yield f"add_dense_sum_drawn_{_by(rng)}", "ieee", total, dense_sum(coefficients, noise.astype(np.float64))


def _products(
    dtype: torch.dtype,
    rng: prng.Rng,
    keys: np.ndarray,
    on_device: Tensor,
    coefficients: np.ndarray,
    c: Tensor,
    device: torch.device,
) -> Iterator[Comparison]:
    """The forward pass and the update in a dtype."""
    tolerance = "bfloat16" if dtype == torch.bfloat16 else dot_precision(dtype)
    members = len(_SIGNS)
    weight = _waves(_OUT, _IN).to(dtype)
    x = _waves(members, _ROWS, _IN).to(dtype)
    A, B = (
        torch.from_numpy(factor).to(dtype).double().numpy()
        for factor in perturbation.low_rank_noise(keys, (_OUT, _IN), _RANK, rng=rng)
    )
    noise = np.repeat(A @ B.swapaxes(-1, -2), 2, axis=0)
    weights = weight.double().numpy() + _SCALE * _SIGNS[:, None, None] * noise
    signs = torch.from_numpy(_SIGNS).to(device)
    of_biases = perturbation.dense_noise(keys[::-1], (_OUT,), rng=rng).astype(np.float64)
    biases = (_SCALE * _SIGNS[:, None] * np.repeat(of_biases, 2, axis=0))[:, None]  # (members, 1, out)
    noisy: dict[str, Any] = {"bias_keys": on_device.flip(0), "bias_scales": _SCALE * signs, "rng": rng}
    for name, inputs in (("inputs of their own", x), ("a shared input", x[0])):
        arguments = inputs.to(device), weight.to(device), None, on_device, _RANK, signs, _SCALE
        yield (
            f"linear_of_members_drawn{_by(rng)} with {name} in {dtype}",
            tolerance,
            lambda arguments=arguments: linear_of_members_drawn(*arguments, **noisy),  # type: ignore[misc]
            inputs.double().numpy() @ weights.swapaxes(-1, -2) + biases,
        )
    stored = tuple(torch.from_numpy(factor).to(device, dtype) for factor in (A, B))
    yield (
        f"linear_of_members{_by(rng)} in {dtype}",
        tolerance,
        lambda: linear_of_members(x.to(device), weight.to(device), None, *stored, signs, _SCALE, **noisy),
        x.double().numpy() @ weights.swapaxes(-1, -2) + biases,
    )
    # Of a shared input, for which one kernel is compiled and not one for each configuration; sums are around 1.
    small = x[0] / 16
    for activation, function in _ACTIVATIONS.items() if dtype == torch.float32 and rng == "threefry" else ():
        arguments = small.to(device), weight.to(device), None, on_device, _RANK, signs, _SCALE
        yield (
            f"linear_of_members_drawn with {activation}",
            tolerance,
            lambda arguments=arguments, name=activation: linear_of_members_drawn(*arguments, activation=name),  # type: ignore[misc]
            function(torch.from_numpy(small.double().numpy() @ weights.swapaxes(-1, -2))).numpy(),
        )

    for shape in ((_OUT, _IN), _SMALL):
        factors = perturbation.LowRank(
            *(
                torch.from_numpy(factor).to(dtype).double().numpy()
                for factor in perturbation.low_rank_noise(keys, shape, _RANK, rng=rng)
            )
        )

        def total(shape: tuple[int, int] = shape) -> Tensor:
            summed = torch.zeros(shape, dtype=torch.float32, device=device)
            add_low_rank_sum_drawn_(summed, c, on_device, _RANK, dtype, rng=rng)
            return summed

        yield (
            f"add_low_rank_sum_drawn_{_by(rng)} of shape {shape} in {dtype}",
            tolerance,
            total,
            low_rank_sum(coefficients, factors),
        )
    if rng != "threefry":
        return  # what is in memory, no generator draws

    def total_of_stored() -> Tensor:
        summed = torch.zeros(_OUT, _IN, dtype=torch.float32, device=device)
        add_low_rank_sum_(summed, c, *stored, dtype)
        return summed

    yield (
        f"add_low_rank_sum_ in {dtype}",
        tolerance,
        total_of_stored,
        low_rank_sum(coefficients, perturbation.LowRank(A, B)),
    )


def _waves(*shape: int) -> Tensor:
    """Numbers between -1 and 1 without a pattern that a wrong index would preserve."""
    places = torch.arange(math.prod(shape), dtype=torch.float64, device="cpu")
    return places.mul(0.7).add(0.3).sin().float().view(shape)


def _signed(keys: np.ndarray) -> np.ndarray:
    return keys.view(np.int32)


def _words(keys: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(_signed(np.ascontiguousarray(keys))).to(device)
