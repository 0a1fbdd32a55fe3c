"""What the kernels' tests share: keys, the core's noise for them, tolerances, and sizes for where they run."""

import torch
from torch import Tensor
from torch_backend.kernels.conftest import INTERPRETED

from eggroll import perturbation, prng

ON_GPU = not INTERPRETED

# Of the output's scale. What is narrow is rounded when it is written, and so is the projection.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def random_keys(*shape: int, device: torch.device) -> Tensor:
    """int32, shape ``(*shape, 2)``."""
    return torch.randint(-(2**31), 2**31, (*shape, 2), dtype=torch.int64).to(torch.int32).to(device)


def core_factors(
    keys: Tensor,
    out_features: int,
    in_features: int,
    rank: int,
    dtype: torch.dtype,
    precision: prng.Precision = "float32",
    rng: prng.Rng = "threefry",
) -> perturbation.LowRank:
    """The core's factors, drawn in `precision` and rounded to `dtype`."""
    A, B = perturbation.low_rank_noise(keys.to(torch.uint32), (out_features, in_features), rank, precision, rng)
    return perturbation.LowRank(A.to(dtype), B.to(dtype))


def signs_of(members: int, draws: int, device: torch.device) -> Tensor:
    """+1, -1, +1, ... where pairs share a draw, else +1, and one member that is not perturbed."""
    signs = torch.ones(members, device=device)
    if members > draws:
        signs[1::2] = -1
    signs[members // 2 : members // 2 + (members > 2)] = 0
    return signs


def error(actual: Tensor, expected: Tensor) -> float:
    """The worst deviation, relative to the largest magnitude of what is expected."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    if expected.numel() == 0:
        return 0.0
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
