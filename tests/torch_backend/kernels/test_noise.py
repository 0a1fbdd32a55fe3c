"""Noise that kernels draw, against `eggroll.prng`: integers to the bit, normals to four units in the last place."""

import array_api_compat.torch as xp
import pytest
import torch
from core.support import ulp_distance
from torch import Tensor
from torch_backend.kernels.support import ON_GPU, core_factors, error, random_keys

from eggroll import prng
from eggroll_torch.drawing import Draws, Rows
from eggroll_torch.kernels import noise

WORDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
PRECISIONS: list[prng.Precision] = ["float32", "bfloat16", "float16"]


def keys_of_every_kind(rows: int, n_keys: int, device: torch.device) -> Tensor:
    """int32, shape ``(rows, n_keys, 2)``: the edges of the words' range, then random words."""
    keys = random_keys(rows * n_keys, device=device)
    edges = torch.tensor([(a, b) for a in WORDS for b in WORDS], dtype=torch.uint32).to(torch.int32)[: len(keys)]
    keys[: len(edges)] = edges.to(device)
    return keys.view(rows, n_keys, 2)


def places(lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Whose draw each element of a row belongs to, and which element of it it is."""
    key_of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    counter = torch.cat([torch.arange(length) for length in lengths])
    return key_of.to(device, torch.int32), counter.to(device, torch.int32)


@pytest.mark.parametrize(("n_keys", "draws"), [(1, 1), (25, 3), (7, 300), (0, 4), (3, 0)])
def test_folded_keys_equal_the_definition(n_keys: int, draws: int, device: torch.device):
    keys = keys_of_every_kind(1, n_keys, device)[0]
    data = random_keys(draws, device=device)[:, 0].contiguous()
    data[: len(WORDS)] = torch.tensor(WORDS, dtype=torch.uint32).to(torch.int32).to(device)[:draws]
    folded = noise.fold_in(keys, data)
    assert folded.shape == (draws, n_keys, 2)
    for key in range(n_keys):  # or every kernel would copy those of its parameter first
        assert folded[:, key].is_contiguous()
    if folded.numel():
        assert torch.equal(folded.to(torch.uint32), prng.fold_in(keys.to(torch.uint32), data[:, None]))


def test_the_bits_equal_the_definition(device: torch.device):
    """Both words of the blocks at the first counters; the bits of a draw are their exclusive or."""
    length = 2**20 if ON_GPU else 5000
    keys = keys_of_every_kind(1, 3, device)[0]
    words = noise.fold_in(keys, torch.arange(length, dtype=torch.int32, device=device))  # (length, 3, 2)
    bits = words[..., 0] ^ words[..., 1]
    assert torch.equal(bits.mT.contiguous().to(torch.uint32), prng.bits(keys.to(torch.uint32), (length,)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("lengths", [[1], [7], [129], [3, 0, 5], [1, 1, 1, 1], [1000, 61], [1024], [1025]], ids=str)
def test_every_element_of_a_row_is_that_of_its_key(
    lengths: list[int], rows: int, precision: prng.Precision, device: torch.device
):
    keys = keys_of_every_kind(rows, len(lengths), device)
    drawn = noise.draw_rows(keys, *places(lengths, device), precision)
    words = keys.cpu().to(torch.uint32)
    expected = torch.cat([prng.normal(words[:, k], (length,), precision) for k, length in enumerate(lengths)], dim=1)
    assert ulp_distance(drawn.cpu(), expected) <= (4 if precision == "float32" else 0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_block_of_philox_is_that_of_its_counter(precision: prng.Precision, device: torch.device):
    """Draws of several shapes and streams, as the engine lays them out."""
    draws = [Draws(2, (3, 5)), Draws(1, ()), Draws(3, (2, 1025), 1), Draws(1, (0, 3)), Draws(2, (130,), 7)]
    keys = keys_of_every_kind(4, sum(draw.keys for draw in draws), device)
    rows = Rows(draws, device, "philox")
    first, words = 0, keys.cpu().to(torch.uint32)
    for draw, drawn in zip(draws, rows.normals(keys, precision), strict=True):
        own, first = words[:, first : first + draw.keys], first + draw.keys
        expected = prng.normal(own, draw.shape, precision, rng="philox", stream=draw.stream)
        assert drawn.shape == expected.shape
        if drawn.numel():
            assert ulp_distance(drawn.cpu(), expected) <= (4 if precision == "float32" else 0)


@pytest.mark.parametrize("rng", ["threefry", "philox"])
@pytest.mark.parametrize(("out_features", "in_features", "rank"), [(1, 1, 1), (7, 33, 3), (1030, 5, 2), (4, 1025, 1)])
def test_factors_of_the_update(
    out_features: int, in_features: int, rank: int, rng: prng.Rng, dtype: torch.dtype, device: torch.device
):
    keys, coefficients = random_keys(3, device=device), torch.randn(3).to(device)
    found = noise.draw_factors(keys, coefficients, rank, in_features, out_features, "float32", rng, dtype)
    A, B = core_factors(keys, out_features, in_features, rank, dtype, rng=rng)
    scaled = (A.float() * coefficients.view(-1, 1, 1)).to(dtype)
    for factor, expected in zip(found, (scaled, B), strict=True):
        assert factor.dtype == dtype
        assert error(factor, expected) < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


def test_rows_are_rounded_to_their_dtype(dtype: torch.dtype, device: torch.device):
    keys = random_keys(2, 1, device=device)
    where = places([3000], device)
    assert torch.equal(noise.draw_rows(keys, *where, "float32", dtype), noise.draw_rows(keys, *where).to(dtype))


@pytest.mark.parametrize(("rows", "lengths"), [(0, [3]), (2, [0])])
def test_no_rows_and_empty_rows(rows: int, lengths: list[int], device: torch.device):
    drawn = noise.draw_rows(random_keys(rows, 1, device=device), *places(lengths, device))
    assert drawn.shape == (rows, sum(lengths))


def test_the_tail_of_the_normals(device: torch.device):
    """Where the uniform is close to 1 a fused multiply-add in the wrong place shows."""
    length = 2**24 if ON_GPU else 2**18
    key = prng.key(3, xp=xp)
    drawn = noise.draw_rows(key.to(device, torch.int32).view(1, 1, 2), *places([length], device))[0]
    assert ulp_distance(drawn.cpu(), prng.normal(key, (length,))) <= 4
    assert float(drawn.abs().max()) > 4.3
    assert float(drawn.mean()) == pytest.approx(0, abs=1e-2)
    assert float(drawn.std()) == pytest.approx(1, abs=1e-2)


def test_another_key_or_counter_draws_other_numbers(device: torch.device):
    """The comparisons above could fail."""
    keys = random_keys(1, 2, device=device)
    key_of, counter = places([64], device)
    drawn = noise.draw_rows(keys, key_of, counter)
    assert not torch.isclose(drawn, noise.draw_rows(keys, key_of + 1, counter)).any()
    assert not torch.isclose(drawn, noise.draw_rows(keys, key_of, counter + 1)).any()
    assert not torch.isclose(drawn, noise.draw_rows(keys.flip(-1), key_of, counter)).any()
    assert not torch.equal(drawn, noise.draw_rows(keys, key_of, counter, "float16"))
