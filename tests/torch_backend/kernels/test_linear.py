"""Linear layers of all members against the core's factors, written out in float64."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_backend.kernels.support import ON_GPU, TOLERANCES, core_factors, error, random_keys, signs_of

from eggroll import prng
from eggroll_torch.kernels import linear
from eggroll_torch.kernels.dense import dense_of_members

SCALE, BIAS_SCALE = 0.3, 0.7
FUNCTIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Size(NamedTuple):
    members: int
    draws: int
    rows: int
    in_features: int
    out_features: int


# Tiles are 32 x 32 in the interpreter: rows of one draw that lie in two tiles, draws that share one, odd everything.
SIZES = [
    Size(1, 1, 1, 1, 1),
    Size(6, 3, 5, 33, 35),
    Size(5, 5, 1, 7, 33),
    Size(4, 2, 21, 40, 3),
    Size(36, 18, 1, 20, 5),
]
if ON_GPU:
    SIZES += [
        Size(1024, 512, 1, 1024, 1024),
        Size(1024, 1024, 1, 2049, 1000),
        Size(256, 128, 32, 784, 256),
        Size(64, 32, 129, 257, 511),
        Size(8, 8, 1000, 513, 384),
    ]
TYPICAL = SIZES[1]


class Layer:
    """A layer, its noise, and what its members compute."""

    def __init__(
        self,
        size: Size,
        dtype: torch.dtype,
        device: torch.device,
        *,
        rank: int = 1,
        shared: bool = False,
        bias: str | None = None,
        activation: str | None = None,
        precision: prng.Precision = "float32",
        rng: prng.Rng = "threefry",
    ):
        members, draws, rows, in_features, out_features = size
        self.options: dict[str, Any] = {"activation": activation}
        self.precision, self.rng, self.rank = precision, rng, rank
        self.x = torch.randn(*(() if shared else (members,)), rows, in_features).to(device, dtype)
        self.weight = (torch.randn(out_features, in_features) / max(in_features, 1) ** 0.5).to(device, dtype)
        self.bias = self.bias_keys = None
        if bias in {"shared", "noisy"}:
            self.bias = torch.randn(out_features).to(device, dtype)
        elif bias == "own":
            self.bias = torch.randn(members, out_features).to(device, dtype)
        if bias in {"noisy", "noise alone"}:
            self.bias_keys = random_keys(draws, device=device)
        self.keys = random_keys(draws, device=device)
        self.A, self.B = core_factors(self.keys, out_features, in_features, rank, dtype, precision, rng)
        self.signs = signs_of(members, draws, device)
        self.bias_scales = None if self.bias_keys is None else BIAS_SCALE * self.signs

    def stored(self, **changes: Any) -> Tensor:
        return linear.linear_of_members(**(self._given("A", "B") | changes))

    def drawn(self, **changes: Any) -> Tensor:
        return linear.linear_of_members_drawn(**(self._given("keys", "rank") | changes))

    def _given(self, *noise: str) -> dict[str, Any]:
        names = ("x", "weight", "bias", "signs", "bias_keys", "bias_scales", "precision", "rng", *noise)
        return {name: getattr(self, name) for name in names} | {"scale": SCALE} | self.options

    def expected(self) -> Tensor:
        x, W, A, B, signs = (tensor.double() for tensor in (self.x, self.weight, self.A, self.B, self.signs))
        draw = torch.arange(len(signs), device=x.device) // max(len(signs) // max(len(A), 1), 1)
        noise = ((x @ B[draw]) @ A[draw].mT) * (SCALE * signs)[:, None, None]
        out = x @ W.mT + noise  # (members, rows, out)
        if self.bias is not None:
            out = out + (self.bias if self.bias.ndim == 1 else self.bias.unsqueeze(1)).double()
        if self.bias_keys is not None:
            words, shape = self.bias_keys.to(torch.uint32), self.weight.shape[:1]
            drawn = prng.normal(words, shape, self.precision, rng=self.rng).double()
            out = out + (BIAS_SCALE * signs)[:, None, None] * drawn[draw].unsqueeze(1)
        return FUNCTIONS[self.options["activation"]](out)


ways = pytest.mark.parametrize("way", [Layer.stored, Layer.drawn], ids=["stored", "drawn"])
inputs = pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])


@ways
@inputs
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_every_size(size: Size, shared: bool, way: Callable[..., Tensor], dtype: torch.dtype, device: torch.device):
    layer = Layer(size, dtype, device, rank=2, shared=shared, bias="shared")
    out = way(layer)
    assert out.dtype == dtype
    assert error(out, layer.expected()) < TOLERANCES[dtype]


@ways
@pytest.mark.parametrize(("rank", "shared"), [(1, True), (3, False), (4, True), (16, False), (64, True), (70, False)])
def test_every_rank(rank: int, shared: bool, way: Callable[..., Tensor], dtype: torch.dtype, device: torch.device):
    layer = Layer(Size(4, 2, 3, 33, 9), dtype, device, rank=rank, shared=shared)
    assert error(way(layer), layer.expected()) < TOLERANCES[dtype]


@inputs
@pytest.mark.parametrize(
    ("bias", "activation"),
    [
        *((bias, None) for bias in (None, "shared", "own", "noisy", "noise alone")),
        *(("shared", activation) for activation in FUNCTIONS if activation),
    ],
)
def test_every_bias_and_activation(bias: str | None, activation: str | None, shared: bool, device: torch.device):
    layer = Layer(Size(6, 3, 2, 9, 7), torch.float32, device, shared=shared, bias=bias, activation=activation)
    for way in (layer.stored, layer.drawn):
        assert error(way(), layer.expected()) < 1e-5


def test_an_activation_keeps_what_is_not_a_number_and_saturates(device: torch.device):
    layer = Layer(Size(2, 1, 3, 4, 5), torch.float32, device)
    layer.x[:, 0] = float("nan")
    layer.x[:, 1] *= 1e6
    for activation in FUNCTIONS:
        out = layer.drawn(activation=activation)
        expected = FUNCTIONS[activation](layer.expected())
        assert out[:, 0].isnan().all()
        torch.testing.assert_close(out[:, 1:].double(), expected[:, 1:], rtol=1e-5, atol=1e-5)


def test_small_values_of_an_activation_keep_their_digits(device: torch.device):
    """Not those of gelu far from 0, which PyTorch computes from the same difference."""
    x = torch.logspace(-8, 1, 64).mul(torch.tensor([[1.0], [-1.0]])).view(1, 128, 1).to(device)
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, 1, 1, device=device)
    for activation, function in FUNCTIONS.items():
        out = linear.linear_of_members(x, one, None, zero, zero, one[0], SCALE, activation=activation)
        compared = (x > -1) | (activation not in {"gelu", "gelu_tanh"})
        torch.testing.assert_close(out[compared].double(), function(x.double())[compared], rtol=5e-6, atol=0)


@ways
@inputs
def test_a_narrow_bias_with_noise(shared: bool, way: Callable[..., Tensor], dtype: torch.dtype, device: torch.device):
    layer = Layer(TYPICAL, dtype, device, rank=3, shared=shared, bias="noisy", activation="silu")
    assert error(way(layer), layer.expected()) < TOLERANCES[dtype]


@ways
@pytest.mark.parametrize("rng", ["threefry", "philox"])
@pytest.mark.parametrize("size", [TYPICAL, Size(36, 18, 1, 20, 5)], ids=["5 rows", "1 row"])
def test_the_noise_of_a_bias_is_that_of_a_bias_in_memory(
    size: Size, rng: prng.Rng, way: Callable[..., Tensor], dtype: torch.dtype, device: torch.device
):
    """To the bit, as it is rounded, too."""
    layer = Layer(size, dtype, device, bias="noise alone", rng=rng)
    none = torch.zeros(size.out_features, device=device, dtype=dtype)
    expected = dense_of_members(none, layer.bias_keys, layer.bias_scales, rng=rng)
    assert torch.equal(way(layer, x=torch.zeros_like(layer.x)), expected.unsqueeze(1).expand(-1, size.rows, -1))


@ways
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_noise_drawn_in_a_narrow_dtype(precision: prng.Precision, way: Callable[..., Tensor], device: torch.device):
    layer = Layer(TYPICAL, torch.float32, device, rank=2, bias="noisy", precision=precision)
    assert error(way(layer), layer.expected()) < 1e-5
    assert error(way(layer, precision="float32"), layer.expected()) > 1e-3


@inputs
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_every_size_drawn_by_philox(size: Size, shared: bool, device: torch.device):
    layer = Layer(size, torch.float32, device, rank=2, shared=shared, bias="noisy", rng="philox")
    assert error(layer.drawn(), layer.expected()) < 1e-5


@pytest.mark.parametrize(("rank", "rows"), [(1, 1), (3, 3), (4, 12), (16, 1), (64, 3), (70, 3)])
def test_every_rank_drawn_by_philox(rank: int, rows: int, dtype: torch.dtype, device: torch.device):
    layer = Layer(Size(4, 2, rows, 33, 9), dtype, device, rank=rank, rng="philox")
    assert error(layer.drawn(), layer.expected()) < TOLERANCES[dtype]
    assert error(layer.drawn(rng="threefry"), layer.expected()) > TOLERANCES[dtype]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_noise_drawn_by_philox_in_a_narrow_dtype(precision: prng.Precision, device: torch.device):
    layer = Layer(TYPICAL, torch.float32, device, rank=2, bias="noise alone", precision=precision, rng="philox")
    assert error(layer.drawn(), layer.expected()) < 1e-5


@ways
def test_multiplied_by_the_library(way: Callable[..., Tensor], dtype: torch.dtype, device: torch.device):
    layer = Layer(TYPICAL, dtype, device, rank=2, bias="own", activation="gelu")
    assert error(way(layer, fused=False), layer.expected()) < TOLERANCES[dtype]


@ways
def test_large_weights_are_multiplied_by_the_library(
    way: Callable[..., Tensor], device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    layer = Layer(TYPICAL, torch.bfloat16, device)
    together, apart = way(layer, fused=True), way(layer, fused=False)
    assert not torch.equal(together, apart)  # the library rounds its product
    assert torch.equal(way(layer), together)
    monkeypatch.setattr(linear, "_LIBRARY_FROM", layer.x.shape[-1])
    assert torch.equal(way(layer), apart)


@pytest.fixture(params=["fp32_precision", "allow_tf32"])
def _tensor_cores(request: pytest.FixtureRequest) -> Iterator[None]:
    """float32 on the tensor cores, asked for in PyTorch's new way or in its old one."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    setattr(matmul, request.param, "tf32" if request.param == "fp32_precision" else True)
    yield
    if request.param == "allow_tf32":  # or PyTorch would find, and complain of, the one way set and the other not
        matmul.allow_tf32 = False
    matmul.fp32_precision = before


