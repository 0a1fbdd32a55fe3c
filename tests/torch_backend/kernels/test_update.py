"""The low-rank sum against `eggroll.update.low_rank_sum`."""

import pytest
import torch
from torch import Tensor
from torch_backend.kernels.support import ON_GPU, core_factors, error, random_keys

from eggroll import prng
from eggroll.perturbation import LowRank
from eggroll.update import low_rank_sum
from eggroll_torch.kernels import launch, update

# Of the sum's scale: the product of a coefficient and a factor is rounded to the dtype; long sums are
# rounded in float32.
TOLERANCES = {torch.float32: 1e-5 if ON_GPU else 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
# draws, out_features, in_features, rank; tiles are 32 x 32 in the interpreter
SIZES = [(1, 1, 1, 1), (5, 35, 40, 3), (40, 7, 20, 1), (3, 33, 65, 16), (2, 5, 3, 64), (9, 32, 32, 4)]
if ON_GPU:
    SIZES += [
        (512, 1000, 784, 1),
        (4096, 256, 256, 1),
        (300, 129, 2049, 4),
        (512, 2048, 2304, 1),
        (32768, 128, 100, 1),
    ]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))


@pytest.fixture(params=["one buffer", "a draw at a time"])
def _buffer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "a draw at a time":
        if ON_GPU:
            pytest.skip("thousands of launches")
        monkeypatch.setattr(update, "_SMALL_BUFFER", 1)
        monkeypatch.setattr(update, "_BYTES_FOR_AN_ELEMENT", 0)


