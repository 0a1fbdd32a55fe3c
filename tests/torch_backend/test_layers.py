"""One contract for every kind of layer: a member of the population equals the model with that member's weights."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch_backend.support import run_one_by_one

from eggroll.torch import EGGROLLTrainer, MaterialisedWarning

MEMBERS = 12
ROWS = 2
WIDTH = 24


class Call(nn.Module):
    """A module whose forward is a function of its weights and the input."""

    def __init__(self, forward: Callable[..., torch.Tensor], **weights: tuple[int, ...]):
        super().__init__()
        self._forward = forward
        for name, shape in weights.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


class Bag(nn.Module):
    def __init__(self, mode: str, offsets: bool = False, padding_idx: int | None = None):
        super().__init__()
        self.bag = nn.EmbeddingBag(50, WIDTH, mode=mode, padding_idx=padding_idx)
        self.offsets = offsets

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        if not self.offsets:
            return self.bag(index)
        return self.bag(index.reshape(-1), torch.tensor([0, 1, 1, 4]))


class Attention(nn.Module):
    def __init__(self, need_weights: bool = True, masked: bool = False, **options: object):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, **options)  # type: ignore[arg-type]
        self.need_weights = need_weights
        self.masked = masked
        self.kdim = options.get("kdim", WIDTH)

    def forward(self, x: torch.Tensor) -> object:
        memory = x[..., : self.kdim]
        mask = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1) if self.masked else None
        return self.attention(x, memory, memory, need_weights=self.need_weights, attn_mask=mask)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(index)))


class Pointwise(nn.Module):
    """A convolution of length 1 that is also used as a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.conv(x.unsqueeze(-1)).squeeze(-1), self.conv.weight.squeeze(-1))


class Experts(nn.Module):
    """Each row goes to the expert that its first three numbers choose, through as many grouped products as layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 40, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(3, 40, WIDTH) / 40**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        expert, order = x[:, :3].argmax(-1).sort()
        ends = (expert <= torch.arange(3).unsqueeze(1)).sum(1, dtype=torch.int32)
        hidden = torch._grouped_mm(x[order], self.up.transpose(-2, -1), offs=ends)
        product = getattr(F, "grouped_mm", torch._grouped_mm)
        return product(torch.tanh(hidden), self.down, offs=ends)[order.argsort()]


class Rowwise(nn.Module):
    """A module run for each entry of the first axis."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(self.module)(x)


def features(*shape: int) -> Callable[[int | None], torch.Tensor]:
    return lambda members: torch.randn(*(() if members is None else (members,)), *shape)


def indices(*shape: int) -> Callable[[int | None], torch.Tensor]:
    return lambda members: torch.randint(0, 50, (*(() if members is None else (members,)), *shape))


@dataclass
class Case:
    """A model and its input; `materialises` where the documented fallback is what is expected."""

    model: Callable[[], nn.Module]
    x: Callable[[int | None], torch.Tensor]
    guarded: bool = True
    materialises: bool = False


def conv(kind: type[nn.Module], spatial: tuple[int, ...], channels: int = 8, **options: object) -> Case:
    return Case(lambda: kind(channels, 16, **options), features(ROWS, channels, *spatial), guarded=False)  # type: ignore