@ways
@pytest.mark.usefixtures("_tensor_cores")
def test_float32_with_tensor_cores(way: Callable[..., Tensor], device: torch.device):
    assert linear.dot_precision(torch.float32) == "tf32"
    layer = Layer(TYPICAL, torch.float32, device, rank=2, bias="shared")
    assert error(way(layer), layer.expected()) < (2e-3 if ON_GPU else 1e-5)


def product_in_order(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
    """Sums from the first column of `a` to its last, as `numpy.matmul` need not on every processor."""
    out = np.zeros((len(a), b.shape[1]), dtype)
    for column, row in zip(a.T, b, strict=True):
        out += column[:, None] * row
    return out


@pytest.mark.parametrize(("rank", "rows", "shared"), [(1, 1, False), (3, 3, False), (20, 3, False), (5, 3, True)])
def test_the_bits_do_not_depend_on_the_tile(
    rank: int, rows: int, shared: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    """Which tile is the fastest is found out anew in every process; a run that is resumed goes on to the bit."""
    monkeypatch.setattr(linear, "dot_precision", lambda dtype: "tf32")
    if not ON_GPU:
        monkeypatch.setattr(np, "matmul", product_in_order)
    layer = Layer(Size(80, 40, rows, 48, 40), torch.float32, device, rank=rank, shared=shared, bias="noisy")
    found = []
    for tile in ((64, 32, 4, 1), (128, 32, 4, 1), (128, 64, 8, 2)):
        monkeypatch.setattr(linear, "_TILES", (tile,))
        monkeypatch.setattr(linear, "_TILE_OF_SUM", tile)
        monkeypatch.setattr(linear, "_INTERPRETED_TILE", (*tile[:2], 1, 1))
        linear._tuned.cache_clear()
        found.append(layer.stored())
    linear._tuned.cache_clear()
    assert error(found[0], layer.expected()) < (2e-3 if ON_GPU else 1e-5)
    for other in found[1:]:
        assert torch.equal(found[0], other)


@pytest.fixture
def _blocks_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the interpreter, too, whose own are smaller."""
    monkeypatch.setattr(linear, "INTERPRETED", False)
    linear._tuned.cache_clear()
    yield
    linear._tuned.cache_clear()


@pytest.mark.usefixtures("_blocks_of_a_gpu")
@pytest.mark.parametrize(
    ("tile", "rng"), [*zip(linear._TILES, itertools.cycle(("threefry", "philox")), strict=False)], ids=str
)
def test_every_tile_of_a_gpu(
    tile: tuple[int, int, int, int], rng: prng.Rng, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(linear, "_TILES", (tile,))
    layer = Layer(Size(6, 3, 22, 65, 133), torch.bfloat16, device, rank=3, bias="noisy", rng=rng)
    assert error(layer.drawn(), layer.expected()) < TOLERANCES[torch.bfloat16]


@ways
@pytest.mark.usefixtures("_blocks_of_a_gpu")
@pytest.mark.parametrize(
    ("rank", "rows", "dtype"),
    [(1, 1, torch.float32), (3, 9, torch.bfloat16), (4, 33, torch.float32), (17, 1, torch.bfloat16)],
)
def test_projections_in_the_blocks_of_a_gpu(
    rank: int, rows: int, dtype: torch.dtype, way: Callable[..., Tensor], device: torch.device
):
    """Of inputs that are shared, for which the kernel of the product has one tile alone."""
    layer = Layer(Size(2, 1, rows, 300, 5), dtype, device, rank=rank, shared=True)
    assert error(way(layer), layer.expected()) < TOLERANCES[dtype]


@pytest.mark.parametrize("rows", [1, 32, 33, 64, 1000, 2**20])
@pytest.mark.parametrize("out_features", [1, 33, 64, 100, 8192])
def test_no_tile_is_tried_that_adds_up_otherwise(rows: int, out_features: int):
    """On Hopper tiles of 32 rows have other instructions than those of 64 and more."""
    tiles = [linear._configuration(tile, 64) for tile in linear._TILES]
    tried = linear._fitting(tiles, {"all_rows": rows, "out_features": out_features})
    assert tried
    assert len({tile.kwargs["BLOCK_M"] >= 64 for tile in tried}) == 1


@inputs
def test_strided_arguments(shared: bool, dtype: torch.dtype, device: torch.device):
    layer = Layer(Size(6, 3, 4, 17, 19), dtype, device, rank=3, shared=shared)
    expected = layer.expected()
    # As in the engine: both factors are views of one row of noise for each draw, here among other numbers.
    rows = torch.randn(3, 11 + 36 * 3 + 5, device=device).to(dtype)
    views = rows[:, 11 : 11 + 36 * 3].unflatten(1, (36, 3))
    views[:, :17], views[:, 17:] = layer.B, layer.A
    strided = {
        "A": views[:, 17:],
        "B": views[:, :17],
        "weight": layer.weight.mT.contiguous().mT,
        "x": torch.stack([layer.x, layer.x + 1], dim=-1)[..., 0],
        "signs": torch.stack([layer.signs, layer.signs + 1], dim=-1)[..., 0],
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    assert error(layer.stored(**strided), expected) < TOLERANCES[dtype]
    assert error(layer.stored(A=layer.A.mT.contiguous().mT), expected) < TOLERANCES[dtype]


def test_float32_factors_are_rounded_to_the_dtype_of_the_input(device: torch.device):
    layer = Layer(TYPICAL, torch.bfloat16, device, rank=2)
    wide = core_factors(layer.keys, TYPICAL.out_features, TYPICAL.in_features, 2, torch.float32, "float32")
    assert torch.equal(layer.stored(A=wide.A, B=wide.B), layer.stored())


@ways
@inputs
@pytest.mark.parametrize("size", [Size(4, 2, 0, 3, 5), Size(4, 2, 3, 3, 0), Size(4, 2, 3, 0, 5), Size(0, 0, 3, 3, 5)])
def test_nothing_to_do(size: Size, shared: bool, way: Callable[..., Tensor], device: torch.device):
    layer = Layer(size, torch.float32, device, shared=shared, bias="shared")
    out = way(layer)
    assert out.shape == (size.members, size.rows, size.out_features)
    assert torch.equal(out, layer.expected().float())


@ways
@inputs
def test_the_sum_over_inputs_in_parts(
    shared: bool, way: Callable[..., Tensor], device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("eggroll_torch.kernels.launch._SHORTEST", 40)
    layer = Layer(Size(2, 1, 3, 200, 5), torch.float32, device, rank=3, shared=shared)
    assert error(way(layer), layer.expected()) < 1e-5


def test_the_sum_over_inputs_in_parts_drawn_by_philox(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("eggroll_torch.kernels.launch._SHORTEST", 40)
    for rows in (3, 12):
        layer = Layer(Size(2, 1, rows, 200, 5), torch.bfloat16, device, rank=3, rng="philox")
        assert error(layer.drawn(), layer.expected()) < TOLERANCES[torch.bfloat16]


@inputs
@pytest.mark.parametrize("rows", [1, 11])
@pytest.mark.parametrize("rank", [1, 16])
def test_noise_in_memory_equals_noise_in_registers(rows: int, rank: int, shared: bool, device: torch.device):
    layer = Layer(Size(6, 3, rows, 33, 35), torch.float32, device, rank=rank, shared=shared)
    assert error(layer.drawn(), layer.stored()) < 3e-6


WRONG: dict[str, Callable[[Layer], dict[str, Any]]] = {
    "the sign of odd members": lambda layer: {"signs": layer.signs.abs()},
    "the scale": lambda layer: {"scale": 0.31},
    "the keys of other draws": lambda layer: {"keys": layer.keys.roll(1, 0)},
    "the words of a key": lambda layer: {"keys": layer.keys.flip(-1)},
    "the key of the bias": lambda layer: {"bias_keys": layer.keys},
    "the scale of the bias": lambda layer: {"bias_scales": SCALE * layer.signs},
    "the sign of the bias": lambda layer: {"bias_scales": layer.bias_scales.abs()},
    "no noise in the bias": lambda layer: {"bias_keys": None, "bias_scales": None},
    "the inputs of other members": lambda layer: {"x": layer.x.roll(1, 0)},
    "a transposed weight": lambda layer: {"weight": layer.weight.mT},
    "the activation": lambda layer: {"activation": "relu"},
}


def test_what_is_wrong_shows(dtype: torch.dtype, device: torch.device):
    """The comparisons above could fail."""
    layer = Layer(Size(6, 3, 2, 16, 16), dtype, device, rank=2, bias="noisy")
    expected = layer.expected()
    assert error(layer.drawn(), expected) < TOLERANCES[dtype]
    for what, changes in WRONG.items():
        margin = 1.2 if what == "the scale" and dtype == torch.bfloat16 else 3
        assert error(layer.drawn(**changes(layer)), expected) > margin * TOLERANCES[dtype], what


def test_what_the_layer_refuses(device: torch.device):
    layer = Layer(TYPICAL, torch.float32, device)
    with pytest.raises(TypeError, match="`x` and `weight` must have one dtype of"):
        layer.stored(weight=layer.weight.to(torch.bfloat16))
    with pytest.raises(TypeError, match=r"torch\.float64"):
        layer.stored(weight=layer.weight.double(), x=layer.x.double())
    for x in (layer.x[..., 1:], F.pad(layer.x, (0, 1))):
        with pytest.raises(ValueError, match=f"`x` must have the 33 input features of `weight`, .* {x.shape[-1]}"):
            layer.stored(x=x)
    with pytest.raises(ValueError, match="`signs` must have a multiple of the 3 draws, got 5 members"):
        layer.drawn(signs=layer.signs[:5])
    with pytest.raises(ValueError, match=r"`activation` must be None or one of relu, .*, got 'sine'"):
        layer.drawn(activation="sine")
    with pytest.raises(ValueError, match="`bias_keys` and `bias_scales` go together"):
        layer.stored(bias_keys=layer.keys)
