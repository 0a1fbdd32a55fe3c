"""Tensors of more than 2**31 elements, whose last an offset of 32 bits does not reach.

They are on the meta device, so they take no memory: of each launch the programs at the corners of the grid are run,
which read and write nothing, and every address has to be right.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch_backend.kernels.memory_checks import check_programs

from eggroll_torch.kernels import dense, linear, noise, update


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def keys(*shape: int) -> torch.Tensor:
    return empty(*shape, 2, dtype=torch.int32)


def linear_of_members(
    members: int, draws: int, rows: int, in_features: int, out_features: int, rank: int, dtype: torch.dtype,
    *, way: str = "stored", shared: bool = False, transposed: bool = False,
) -> None:  # fmt: skip
    if transposed:
        x = empty(in_features, members, rows, dtype=dtype).movedim(0, -1)
        weight = empty(in_features, out_features, dtype=dtype).mT
    else:
        x, weight = empty(members, rows, in_features, dtype=dtype), empty(out_features, in_features, dtype=dtype)
    given = x[0] if shared else x, weight, empty(members, out_features, dtype=dtype)
    signs = empty(members)
    if way == "stored":
        factors = empty(draws, out_features, rank, dtype=dtype), empty(draws, in_features, rank, dtype=dtype)
        body(linear.linear_of_members)(*given, *factors, signs, 0.1)
    else:
        how = {"bias_keys": keys(draws), "bias_scales": signs, "rng": way}
        body(linear.linear_of_members_drawn)(*given, keys(draws), rank, signs, 0.1, **how)


def add_low_rank_sum_(out_features: int, in_features: int, draws: int, rank: int, dtype: torch.dtype) -> None:
    factors = empty(draws, out_features, rank, dtype=dtype), empty(draws, in_features, rank, dtype=dtype)
    body(update.add_low_rank_sum_)(empty(out_features, in_features), empty(draws), *factors, fused=True)


def body(operation: Any) -> Callable[..., Any]:
    """What an operation does on a device, which the meta device is not to PyTorch."""
    return operation._init_fn


WIDE, NARROW = torch.float32, torch.bfloat16
# What to run, and which tensors of which kernels are then reached beyond 2**31 elements.
CASES: dict[str, tuple[Callable[[], object], dict[str, set[str]]]] = {
    "keys": (lambda: body(noise.fold_in)(keys(2**16 + 1), keys(2**15)[:, 0]), {"_fold_in_kernel": {"out"}}),
    "rows": (
        lambda: body(noise.draw_rows)(keys(2**16, 1), *2 * [empty(2**15 + 1, dtype=torch.int32)]),
        {"_rows_kernel": {"out"}},
    ),
    "keys of rows": (
        lambda: body(noise.draw_rows)(keys(2**20 + 1, 2**10), *2 * [empty(7, dtype=torch.int32)]),
        {"_rows_kernel": {"keys"}},
    ),
    "factors": (
        lambda: body(noise.draw_both_factors)(keys(2**11), None, 16, 5, 2**16, "float32", "threefry", NARROW),
        {"_factors_kernel": {"out"}},
    ),
    "dense noise": (
        lambda: body(dense.dense_of_members)(empty(2**15 + 1), keys(2**15), empty(2**16)),
        {"_members_kernel": {"out"}},
    ),
    "many inputs": (
        lambda: linear_of_members(2**10, 2**9, 2**15 + 1, 64, 64, 64, NARROW),
        {"_project_kernel": {"x", "out"}, "_linear_kernel": {"x", "projected", "out"}},
    ),
    "many inputs, multiplied by the library": (
        lambda: linear_of_members(2**10, 2**9, 2**15 + 1, 64, 64, 2, WIDE, way="threefry"),
        {"_project_kernel": {"x"}, "_linear_kernel": {"base", "out"}},
    ),
    "many transposed inputs, of many rows": (
        lambda: linear_of_members(2**10, 2**10, 2**17 + 1, 17, 1, 1, NARROW, transposed=True),
        {"_project_kernel": {"x"}, "_linear_kernel": {"x"}},
    ),
    "many transposed inputs, of few rows": (
        lambda: linear_of_members(2**27 + 1, 2**27 + 1, 1, 17, 1, 1, WIDE, transposed=True, way="threefry"),
        {"_project_kernel": {"x"}},
    ),
    "a large shared input": (
        lambda: linear_of_members(4, 2, 2**25 + 1, 64, 65, 32, NARROW, shared=True, way="philox"),
        {"_project_kernel": {"x", "out"}, "_linear_kernel": {"base", "projected", "out"}},
    ),
    "a large weight": (
        lambda: linear_of_members(64, 32, 1, 64, 2**25 + 33, 2, NARROW),
        {"_linear_kernel": {"weight", "values", "bias", "out"}},
    ),
    "a large transposed weight": (
        lambda: linear_of_members(1, 1, 1, 17, 2**27 + 33, 1, NARROW, transposed=True),
        {"_linear_kernel": {"weight"}},
    ),
    "many draws": (
        lambda: linear_of_members(2**20, 2**20, 1, 2**7 + 1, 3, 16, NARROW),
        {"_project_kernel": {"values"}},
    ),
    "an update": (
        lambda: add_low_rank_sum_(2**25 + 33, 65, 1, 65, NARROW),
        {"_update_kernel": {"total", "A_values"}},
    ),
    "an update of many inputs": (
        lambda: add_low_rank_sum_(3, 2**30 + 33, 3, 1, NARROW),
        {"_update_kernel": {"total", "B_values"}},
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_offsets_of_more_than_32_bits(what: str, monkeypatch: pytest.MonkeyPatch):
    far: dict[str, set[str]] = {}

    def check(kernel: Any, grid: Any, *arguments: Any, device: torch.device, **constants: Any) -> None:
        if hasattr(kernel, "configs"):
            (configuration,) = kernel.configs
            kernel, constants = kernel.fn, constants | configuration.kwargs
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        programs = (*(grid(named) if callable(grid) else grid), 1, 1)[:3]
        corners = itertools.product(*({0, size - 1} for size in programs))
        reached = check_programs(kernel, programs, named, corners)
        far[kernel.__name__] = {name for name, elements in reached.items() if elements > 2**31}

    for module in (dense, linear, noise, update):
        monkeypatch.setattr(module, "launch", check)
    run, expected = CASES[what]
    run()
    assert far == {kernel: set() for kernel in far} | expected
