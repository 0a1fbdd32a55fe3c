"""The fast draws against `eggroll.prng`, which defines them."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import array_api_compat.numpy as numpy_xp
import array_api_compat.torch as xp
import numpy as np
import pytest
import torch
from core.support import ulp_distance
from hypothesis import given, settings
from hypothesis import strategies as st

from eggroll import prng
from eggroll_torch import drawing, threefry
from eggroll_torch.drawing import Draws, Rows, draw_uniforms

WORDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
with_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="Numba is not installed")
loops = threefry.compiled_for_cpu()
BLOCK = getattr(loops, "_BLOCK", 1024)
SHARE = getattr(loops, "_SHARE", 1)


@pytest.fixture(params=[pytest.param("Numba", marks=with_numba), "PyTorch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What draws: the compiled loops of a CPU, or PyTorch's operations, as on other devices."""
    if request.param == "PyTorch":
        monkeypatch.setattr(threefry, "compiled_for_cpu", lambda: None)
    return request.param


on_both_paths = pytest.mark.usefixtures("path")
rngs = pytest.mark.parametrize("rng", ["threefry", "philox"])


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, also for a few draws."""
    if loops is not None:
        monkeypatch.setattr(loops, "_SHARE", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def keys_of(rows: int, n_keys: int) -> torch.Tensor:
    """Keys with words of every kind, uint32 of shape ``(rows, n_keys, 2)``."""
    words = [WORDS[i % len(WORDS)] for i in range(4)] + [
        (i * 0x9E3779B9) % 2**32 for i in range(max(rows * n_keys * 2 - 4, 0))
    ]
    return torch.tensor(words[: rows * n_keys * 2], dtype=torch.uint32).view(rows, n_keys, 2)


@on_both_paths
@pytest.mark.parametrize("k0", WORDS)
@pytest.mark.parametrize("data", WORDS)
def test_fold_in_equals_the_definition(k0: int, data: int):
    key = torch.tensor([k0, 2**32 - 1 - k0], dtype=torch.uint32)
    fast = threefry.fold_in(key.to(torch.int32), torch.tensor(data).to(torch.int32))
    assert torch.equal(fast.to(torch.uint32), prng.fold_in(key, data))


@on_both_paths
def test_fold_in_broadcasts_keys_and_numbers():
    keys = keys_of(1, 3)  # (1, 3, 2)
    data = torch.arange(5, dtype=torch.int32)[:, None]  # (5, 1)
    fast = threefry.fold_in(keys.to(torch.int32), data)
    assert torch.equal(fast.to(torch.uint32), prng.fold_in(keys, data))
    assert fast.shape == (5, 3, 2)


@on_both_paths
@given(words=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), data=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_fold_in_of_any_words(words: tuple[int, int], data: int):
    key = prng.key_from_words(words, xp=xp)
    fast = threefry.fold_in(key.to(torch.int32), torch.tensor(data).to(torch.int32))
    assert torch.equal(fast.to(torch.uint32), prng.fold_in(key, data))


def rows_of(lengths: list[int], rng: prng.Rng = "threefry") -> Rows:
    return Rows([Draws(1, (length,)) for length in lengths], torch.device("cpu"), rng)


LENGTHS = [
    [1],
    [7],
    [129],
    [BLOCK],
    [BLOCK - 1, 1],
    [BLOCK + 1, 2],
    [3, 0, 5],
    [0, 4, 0],
    [1, 1, 1, 1],
    [2 * BLOCK + 200, 61],
    [0],
]


@pytest.mark.usefixtures("path", "two_threads")
@rngs
@pytest.mark.parametrize(
    ("rows", "precision"), [(0, "float32"), (1, "float32"), (2, "bfloat16"), (9, "float16"), (9, "float32")]
)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_element_of_a_row_is_that_of_its_key(
    lengths: list[int], rows: int, precision: prng.Precision, rng: prng.Rng
):
    keys = keys_of(rows, len(lengths))
    drawn = rows_of(lengths, rng).normals(keys.to(torch.int32), precision)
    for k, (length, fast) in enumerate(zip(lengths, drawn, strict=True)):
        assert fast.shape == (rows, 1, length)
        if fast.numel():
            slow = prng.normal(keys[:, k], (length,), precision, rng=rng)
            assert ulp_distance(fast[:, 0], slow) <= (4 if precision == "float32" else 0)


SHAPES = [
    Draws(2, (3, 5)),
    Draws(1, ()),
    Draws(3, (2, 1, 4)),
    Draws(2, (0, 7)),
    Draws(0, (3,)),
    Draws(1, (2, 0)),
    Draws(2, (3, BLOCK + 3), 1),
    Draws(1, (9,), 7),
]


@pytest.mark.usefixtures("path", "two_threads")
@rngs
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_draws_of_any_shape_side_by_side(rows: int, rng: prng.Rng):
    """Bits to the bit, in every axis and, with Philox, stream."""
    draws = [draw if rng == "philox" else draw._replace(stream=0) for draw in SHAPES]
    keys = keys_of(rows, sum(draw.keys for draw in draws))
    first = 0
    together = Rows(draws, torch.device("cpu"), rng)
    for draw, bits in zip(draws, together.bits(keys.to(torch.int32)), strict=True):
        own, first = keys[:, first : first + draw.keys], first + draw.keys
        assert torch.equal(bits.to(torch.uint32), prng.bits(own, draw.shape, rng=rng, stream=draw.stream))


@on_both_paths
@rngs
@pytest.mark.parametrize("draws", [[draw] for draw in SHAPES] + [SHAPES[:2], SHAPES[2:4], SHAPES[5:7]], ids=str)
def test_few_draws_are_found_as_many_are(draws: list[Draws], rng: prng.Rng, monkeypatch: pytest.MonkeyPatch):
    """Their places are counted on the device; those of many come from the host."""
    keys = keys_of(3, sum(draw.keys for draw in draws)).to(torch.int32)
    monkeypatch.setattr(threefry, "compiled_for_cpu", lambda: None)
    few = Rows(draws, torch.device("cpu"), rng)
    monkeypatch.setattr(drawing, "_COUNTED", 0)
    many = Rows(draws, torch.device("cpu"), rng)
    for counted, copied in zip(few._places(where := torch.device("cpu")), many._places(where), strict=True):
        assert torch.equal(counted, copied)
        assert counted.dtype == torch.int32
    for ours, theirs in zip(few.bits(keys), many.bits(keys), strict=True):
        assert torch.equal(ours, theirs)


@on_both_paths
@rngs
def test_one_thread_and_two_draw_the_same(rng: prng.Rng):
    """Over a hundred thousand draws, as many as threads are worth."""
    key = prng.key(2**40 + 12345, xp=xp)
    rows = rows_of([8 * SHARE + 1], rng)
    drawn = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            drawn += rows.bits(key.to(torch.int32).view(1, 1, 2))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(drawn[0][0, 0].to(torch.uint32), prng.bits(key, (8 * SHARE + 1,), rng=rng))
    assert torch.equal(drawn[0], drawn[1])


@with_numba
def test_the_normal_of_every_mantissa():
    """All 2**23 of them: `eggroll.prng` makes nothing of the other bits."""
    bits = np.arange(2**23, dtype=np.uint32) << 9
    fast = np.empty(2**23, np.float32)
    loops._floats(bits, loops._NORMAL, loops._NO_TABLE, 0, fast)
    uniform = prng._uniform_of(numpy_xp, np.arange(2**23, dtype=np.int32), 23)
    assert ulp_distance(fast, (prng._erfinv(numpy_xp, uniform) * prng.SQRT2).astype(np.float32)) <= 4


@with_numba
def test_the_loops_use_the_widest_registers():
    from llvmlite.binding import get_host_cpu_features

    if not get_host_cpu_features().get("avx512f"):
        pytest.skip("this processor has no registers of 512 bits")
    loops._normals(np.zeros(64, np.uint32), np.zeros(64, np.float32))
    assembly = "".join(loops._normals.inspect_asm().values())
    assert assembly.count("%zmm") > assembly.count("%ymm")


@on_both_paths
@rngs
def test_the_tail_of_the_normals(rng: prng.Rng):
    key = prng.key(3, xp=xp)
    (fast,) = rows_of([2**20], rng).normals(key.to(torch.int32).view(1, 1, 2))
    assert ulp_distance(fast[0, 0], prng.normal(key, (2**20,), rng=rng)) <= 4
    assert float(fast.abs().max()) > 4.5
    assert float(fast.mean()) == pytest.approx(0, abs=5e-3)
    assert float(fast.std()) == pytest.approx(1, abs=5e-3)


PROGRAM = """
    import logging, sys
    {before}
    logging.basicConfig(level=logging.INFO)
    import torch
    from eggroll_torch.drawing import Draws, Rows

    keys = torch.tensor([[[1, 2]]], dtype=torch.int32)
    print(Rows([Draws(1, (3,))], torch.device("cpu")).normals(keys)[0].tolist())
