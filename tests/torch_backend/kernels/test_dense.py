"""Dense noise against `eggroll.perturbation.dense_noise` and `eggroll.update.dense_sum`."""

import pytest
import torch
from torch_backend.kernels.support import ON_GPU, error, random_keys, signs_of

from eggroll import perturbation, prng
from eggroll.update import dense_sum
from eggroll_torch.kernels import dense

SHAPES = [(), (1,), (5,), (3, 7), (1025,), *([(8192,), (300, 401)] if ON_GPU else [])]
POPULATIONS = [(1, 1), (6, 3), (5, 5), *([(1024, 512)] if ON_GPU else [])]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@shapes
@pytest.mark.parametrize(("members", "draws"), POPULATIONS)
def test_members(shape: tuple[int, ...], members: int, draws: int, dtype: torch.dtype, device: torch.device):
    weight = torch.randn(shape).to(device, dtype)
    keys, signs = random_keys(draws, device=device), signs_of(members, draws, device)
    out = dense.dense_of_members(weight, keys, 0.3 * signs)
    noise = perturbation.dense_noise(keys.to(torch.uint32), shape).repeat_interleave(members // draws, 0)
    change = signs.view(-1, *(1,) * len(shape)) * 0.3 * noise
    expected = weight.double() + change.double()
    assert out.dtype == dtype
    assert error(out, expected) < {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}[dtype]
    assert torch.equal(out[signs == 0], weight.expand(int((signs == 0).sum()), *shape))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_precision(precision: prng.Precision, device: torch.device):
    weight, keys, signs = torch.randn(4, 5).to(device), random_keys(3, device=device), signs_of(6, 3, device)
    noise = perturbation.dense_noise(keys.to(torch.uint32), (4, 5), precision)
    expected = weight + signs.view(-1, 1, 1) * 0.3 * noise.repeat_interleave(2, 0)
    assert error(dense.dense_of_members(weight, keys, 0.3 * signs, precision), expected) < 1e-6
    total, coefficients = torch.randn(4, 5).to(device), torch.randn(3).to(device)
    expected = total + dense_sum(coefficients, noise)
    dense.add_dense_sum_drawn_(total, coefficients, keys, precision)
    assert error(total, expected) < 1e-6


@shapes
def test_philox(shape: tuple[int, ...], device: torch.device):
    weight, keys, signs = torch.randn(shape).to(device), random_keys(3, device=device), signs_of(6, 3, device)
    noise = perturbation.dense_noise(keys.to(torch.uint32), shape, rng="philox")
    expected = weight + signs.view(-1, *(1,) * len(shape)) * 0.3 * noise.repeat_interleave(2, 0)
    assert error(dense.dense_of_members(weight, keys, 0.3 * signs, rng="philox"), expected) < 1e-6
    total, coefficients = torch.randn(shape).to(device), torch.randn(3).to(device)
    expected = total + dense_sum(coefficients, noise)
    dense.add_dense_sum_drawn_(total, coefficients, keys, rng="philox")
    assert error(total, expected) < 1e-6


@shapes
@pytest.mark.parametrize("draws", [1, 3, 300, *([32768] if ON_GPU else [])])
def test_sum(shape: tuple[int, ...], draws: int, device: torch.device):
    if draws == 300 and shape == (1025,) and not ON_GPU:
        pytest.skip("takes seconds in the interpreter")
    keys, coefficients = random_keys(draws, device=device), torch.randn(draws).to(device)
    start = torch.randn(shape).to(device)
    total = start.clone()
    dense.add_dense_sum_drawn_(total, coefficients, keys)
    noise = perturbation.dense_noise(keys.to(torch.uint32), shape).double()
    expected = start.double() + dense_sum(coefficients.double(), noise)
    assert error(total, expected) < (1e-5 if ON_GPU else 2e-6)


def test_sum_in_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("eggroll_torch.kernels.launch._SHORTEST", 1000)
    keys, coefficients = random_keys(300, device=device), torch.randn(300).to(device)
    total = torch.zeros(33, device=device)
    dense.add_dense_sum_drawn_(total, coefficients, keys)
    expected = dense_sum(coefficients, perturbation.dense_noise(keys.to(torch.uint32), (33,)))
    assert error(total, expected) < 2e-6
    again = torch.zeros(33, device=device)
    dense.add_dense_sum_drawn_(again, coefficients, keys)
    assert torch.equal(total, again)
    dense.add_dense_sum_drawn_(again, coefficients, keys, alpha=-2.0, beta=0.5)
    assert error(again, 0.5 * total - 2 * expected) < 2e-6
    again.fill_(torch.nan)
    dense.add_dense_sum_drawn_(again, coefficients, keys, beta=0.0)
    assert torch.equal(total, again)


def test_strided_and_empty_parameters(device: torch.device):
    weight = torch.randn(4, 6).to(device)
    keys, signs = random_keys(2, device=device), signs_of(4, 2, device)
    assert torch.equal(
        dense.dense_of_members(weight.mT, keys, 0.3 * signs),
        dense.dense_of_members(weight.mT.contiguous(), keys, 0.3 * signs),
    )
    assert dense.dense_of_members(weight[:0], keys, 0.3 * signs).shape == (4, 0, 6)
    assert dense.dense_of_members(weight, keys[:0], 0.3 * signs[:0]).shape == (0, 4, 6)
    total = torch.randn(6, 4).to(device).mT
    expected = total + dense_sum(signs[:2], perturbation.dense_noise(keys.to(torch.uint32), (4, 6)))
    dense.add_dense_sum_drawn_(total, signs[:2], keys)
    assert error(total, expected) < 1e-6
    dense.add_dense_sum_drawn_(total, signs[:0], keys[:0])
    assert error(total, expected) < 1e-6


def test_what_is_wrong_shows(device: torch.device):
    """The comparisons above could fail."""
    weight, keys, signs = torch.randn(9).to(device), random_keys(3, device=device), signs_of(6, 3, device)
    right = dense.dense_of_members(weight, keys, 0.3 * signs)
    assert error(dense.dense_of_members(weight, keys, 0.3 * signs.abs()), right) > 0.05
    assert error(dense.dense_of_members(weight, keys.roll(1, 0), 0.3 * signs), right) > 0.05
    assert error(dense.dense_of_members(weight, keys, 0.31 * signs), right) > 1e-3