class Sum:
    """A sum over draws: what it starts from, and what comes out."""

    def __init__(
        self,
        size: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        precision: prng.Precision = "float32",
        rng: prng.Rng = "threefry",
    ):
        draws, out_features, in_features, self.rank = size
        self.precision, self.rng = precision, rng
        self.keys = random_keys(draws, device=device)
        self.coefficients = torch.randn(draws).to(device)
        self.start = torch.randn(out_features, in_features).to(device)
        self.factors = core_factors(self.keys, out_features, in_features, self.rank, dtype, precision, rng)
        wide = LowRank(*(factor.double() for factor in self.factors))
        self.change = low_rank_sum(self.coefficients.double(), wide)

    def stored(self, dtype: torch.dtype | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
        total = self.start.clone()
        update.add_low_rank_sum_(total, self.coefficients, *self.factors, dtype, alpha, beta)
        return total

    def drawn(self, dtype: torch.dtype, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
        total, how = self.start.clone(), (self.precision, self.rng, alpha, beta)
        update.add_low_rank_sum_drawn_(total, self.coefficients, self.keys, self.rank, dtype, *how)
        return total


@sizes
def test_factors_in_memory(size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
    case = Sum(size, dtype, device)
    assert error(case.stored() - case.start, case.change) < TOLERANCES[dtype]


@sizes
@pytest.mark.usefixtures("_buffer")
def test_drawn_factors(size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
    case = Sum(size, dtype, device)
    assert error(case.drawn(dtype) - case.start, case.change) < TOLERANCES[dtype]


@pytest.mark.parametrize("size", SIZES[:2], ids=["in the loader", "in a buffer"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_factors_drawn_in_a_narrow_dtype(
    precision: prng.Precision, size: tuple[int, int, int, int], device: torch.device
):
    case = Sum(size, torch.float32, device, precision)
    assert error(case.drawn(torch.float32) - case.start, case.change) < 1e-6


@sizes
@pytest.mark.usefixtures("_buffer")
def test_factors_drawn_by_philox(size: tuple[int, int, int, int], device: torch.device):
    case = Sum(size, torch.float32, device, rng="philox")
    assert error(case.drawn(torch.float32) - case.start, case.change) < TOLERANCES[torch.float32]
    case.rng = "threefry"
    assert error(case.drawn(torch.float32) - case.start, case.change) > 0.01


@pytest.mark.parametrize("size", SIZES[1:3], ids=["in the loader", "in a buffer"])
def test_narrow_factors_drawn_by_philox(size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
    case = Sum(size, dtype, device, "bfloat16", "philox")
    assert error(case.drawn(dtype) - case.start, case.change) < TOLERANCES[dtype]


@pytest.mark.parametrize("size", [(100, 5, 7, 2), (100, 40, 7, 2)], ids=["in the loader", "in a buffer"])
def test_the_sum_over_draws_in_parts(
    size: tuple[int, int, int, int], device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("eggroll_torch.kernels.launch._SHORTEST", 50)
    case = Sum(size, torch.float32, device)
    for found in (case.drawn(torch.float32), case.stored()):
        assert error(found - case.start, case.change) < 1e-6
    assert torch.equal(case.drawn(torch.float32), case.drawn(torch.float32))
    assert error(case.drawn(torch.float32, alpha=3.0, beta=0.5), 0.5 * case.start + 3 * case.change) < 1e-6


@pytest.mark.parametrize(
    ("programs", "length", "parts"),
    [(1, 8192, 16), (4, 1 << 20, 132), (300, 8192, 2), (512, 8192, 1), (528, 8192, 1)],
)
def test_parts_fill_a_device_and_no_more(programs: int, length: int, parts: int, monkeypatch: pytest.MonkeyPatch):
    """Of 132 processors. Parts are added up by a launch of its own, which one program less of 528 is not worth."""
    monkeypatch.setattr(launch, "_processors", lambda device: 132)
    assert launch.splits(programs, length, torch.device("cpu")) == parts


@pytest.mark.usefixtures("_buffer")
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_what_was_there_is_scaled_and_the_sum_too(beta: float, device: torch.device):
    for size in (SIZES[1], SIZES[5]):
        case = Sum(size, torch.float32, device)
        expected = -0.1 * case.change
        if beta:
            expected = expected + beta * case.start
        else:
            case.start.fill_(torch.nan)
        assert error(case.stored(alpha=-0.1, beta=beta), expected) < 1e-6
        assert error(case.drawn(torch.float32, alpha=-0.1, beta=beta), expected) < 1e-6


@pytest.mark.usefixtures("_buffer")
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_narrow_total_is_rounded_once(beta: float, dtype: torch.dtype, device: torch.device):
    """However many buffers of noise it takes: a sum that is rounded after every one is several roundings off."""
    case = Sum((12, 35, 33, 1), torch.float32, device)
    total = case.start.to(dtype)
    expected = (beta * total.double() + case.change).to(dtype)
    update.add_low_rank_sum_drawn_(total, case.coefficients, case.keys, case.rank, beta=beta)
    off = (total.float() - expected.float()).abs() > 1e-5
    # Where two roundings fall to either side of a number in the middle.
    assert float(off.float().mean()) < 0.01


large = pytest.mark.parametrize("size", [SIZES[1], SIZES[3]], ids=["rank 3", "rank 16"])


@large
def test_factors_of_large_matrices_are_scaled_beforehand(
    size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    case = Sum(size, dtype, device)
    in_the_kernel = case.stored()
    launched = []
    add = update._add_sum_
    monkeypatch.setattr(update, "_add_sum_", lambda total, c, *rest: (launched.append(c), add(total, c, *rest)))
    monkeypatch.setattr(update, "_LARGE", 1)
    if dtype == torch.float32:
        assert error(case.stored() - case.start, case.change) < TOLERANCES[dtype]
        assert not launched
    else:
        assert torch.equal(case.stored(), in_the_kernel)
        assert launched == [None]


@large
@pytest.mark.usefixtures("_buffer")
@pytest.mark.parametrize("fused", [None, True])
def test_large_sums_in_one_dtype_are_the_librarys(
    size: tuple[int, int, int, int],
    fused: bool | None,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
):
    case = Sum(size, dtype, device)
    start = case.start.to(dtype)
    expected = 0.5 * start.double() - 2 * case.change
    launched = []
    add = update._add_sum_
    monkeypatch.setattr(update, "_add_sum_", lambda *arguments: (launched.append(1), add(*arguments)))
    monkeypatch.setattr(update, "_LARGE", 1)
    for run, noise in (
        (update.add_low_rank_sum_, case.factors),
        (update.add_low_rank_sum_drawn_, (case.keys, case.rank, dtype)),
    ):
        total = start.clone()
        run(total, case.coefficients, *noise, alpha=-2.0, beta=0.5, fused=fused)
        assert error(total, expected) < TOLERANCES[dtype]
        total.fill_(torch.nan)
        run(total, case.coefficients, *noise, beta=0.0, fused=fused)
        assert error(total, case.change) < TOLERANCES[dtype]
    # Parts of a narrow total are summed in float32 beside it, which the library does not.
    parts = update._SMALL_BUFFER == 1 and dtype != torch.float32
    assert bool(launched) == (bool(fused) or parts)


def test_who_multiplies_is_as_asked_for(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """Whatever the size: the benchmark times both ways, also of a matrix that is none of the large ones."""
    case = Sum((5, 9, 11, 3), dtype, device)
    launched = []
    add = update._add_sum_
    monkeypatch.setattr(update, "_add_sum_", lambda *arguments: (launched.append(1), add(*arguments)))
    for start, fused, by_kernel in (
        (case.start.to(dtype), False, False),
        (case.start.to(dtype), True, True),
        (case.start.double().to(torch.float16 if dtype == torch.float32 else torch.float32), False, True),
    ):
        total = start.clone()
        launched.clear()
        update.add_low_rank_sum_(total, case.coefficients, *case.factors, dtype, fused=fused)
        assert error(total, start.double() + case.change) < TOLERANCES[torch.bfloat16]
        assert bool(launched) == by_kernel


@pytest.mark.parametrize("large", [False, True])
def test_tiles_of_a_gpu(large: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """In the interpreter, too, whose own are smaller."""
    monkeypatch.setattr(update, "INTERPRETED", False)
    if large:
        monkeypatch.setattr(update, "_LARGE", 1)
    for size in ((9, 33, 129, 3), (9, 33, 67, 3)):  # the noise of which is drawn beforehand, and in the loader
        case = Sum(size, torch.bfloat16, device)
        assert error(case.stored() - case.start, case.change) < TOLERANCES[torch.bfloat16]
        assert error(case.drawn(torch.bfloat16) - case.start, case.change) < TOLERANCES[torch.bfloat16]


def test_strided_factors(dtype: torch.dtype, device: torch.device):
    case = Sum((4, 9, 11, 3), dtype, device)
    rows = torch.randn(4, 7 + 20 * 3, device=device).to(dtype)
    views = rows[:, 7:].unflatten(1, (20, 3))
    views[:, :11], views[:, 11:] = case.factors.B, case.factors.A
    total = case.start.clone()
    update.add_low_rank_sum_(total, case.coefficients, views[:, 11:], views[:, :11])
    assert torch.equal(total, case.stored())


def test_wide_factors_for_a_narrow_product(device: torch.device):
    case = Sum((4, 9, 11, 3), torch.float32, device)
    assert error(case.stored(torch.bfloat16) - case.start, case.change) < TOLERANCES[torch.bfloat16]
    assert not torch.equal(case.stored(torch.bfloat16), case.stored())


@pytest.mark.parametrize("size", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2)], ids=str)
def test_nothing_to_do(size: tuple[int, int, int, int], device: torch.device):
    case = Sum(size, torch.float32, device)
    for found in (case.stored(), case.drawn(torch.float32)):
        assert torch.equal(found, case.start)
    for found in (case.stored(beta=0.0), case.drawn(torch.float32, beta=0.0)):
        assert torch.equal(found, torch.zeros_like(case.start))


def test_what_is_wrong_shows(device: torch.device):
    """The comparisons above could fail."""
    case = Sum((6, 9, 9, 2), torch.float32, device)
    right = case.change
    case.keys = case.keys.roll(1, 0)
    assert error(case.drawn(torch.float32) - case.start, right) > 0.1
    case.keys = case.keys.roll(-1, 0)
    assert error((case.drawn(torch.float32) - case.start).mT, right) > 0.1
    case.coefficients = case.coefficients * torch.tensor([1.0, -1.0] * 3, device=device)
    assert error(case.drawn(torch.float32) - case.start, right) > 0.1


def test_what_the_sum_refuses(device: torch.device):
    case = Sum((2, 4, 4, 1), torch.float32, device)
    case.start = torch.randn(4, 8, device=device)[:, ::2]
    with pytest.raises(ValueError, match="`total` must be a contiguous matrix"):
        update.add_low_rank_sum_(case.start, case.coefficients, *case.factors)
    with pytest.raises(TypeError, match=r"`dtype` must be one of .*, got torch\.float64"):
        update.add_low_rank_sum_(torch.zeros(4, 4, device=device), case.coefficients, *case.factors, torch.float64)