"""


def drawn_by(before: str) -> str:
    """What a new process says on the way to the first three normals, which are the right ones."""
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM.format(before=before))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    expected = prng.normal(torch.tensor([1, 2], dtype=torch.uint32), (3,))
    assert ulp_distance(torch.tensor(ast.literal_eval(done.stdout))[0, 0], expected) <= 4
    return done.stderr


def test_without_numba_pytorch_draws_and_the_log_says_so():
    said = drawn_by('sys.modules["numba"] = None  # the import fails')
    assert "INFO:eggroll:PyTorch's operations draw noise on CPUs" in said
    assert "not installed" in said


@pytest.mark.parametrize("error", ["ImportError", "SystemError", "OSError"])
def test_a_numba_that_cannot_be_imported_is_a_warning(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "numba.py").write_text(f"raise {error}('NumPy is too new')")
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert threefry.compiled_for_cpu.__wrapped__() is None
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("eggroll", "WARNING")
    assert record.getMessage().startswith("PyTorch's operations draw noise on CPUs")
    assert f"{error}: NumPy is too new" in record.getMessage()


@with_numba
def test_where_numba_is_its_loops_are_compiled():
    assert loops is not None


@with_numba
def test_ctrl_c_waits_for_the_import_of_numba():
    """One that is cut short leaves modules behind that cannot be imported again."""
    program = """
        import signal, sys
        from eggroll_torch import threefry

        class Strike:
            def find_spec(self, name, path=None, target=None):
                if name == "numba.core.config":
                    signal.raise_signal(signal.SIGINT)

        sys.meta_path.insert(0, Strike())
        try:
            threefry.compiled_for_cpu()
        except KeyboardInterrupt:
            assert "eggroll_torch.drawing_cpu" in sys.modules
            assert threefry.compiled_for_cpu() is not None
            print("interrupted")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