rows = features(ROWS, WIDTH)
CASES = {
    "linear": Case(lambda: nn.Linear(WIDTH, 40), rows),
    "linear without bias": Case(lambda: nn.Linear(WIDTH, 40, bias=False), rows),
    "linear of a vector": Case(lambda: nn.Linear(WIDTH, 40), features(WIDTH)),
    "linear of a 4-d input": Case(lambda: nn.Linear(WIDTH, 40), features(1, 2, 1, WIDTH)),
    "bilinear use of one weight": Case(lambda: Call(lambda m, x: (x @ m.w) @ m.w.T, w=(WIDTH, 40)), rows),
    "mlp": Case(lambda: nn.Sequential(nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH)), rows),
    "norms": Case(lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40), nn.RMSNorm(40)), rows),
    "weights through a layer": Case(
        lambda: Call(lambda m, x: x @ F.linear(m.w, m.v).mT, w=(40, WIDTH), v=(WIDTH, WIDTH)),
        rows,
        guarded=False,
        materialises=True,
    ),
    "type": Case(lambda: Call(lambda m, x: F.linear(x.type(m.w.type()), m.w.type(x.dtype)), w=(40, WIDTH)), rows),
    "x @ W": Case(lambda: Call(lambda m, x: x @ m.w, w=(WIDTH, 40)), rows),
    "x @ W.T": Case(lambda: Call(lambda m, x: x @ m.w.T, w=(40, WIDTH)), rows),
    "W @ x": Case(lambda: Call(lambda m, x: m.w @ x, w=(40, WIDTH)), features(WIDTH, ROWS)),
    "W @ vector": Case(lambda: Call(lambda m, x: m.w @ x, w=(40, WIDTH)), features(WIDTH)),
    "W.mT @ x": Case(lambda: Call(lambda m, x: torch.matmul(m.w.mT, x), w=(WIDTH, 40)), features(WIDTH, ROWS)),
    "addmm": Case(lambda: Call(lambda m, x: torch.addmm(m.b, x, m.w, alpha=0.5), w=(WIDTH, 40), b=(40,)), rows),
    "einsum": Case(lambda: Call(lambda m, x: torch.einsum("bi,oi->bo", x, m.w), w=(40, WIDTH)), rows),
    "einsum, weight first": Case(lambda: Call(lambda m, x: torch.einsum("io,bi->ob", m.w, x), w=(WIDTH, 40)), rows),
    "einsum, heads": Case(
        lambda: Call(lambda m, x: torch.einsum("bi,hdi->bhd", x, m.w.view(4, 10, WIDTH)), w=(40, WIDTH)), rows
    ),
    "einsum, any axes": Case(
        lambda: Call(lambda m, x: torch.einsum("...i, oi -> o...", x, m.w), w=(40, WIDTH)), features(2, 1, WIDTH)
    ),
    "einsum, any axes, which are none": Case(
        lambda: Call(lambda m, x: torch.einsum("oi,...i->...o", m.w, x), w=(40, WIDTH)), features(WIDTH)
    ),
    "einsum, output not said": Case(lambda: Call(lambda m, x: torch.einsum("zi,ia", x, m.w), w=(WIDTH, 40)), rows),
    "einsum, neither axes nor output said": Case(
        lambda: Call(lambda m, x: torch.einsum("...i,ia", x, m.w), w=(WIDTH, 40)), features(2, 1, WIDTH)
    ),
    "tensordot": Case(
        lambda: Call(lambda m, x: torch.tensordot(x, m.w, 1) @ torch.tensordot(m.w, x, ([0], [-1])), w=(WIDTH, 40)),
        rows,
    ),
    "tensordot of experts": Case(
        lambda: Call(lambda m, x: torch.tensordot(x, m.w, dims=[(1,), (-1,)]), w=(3, 40, WIDTH)), rows
    ),
    "inner": Case(lambda: Call(lambda m, x: x.inner(m.w).T + torch.inner(m.w, x), w=(40, WIDTH)), rows),
    "bilinear": Case(
        lambda: Call2(nn.Bilinear(WIDTH, 20, 10), lambda x: (x, x[..., :20].sin())), features(2, 1, WIDTH)
    ),
    "bilinear without bias": Case(
        lambda: Call2(nn.Bilinear(WIDTH, 20, 10, bias=False), lambda x: (x, x[..., :20])), features(WIDTH)
    ),
    "experts, bmm": Case(lambda: Call(lambda m, x: torch.bmm(x, m.w.mT), w=(3, 40, WIDTH)), features(3, ROWS, WIDTH)),
    "experts, einsum": Case(lambda: Call(lambda m, x: torch.einsum("bi,eoi->beo", x, m.w), w=(3, 40, WIDTH)), rows),
    "x @ W, 3-d": Case(lambda: Call(lambda m, x: x @ m.w, w=(WIDTH, 40)), features(2, 1, WIDTH)),
    "x @ W, 4-d": Case(lambda: Call(lambda m, x: torch.matmul(x, m.w.t()), w=(40, WIDTH)), features(2, 1, 1, WIDTH)),
    "W @ x, 3-d": Case(lambda: Call(lambda m, x: m.w @ x, w=(40, WIDTH)), features(2, WIDTH, 1)),
    "vector of weights @ W": Case(lambda: Call(lambda m, x: x + m.v @ m.w, v=(40,), w=(40, WIDTH)), rows),
    "permuted, by keyword": Case(lambda: Call(lambda m, x: x @ m.w.permute(dims=(1, 0)), w=(40, WIDTH)), rows),
    "experts, grouped": Case(Experts, features(5, WIDTH)),
    "experts, grouped, in a vmap": Case(lambda: Rowwise(Experts()), features(2, 5, WIDTH)),
    "experts, groups of its own": Case(
        lambda: Call(
            lambda m, x: torch._grouped_mm(x, m.w.mT, offs=torch.stack([1 + (m.b[0] > 0), 5 + 0 * m.b[0]]).int()),
            w=(2, 40, WIDTH),
            b=(1,),
        ),
        features(5, WIDTH),
    ),
    "experts, one by one": Case(
        lambda: Call(
            lambda m, x: sum(F.linear(x, w) for w in m.w.unbind(0)) + F.linear(x, m.w[-1]), w=(3, 40, WIDTH)
        ),
        rows,
    ),
    "slices": Case(
        lambda: Call(
            lambda m, x: torch.cat([F.linear(x, m.w[:7]), x[:, :9] @ m.w[7:, :9].T, F.linear(x, m.w[3:5])], -1),
            w=(40, WIDTH),
        ),
        rows,
    ),
    "chunks": Case(lambda: Call(lambda m, x: sum(F.linear(x, w) for w in m.w.chunk(4)), w=(40, WIDTH)), rows),
    "split": Case(
        lambda: Call(lambda m, x: torch.cat([F.linear(x, w) for w in m.w.split([15, 25])], -1), w=(40, WIDTH)), rows
    ),
    "narrow": Case(lambda: Call(lambda m, x: F.linear(x, m.w.narrow(0, 5, 20)), w=(40, WIDTH)), rows),
    "scaled weight": Case(lambda: Call(lambda m, x: F.linear(x, -m.w * 0.5 / 2), w=(40, WIDTH)), rows),
    "ellipsis and negative indices": Case(
        lambda: Call(
            lambda m, x: F.linear(x, m.w[-1, ..., :-3, :]) + F.linear(x[:, 4:], m.w[0, 3:, 4:]), w=(2, 40, WIDTH)
        ),
        rows,
    ),
    "select and swapaxes": Case(
        lambda: Call(lambda m, x: x @ m.w.swapaxes(-1, 1).select(0, -2), w=(3, 40, WIDTH)), rows
    ),
    "cast weight": Case(lambda: Call(lambda m, x: F.linear(x.float(), m.w.float()), w=(40, WIDTH)), rows),
    "transposed in other words": Case(
        lambda: Call(
            lambda m, x: sum(
                x @ w
                for w in (m.w.H, m.w.mH, m.w.adjoint(), m.w.movedim(0, -1), m.w.swapdims(0, 1), m.w.moveaxis(1, 0))
            ),
            w=(40, WIDTH),
        ),
        rows,
    ),
    "data of a weight": Case(lambda: Call(lambda m, x: F.linear(x, m.w.data), w=(40, WIDTH)), rows),
    "row": Case(lambda: Call(lambda m, x: x + m.w[3], w=(40, WIDTH)), rows),
    "lookup by index": Case(lambda: Call(lambda m, i: m.w[i], w=(50, WIDTH)), indices(ROWS)),
    "rows by index_select": Case(lambda: Call(lambda m, i: m.w.index_select(0, i), w=(50, WIDTH)), indices(ROWS)),
    "columns by index_select": Case(
        lambda: Call(lambda m, i: torch.index_select(m.w, -1, i), w=(8, 50)), indices(ROWS)
    ),
    "a row by index_select": Case(lambda: Call(lambda m, i: m.w.index_select(0, i[0]), w=(50, WIDTH)), indices(ROWS)),
    "embedding": Case(lambda: nn.Embedding(50, WIDTH, padding_idx=3), indices(ROWS, 2)),
    "embedding bag, mean": Case(lambda: Bag("mean"), indices(ROWS, 3)),
    "embedding bag, sum": Case(lambda: Bag("sum", padding_idx=7), indices(ROWS, 3)),
    "embedding bag, max": Case(lambda: Bag("max"), indices(ROWS, 3)),
    "embedding bag with offsets": Case(lambda: Bag("mean", offsets=True), indices(6)),
    "tied weights": Case(Tied, indices(ROWS)),
    "conv1d": conv(nn.Conv1d, (9,), kernel_size=3, stride=2, padding=1),
    "conv1d, same, circular": conv(nn.Conv1d, (9,), kernel_size=3, padding="same", padding_mode="circular"),
    "conv2d": conv(nn.Conv2d, (6, 5), kernel_size=3, padding=1),
    "conv2d, groups, dilation": conv(nn.Conv2d, (7, 6), kernel_size=3, groups=4, dilation=2, padding=2),
    "conv2d, depthwise": conv(nn.Conv2d, (6, 5), kernel_size=(3, 2), groups=8, bias=False),
    "conv2d, 1x1": conv(nn.Conv2d, (3, 3), kernel_size=1),
    "conv2d without a batch axis": Case(lambda: nn.Conv2d(8, 16, 3), features(8, 6, 5), guarded=False),
    "conv3d": conv(nn.Conv3d, (4, 4, 3), kernel_size=(2, 3, 2), stride=(1, 2, 1)),
    "pooled, channels last": Case(
        lambda: Call(lambda m, x: F.adaptive_avg_pool2d(F.linear(x, m.w).permute(0, 3, 1, 2), 1), w=(40, WIDTH)),
        features(ROWS, 3, 2, WIDTH),
    ),
    "channels last": Case(
        lambda: Call2(
            nn.Sequential(nn.Conv2d(8, 16, 3), nn.GroupNorm(2, 16)).to(memory_format=torch.channels_last),
            lambda x: (x.contiguous(memory_format=torch.channels_last),),
        ),
        features(ROWS, 8, 6, 5),
        guarded=False,
    ),
    "conv_transpose1d": conv(nn.ConvTranspose1d, (5,), kernel_size=3, stride=2, output_padding=1),
    "conv_transpose2d": conv(nn.ConvTranspose2d, (4, 3), kernel_size=3, stride=2, padding=1, groups=2),
    "conv_transpose3d": conv(nn.ConvTranspose3d, (2, 3, 2), kernel_size=2, dilation=2),
    "attention": Case(lambda: Attention(batch_first=True), features(1, 3, WIDTH)),
    "attention without weights": Case(lambda: Attention(need_weights=False), features(3, 1, WIDTH)),
    "attention, masked, unbatched": Case(lambda: Attention(masked=True, batch_first=True), features(3, WIDTH)),
    "attention, separate projections": Case(
        lambda: Attention(kdim=16, vdim=16, add_bias_kv=True, add_zero_attn=True, batch_first=True),
        features(1, 3, WIDTH),
    ),
    "transformer encoder layer": Case(
        lambda: nn.TransformerEncoderLayer(WIDTH, 4, 40, batch_first=True).eval(), features(1, 3, WIDTH)
    ),
    "transformer encoder": Case(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 40), 2, enable_nested_tensor=False).eval(),
        features(3, 1, WIDTH),
    ),
    "transformer decoder layer": Case(
        lambda: Call2(nn.TransformerDecoderLayer(WIDTH, 4, 40, batch_first=True).eval(), lambda x: (x, x)),
        features(1, 3, WIDTH),
    ),
    "lstm": Case(lambda: nn.LSTM(WIDTH, 16, 2, batch_first=True), features(1, 4, WIDTH)),
    "lstm, bidirectional, projected": Case(
        lambda: nn.LSTM(WIDTH, 16, bidirectional=True, proj_size=15), features(3, 1, WIDTH)
    ),
    "lstm without biases or batch": Case(lambda: nn.LSTM(WIDTH, 16, bias=False), features(4, WIDTH)),
    "lstm from a state": Case(
        lambda: Call2(nn.LSTM(WIDTH, WIDTH), lambda x: (x, (x[:1], x[1:2]))), features(3, 1, WIDTH)
    ),
    "gru from a state": Case(lambda: Call2(nn.GRU(WIDTH, WIDTH), lambda x: (x, x[-1:])), features(3, 1, WIDTH)),
    "gru": Case(lambda: nn.GRU(WIDTH, 16, 2, bidirectional=True), features(4, 1, WIDTH)),
    "rnn": Case(lambda: nn.RNN(WIDTH, 16, nonlinearity="relu", batch_first=True), features(1, 4, WIDTH)),
    "lstm cell": Case(lambda: nn.LSTMCell(WIDTH, 16), rows),
    "gru cell": Case(lambda: nn.GRUCell(WIDTH, 16), rows),
    "rnn cell": Case(lambda: nn.RNNCell(WIDTH, 16), rows),
    "batch norm in eval mode": Case(lambda: nn.Sequential(nn.Linear(WIDTH, 40), nn.BatchNorm1d(40)).eval(), rows),
    "batch norm in train mode": Case(
        lambda: nn.Sequential(nn.Linear(WIDTH, 40), nn.BatchNorm1d(40)), features(16, WIDTH)
    ),
    "weight norm": Case(
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(WIDTH, 40)),
            parametrizations.weight_norm(nn.Linear(40, WIDTH, bias=False), dim=-1),
        ),
        rows,
    ),
    "weight norm, convolutions": Case(
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Conv2d(8, 16, 3, groups=2)),
            parametrizations.weight_norm(nn.ConvTranspose2d(16, 8, 3)),
        ),
        features(ROWS, 8, 6, 5),
        guarded=False,
    ),
    "spectral norm": Case(lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, 40)), rows),
    "spectral norm, conv2d": Case(
        lambda: parametrizations.spectral_norm(nn.Conv2d(8, 16, 3, bias=False)),
        features(ROWS, 8, 6, 5),
        guarded=False,
    ),
    "cosine similarity": Case(
        lambda: Call(
            lambda m, x: (
                F.linear(F.normalize(x, dim=-1), F.normalize(m.w))
                + x @ F.normalize(m.w.T, dim=0)
                + torch.einsum("bd,cd->bc", x, F.normalize(m.w))
            ),
            w=(40, WIDTH),
        ),
        rows,
    ),
    "divided by norms": Case(
        lambda: Call(
            lambda m, x: (
                F.linear(x, m.w / m.w.norm())
                + x[:, :3] @ (m.n / m.n.norm(dim=1, keepdim=True)).T
                + m.w.div(torch.linalg.vector_norm(m.w, dim=0)) @ x[0]
            ),
            w=(40, WIDTH),
            n=(40, 3),  # so narrow that it is formed
        ),
        rows,
        guarded=False,
    ),
    "scaled by vectors": Case(
        lambda: Call(
            lambda m, x: F.linear(x, -m.w * m.r[:, None] / m.c[None].exp() * m.s, m.r) + (2 * m.w * m.r).T.mv(m.q),
            w=(WIDTH, WIDTH),
            r=(WIDTH,),
            c=(WIDTH,),
            s=(1,),
            q=(WIDTH,),
        ),
        rows,
    ),
    "parts of a scaled weight": Case(
        lambda: Call(
            lambda m, x: (
                sum(F.linear(x, part) for part in (m.w * m.r[:, None]).chunk(2))
                + F.linear(x[:, :9], (m.w * m.c).narrow(1, 3, 9).split([4, 16])[1]).sum(-1, keepdim=True)
            ),
            w=(20, WIDTH),
            r=(20,),
            c=(WIDTH,),
        ),
        rows,
    ),
    "scaled lookup": Case(
        lambda: Call(lambda m, i: F.embedding(i, F.normalize(m.w) * m.c), w=(50, WIDTH), c=(WIDTH,)), indices(2)
    ),
    "unsqueezed and expanded": Case(
        lambda: Call(
            lambda m, x: (
                x.expand(3, -1, -1) @ m.w.T.unsqueeze(0)
                + torch.bmm(x.expand(3, -1, -1), m.w.expand(3, -1, -1).mT)
                + F.linear(x, m.w.unsqueeze(-3).squeeze(0))
            ),
            w=(40, WIDTH),
        ),
        rows,
    ),
    "joined": Case(
        lambda: Call(
            lambda m, x: torch.cat(
                [
                    F.linear(x, torch.cat([m.v, m.w])),
                    x @ torch.concat((m.w.T, m.v[:3].T), dim=-1),
                    torch.einsum("bi,koi->bko", x, torch.stack([m.v, m.w])).flatten(1),
                ],
                -1,
            ),
            v=(40, WIDTH),
            w=(40, WIDTH),
        ),
        rows,
    ),
    "heads joined": Case(
        lambda: Call(lambda m, x: torch.einsum("bhd,hdo->bo", x.view(ROWS, 3, 8), m.w), w=(3, 8, 40)), rows
    ),
    "a kernel as a matrix": Case(Pointwise, rows, guarded=False),
    "a matrix as a kernel": Case(
        lambda: Call(
            lambda m, x: (
                F.conv1d(x.view(1, 4, 12), m.w.view(12, 4, 6))
                + F.conv1d(x.view(1, WIDTH, 2), m.w.unsqueeze(-1))[..., :1]
            ),
            w=(12, WIDTH),
        ),
        features(ROWS, WIDTH),
        guarded=False,
    ),
    "learned positions": Case(
        lambda: Call(lambda m, x: m.p[None, :3] + (x - m.t) + m.p[:3], p=(9, WIDTH), t=(1, WIDTH)),
        features(ROWS, 3, WIDTH),
    ),
    "addmv and multi_dot": Case(
        lambda: Call(
            lambda m, x: torch.addmv(m.b, m.w, x[0], beta=2) + torch.linalg.multi_dot([m.w, x.T, x[:, 0]]),
            w=(40, WIDTH),
            b=(40,),
        ),
        rows,
    ),
    "elementwise use, no rule": Case(
        lambda: Call(lambda m, x: F.linear(x, m.w.tanh()), w=(40, WIDTH)), rows, False, materialises=True
    ),
}


