"""The fast draws against `eggroll.prng`, which defines them."""

import array_api_compat.torch as xp
import pytest
import torch
from core.support import ulp_distance
from eggroll_torch import threefry
from hypothesis import given, settings
from hypothesis import strategies as st

from eggroll import prng

WORDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
BLOCK = 64


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of so few elements that small draws cross their boundaries."""
    monkeypatch.setattr(threefry, "_BLOCK", BLOCK)


def keys_of(rows: int, n_keys: int) -> torch.Tensor:
    """Keys with words of every kind, uint32 of shape ``(rows, n_keys, 2)``."""
    words = [WORDS[i % len(WORDS)] for i in range(4)] + [
        (i * 0x9E3779B9) % 2**32 for i in range(max(rows * n_keys * 2 - 4, 0))
    ]
    return torch.tensor(words[: rows * n_keys * 2], dtype=torch.uint32).view(rows, n_keys, 2)


@pytest.mark.parametrize("k0", WORDS)
@pytest.mark.parametrize("data", WORDS)
def test_fold_in_equals_the_definition(k0: int, data: int):
    key = torch.tensor([k0, 2**32 - 1 - k0], dtype=torch.uint32)
    fast = threefry.fold_in(key.to(torch.int32), torch.tensor(data).to(torch.int32))
    assert torch.equal(fast.to(torch.uint32), prng.fold_in(key, data))


def test_fold_in_broadcasts_keys_and_numbers():
    keys = keys_of(1, 3)  # (1, 3, 2)
    data = torch.arange(5, dtype=torch.int32)[:, None]  # (5, 1)
    fast = threefry.fold_in(keys.to(torch.int32), data)
    assert torch.equal(fast.to(torch.uint32), prng.fold_in(keys, data))
    assert fast.shape == (5, 3, 2)


@given(words=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), data=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_fold_in_of_any_words(words: tuple[int, int], data: int):
    key = prng.key_from_words(words, xp=xp)
    fast = threefry.fold_in(key.to(torch.int32), torch.tensor(data).to(torch.int32))
    assert torch.equal(fast.to(torch.uint32), prng.fold_in(key, data))


def row_of(sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The layout of a row in which key `k` draws ``sizes[k]`` numbers."""
    key_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return key_of, torch.cat([torch.arange(size, dtype=torch.int32) for size in sizes])


SIZES = [[1], [7], [129], [BLOCK], [BLOCK - 1, 1], [BLOCK + 1, 2], [3, 0, 5], [1, 1, 1, 1], [200, 61], [0]]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_every_element_of_a_row_is_that_of_its_key(sizes: list[int], rows: int, precision: prng.Precision):
    keys = keys_of(rows, len(sizes))
    fast = threefry.draw_normals(keys.to(torch.int32), *row_of(sizes), precision)
    slow = torch.cat([prng.normal(keys[:, k], (size,), precision) for k, size in enumerate(sizes)], dim=1)
    assert ulp_distance(fast, slow) <= (4 if precision == "float32" else 0)


def test_the_bits_equal_the_definition(monkeypatch: pytest.MonkeyPatch):
    """Over a million draws: every bit, through a block of the size that is really used."""
    seen = []
    normal_ = threefry._normal_

    def spy(bits: torch.Tensor, precision: prng.Precision) -> torch.Tensor:
        seen.append(bits.clone())
        return normal_(bits, precision)

    monkeypatch.setattr(threefry, "_normal_", spy)
    key = prng.key(2**40 + 12345, xp=xp)
    size = 2**20 + 1
    fast = threefry.draw_normals(key.to(torch.int32).view(1, 1, 2), *row_of([size]))
    assert len(seen) > 1, "the draw is meant to cross a block"
    assert torch.equal(torch.cat(seen, dim=1)[0].to(torch.uint32), prng.bits(key, (size,)))
    slow = prng.normal(key, (size,))
    assert ulp_distance(fast[0], slow) <= 4
    assert float(fast.abs().max()) > 4.5, "the tail was drawn"


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7, 129), (3, 1, 5)], ids=str)
def test_uniforms_are_the_upper_bits(shape: tuple[int, ...]):
    keys = keys_of(2, 3)
    fast = threefry.draw_uniforms(keys.to(torch.int32), shape)
    expected = (prng.bits(keys, shape).to(torch.int64) >> 8).to(torch.float32) / 2**24
    assert torch.equal(fast, expected)
    assert fast.numel() == 0 or 0 <= float(fast.min()) <= float(fast.max()) < 1