@with_numba
def test_a_damaged_cache_is_passed_over(tmp_path: Path):
    package = Path(shutil.copytree(Path(drawing.__file__).parent, tmp_path / "eggroll_torch"))
    kept = list(package.rglob("*.nbi"))
    if not kept:
        pytest.skip("Numba cannot write beside the package, or is told to write elsewhere")
    for file in kept:
        file.write_bytes(b"")
    drawn_by(f"sys.path.insert(0, {str(tmp_path)!r})")


@on_both_paths
def test_words_of_another_dtype_or_number_are_an_error():
    keys = torch.zeros(2, 3, 2, dtype=torch.int32)
    rows = rows_of([3, 3, 3])
    with pytest.raises(TypeError, match="`keys` must be int32"):
        threefry.fold_in(keys.long(), torch.tensor(0, dtype=torch.int32))
    with pytest.raises(TypeError, match="`data` must be int32"):
        threefry.fold_in(keys, torch.tensor(0))
    with pytest.raises(TypeError, match="`keys` must be int32"):
        rows.bits(keys.long())
    for draw in (rows.bits, rows.normals):
        with pytest.raises(ValueError, match=r"`keys` must have shape \(rows, 3, 2\), got \(2, 1, 2\)"):
            draw(keys[:, :1])
    with pytest.raises(ValueError, match=r"at most 2\*\*31 - 1 elements, got 2147483648"):
        rows_of([1, 2**31])
    with pytest.raises(ValueError, match="`rng` must be one of 'threefry', 'philox', got 'pcg64'"):
        rows_of([1], "pcg64")


@with_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_draws_in_a_forked_process():
    """A process that is forked after draws in threads has none of the threads."""
    program = """
        import os, signal, torch
        from eggroll_torch.drawing import Draws, Rows
        from eggroll_torch.drawing_cpu import _SHARE

        torch.set_num_threads(2)
        rows = Rows([Draws(1, (4 * _SHARE,))], torch.device("cpu"))
        key = torch.tensor([[[1, 2]]], dtype=torch.int32)
        (expected,) = rows.normals(key)
        child = os.fork()
        if child == 0:
            signal.alarm(300)
            os._exit(0 if torch.equal(rows.normals(key)[0], expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("path", "two_threads")
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7, 529), (3, 1, 5)], ids=str)
def test_uniforms_are_the_upper_bits(shape: tuple[int, ...]):
    keys = keys_of(2, 3)
    fast = draw_uniforms(keys.to(torch.int32), shape)
    expected = (prng.bits(keys, shape).to(torch.int64) >> 8).to(torch.float32) / 2**24
    assert torch.equal(fast, expected)
    assert fast.numel() == 0 or 0 <= float(fast.min()) <= float(fast.max()) < 1
