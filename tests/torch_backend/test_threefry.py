"""The fast draws against `eggroll.prng`, which defines them."""

import os
import subprocess
import sys
import textwrap

import array_api_compat.torch as xp
import pytest
import torch
from core.support import ulp_distance
from hypothesis import given, settings
from hypothesis import strategies as st

from eggroll import prng
from eggroll_torch import threefry

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


def rows_of(lengths: list[int], elsewhere: bool = False) -> threefry.Rows:
    """Rows drawn on the CPU: as a CPU draws them, or as another device does."""
    rows = threefry.Rows(lengths, torch.device("cpu"))
    if elsewhere:
        rows.device = torch.device("meta")
        rows._counter_there = torch.from_numpy(rows._counter.astype("int32"))
        rows._key_of_there = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return rows


LENGTHS = [[1], [7], [129], [BLOCK], [BLOCK - 1, 1], [BLOCK + 1, 2], [3, 0, 5], [1, 1, 1, 1], [200, 61], [0]]
anywhere = pytest.mark.parametrize("elsewhere", [False, True], ids=["NumPy", "PyTorch"])


@pytest.mark.usefixtures("small_blocks")
@anywhere
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_every_element_of_a_row_is_that_of_its_key(
    lengths: list[int], rows: int, precision: prng.Precision, elsewhere: bool
):
    keys = keys_of(rows, len(lengths))
    fast = rows_of(lengths, elsewhere).normals(keys.to(torch.int32), precision)
    slow = torch.cat([prng.normal(keys[:, k], (length,), precision) for k, length in enumerate(lengths)], dim=1)
    assert ulp_distance(fast, slow) <= (4 if precision == "float32" else 0)


@anywhere
@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_equal_the_definition(threads: int, elsewhere: bool):
    """Over a hundred thousand draws, through blocks of the size that is really used, by one thread and by two."""
    key = prng.key(2**40 + 12345, xp=xp)
    length = 2 * threefry._BLOCK + 1
    seen: dict[int, torch.Tensor] = {}

    def floats(bits: torch.Tensor) -> torch.Tensor:
        seen[len(seen)] = bits.clone()
        return (bits >> 8).bitwise_and(2**24 - 1).float()  # which float32 holds

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fast = rows_of([length], elsewhere).draw(key.to(torch.int32).view(1, 1, 2), floats)
    finally:
        torch.set_num_threads(before)
    expected = prng.bits(key, (length,))
    assert torch.equal(fast[0], (expected.to(torch.int64) >> 8).float())
    blocks = sorted(seen.values(), key=lambda block: -block.numel())
    assert len(blocks) == (1 if elsewhere else 3)
    if threads == 1:
        assert torch.equal(torch.cat(list(seen.values()), dim=1)[0].to(torch.uint32), expected)


@anywhere
def test_the_tail_of_the_normals(elsewhere: bool):
    key = prng.key(3, xp=xp)
    fast = rows_of([2**20], elsewhere).normals(key.to(torch.int32).view(1, 1, 2))
    assert ulp_distance(fast[0], prng.normal(key, (2**20,))) <= 4
    assert float(fast.abs().max()) > 4.5
    assert float(fast.mean()) == pytest.approx(0, abs=5e-3)
    assert float(fast.std()) == pytest.approx(1, abs=5e-3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_draws_in_a_forked_process():
    """A process that is forked after draws in threads has none of the threads."""
    program = """
        import os, torch
        from eggroll_torch import threefry

        torch.set_num_threads(2)
        threefry._BLOCK = 1024  # too little for threads of PyTorch's own, which no forked process has either
        rows = threefry.Rows([4 * threefry._BLOCK], torch.device("cpu"))
        key = torch.tensor([[[1, 2]]], dtype=torch.int32)
        expected = rows.normals(key)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(rows.normals(key), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7, 129), (3, 1, 5)], ids=str)
def test_uniforms_are_the_upper_bits(shape: tuple[int, ...]):
    keys = keys_of(2, 3)
    fast = threefry.draw_uniforms(keys.to(torch.int32), shape)
    expected = (prng.bits(keys, shape).to(torch.int64) >> 8).to(torch.float32) / 2**24
    assert torch.equal(fast, expected)
    assert fast.numel() == 0 or 0 <= float(fast.min()) <= float(fast.max()) < 1