class Call2(nn.Module):
    """A module of several inputs, which are made from one."""

    def __init__(self, module: nn.Module, inputs: Callable[[torch.Tensor], tuple[object, ...]]):
        super().__init__()
        self.module = module
        self.inputs = inputs

    def forward(self, x: torch.Tensor) -> object:
        return self.module(*self.inputs(x))


class NoLargeTensor(TorchDispatchMode):
    """Fails where a tensor as large as one matrix of all members comes to be."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tensors_of(result):
            # An expanded view has many elements and little storage, a slice the other way round: neither is large.
            stored = leaf.untyped_storage().nbytes() // leaf.element_size()
            if min(leaf.numel(), stored) >= self.limit:
                raise AssertionError(f"{func} made {tuple(leaf.shape)}, {self.limit} elements are a matrix of all")
        return result


def trainer_of(model: nn.Module, **options: object) -> EGGROLLTrainer:
    defaults = {"population_size": MEMBERS, "sigma": 0.3, "rank": 2, "antithetic": True, "seed": 5}
    return EGGROLLTrainer(model.parameters(), model=model, **{**defaults, **options})  # type: ignore[arg-type]


def expected_outputs(model: nn.Module, trainer: EGGROLLTrainer, x: torch.Tensor, per_member: bool) -> list[object]:
    """The model's output with each member's weights, formed in float32."""
    population = trainer.ask()
    reference = copy.deepcopy(model).float()
    outputs = []
    for index in range(MEMBERS):
        with torch.no_grad():
            given = x[index] if per_member else x
            given = given.float() if given.is_floating_point() else given
            state = population.state_dict(index, dtype=torch.float32)
            running = copy.deepcopy(reference)
            running.load_state_dict(state)
            outputs.append(running(given))
    return outputs


def tensors_of(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def assert_members_equal(outputs: object, expected: list[object], tolerance: float) -> None:
    leaves = tensors_of(outputs)
    for index, wanted in enumerate(expected):
        for got, want in zip(leaves, tensors_of(wanted), strict=True):
            scale = max(float(want.abs().max()), 1e-3)
            assert got[index].shape == want.shape
            assert float((got[index].float() - want).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per member"])
@pytest.mark.parametrize(
    ("dtype", "rng"),
    [(torch.float32, "threefry"), (torch.bfloat16, "threefry"), (torch.float32, "philox")],
    ids=["float32", "bfloat16", "philox"],
)
@pytest.mark.parametrize("name", CASES)
def test_member_equals_model_with_its_weights(name: str, dtype: torch.dtype, rng: str, per_member: bool) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model = case.model().to(dtype)
    x = case.x(MEMBERS if per_member else None)
    x = x.to(dtype) if x.is_floating_point() else x
    trainer = trainer_of(model, rng=rng)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = trainer.ask()(x, per_member=per_member)
    materialised = [w for w in caught if issubclass(w.category, MaterialisedWarning)]
    assert bool(materialised) == case.materialises, [str(w.message) for w in caught]
    assert not any("batching rule" in str(w.message) for w in caught)
    tolerance = 1e-5 if dtype == torch.float32 else 6e-2
    assert_members_equal(outputs, expected_outputs(model, trainer, x, per_member), tolerance)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", CASES)
def test_chunked_and_one_by_one_give_the_same(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model, x = case.model(), case.x(MEMBERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaterialisedWarning)
        whole = trainer_of(model).ask()(x, per_member=True)
        chunked = trainer_of(model, chunk_size=5).ask()(x, per_member=True)
        alone = trainer_of(model)
        run_one_by_one(alone)
        one_by_one = alone.ask()(x, per_member=True)
    for other in (chunked, one_by_one):
        for a, b in zip(tensors_of(whole), tensors_of(other), strict=True):
            assert float((a - b).abs().max()) <= 1e-5 * max(float(a.abs().max()), 1e-3)


@pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per member"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.guarded])
def test_no_matrix_is_formed_for_all_members(name: str, per_member: bool) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model, members = case.model(), 64
    smallest = min(p.numel() for p in model.parameters() if p.ndim > 1 and min(p.shape) > 1)
    x = case.x(members if per_member else None)
    population = trainer_of(model, population_size=members, rank=1, strict=True).ask()  # raises what is found
    population.weights.prepare(population.members)  # the noise of all parameters is one row for each draw
    with NoLargeTensor(members * smallest):
        population(x, per_member=per_member)


@pytest.mark.parametrize("name", CASES)
def test_compiled_gives_the_same(name: str) -> None:
    """To the bit, in a generation whose weights and noise the record has not seen, and with another sigma."""
    torch.manual_seed(0)
    case = CASES[name]
    model, inputs = case.model(), [case.x(MEMBERS) for _ in range(3)]
    trainers = [trainer_of(copy.deepcopy(model)), trainer_of(model, compile={"backend": "eager"})]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MaterialisedWarning)
        for x, sigma in zip(inputs, (0.3, 0.2, 0.1), strict=True):  # as it is, recorded, replayed
            outputs = []
            for trainer in trainers:
                trainer.sigma = sigma
                outputs.append(tensors_of(trainer.ask()(x, per_member=True)))
                trainer.tell(torch.arange(float(MEMBERS)))
            for mine, theirs in zip(*outputs, strict=True):
                assert torch.equal(mine, theirs)
    assert not any("compiled" in str(w.message) for w in caught)
    (record,) = trainers[1]._compiler._records.values()
    assert record not in ("met", "refused")
