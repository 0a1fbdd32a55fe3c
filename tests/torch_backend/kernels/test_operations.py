"""The kernels as operations of PyTorch: one opaque node to a compiler, further rows to a `vmap` inside the model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch_backend.kernels.support import error, random_keys, signs_of

from eggroll_torch.kernels import dense, linear, noise, update

MEMBERS, DRAWS, ROWS, IN, OUT, RANK = 4, 2, 3, 5, 7, 2


def arguments(device: torch.device) -> dict[str, tuple]:
    """Of every operation, by name."""
    keys, signs = random_keys(DRAWS, device=device), signs_of(MEMBERS, DRAWS, device)
    places = torch.arange(6, dtype=torch.int32, device=device)
    counters = torch.stack([places, places, places])
    A, B = torch.randn(DRAWS, OUT, RANK, device=device), torch.randn(DRAWS, IN, RANK, device=device)
    x, weight = torch.randn(MEMBERS, ROWS, IN, device=device), torch.randn(OUT, IN, device=device)
    coefficients, bias = torch.randn(DRAWS, device=device), torch.randn(OUT, device=device)
    by_philox = "float16", "philox", "gelu"
    return {
        "fold_in": (keys, places),
        "draw_rows": (keys.view(1, DRAWS, 2), places % DRAWS, counters, "bfloat16", torch.float16, "philox"),
        "draw_both_factors": (keys, coefficients, RANK, IN, OUT, "float32", "philox", torch.bfloat16),
        "linear_of_members": (x, weight, bias, A, B, signs, 0.3, None, None, "float32", "threefry", "relu", False),
        "linear_of_members_drawn": (x, weight, None, keys, RANK, signs, 0.3, keys, signs, *by_philox),
        "add_low_rank_sum_": (torch.randn(OUT, IN, device=device), coefficients, A, B),
        "add_low_rank_sum_drawn_": (torch.randn(OUT, IN, device=device), coefficients, keys, RANK),
        "dense_of_members": (weight, keys, signs),
        "add_dense_sum_drawn_": (torch.randn(OUT, device=device), coefficients, keys),
    }


OPERATIONS = {
    name: getattr(module, name)
    for module, names in (
        (noise, ["fold_in", "draw_rows", "draw_both_factors"]),
        (linear, ["linear_of_members", "linear_of_members_drawn"]),
        (update, ["add_low_rank_sum_", "add_low_rank_sum_drawn_"]),
        (dense, ["dense_of_members", "add_dense_sum_drawn_"]),
    )
    for name in names
}
operations = pytest.mark.parametrize("name", OPERATIONS)


@operations
def test_shapes_are_known_without_running(name: str, device: torch.device):
    """Schema and fake rule agree with what the operation does."""
    torch.library.opcheck(OPERATIONS[name], arguments(device)[name], test_utils=("test_schema", "test_faketensor"))


def among_others(tensor: Tensor) -> Tensor:
    """Equal, every second element of another tensor along each axis, from the second on."""
    other = tensor.new_full([2 * size + 1 for size in tensor.shape], -1)
    found = other[(slice(1, None, 2),) * tensor.ndim]
    found.copy_(tensor)
    return found


def the_other_way_round(tensor: Tensor) -> Tensor:
    """Equal, with the strides in the other order."""
    return tensor.permute(*reversed(range(tensor.ndim))).contiguous().permute(*reversed(range(tensor.ndim)))


@operations
@pytest.mark.parametrize("view", [among_others, the_other_way_round])
def test_any_strides(
    name: str, view: Callable[[Tensor], Tensor], device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    given = arguments(device)[name]
    # Kernels multiply themselves, and not the library, for which see below.
    if name == "linear_of_members":
        given = (*given[:-1], None)
    monkeypatch.setattr(linear, "dot_precision", lambda dtype: "tf32")
    assert torch.equal(*with_strides(name, given, view))


@pytest.mark.parametrize("name", ["linear_of_members", "linear_of_members_drawn"])
@pytest.mark.parametrize("view", [among_others, the_other_way_round])
def test_strides_where_the_library_multiplies(name: str, view: Callable[[Tensor], Tensor], device: torch.device):
    """On some processors it rounds otherwise where the strides are others."""
    assert error(*with_strides(name, arguments(device)[name], view)) < 1e-6


def with_strides(name: str, given: tuple, view: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What an operation makes of its arguments, and of the same with other strides."""
    found = []
    # A matrix that is summed into is contiguous, see `test_update.py`.
    first = given[:1] if name.startswith("add_low_rank") else ()
    for change in (torch.clone, view):
        changed = [change(argument) if isinstance(argument, Tensor) else argument for argument in given]
        changed[: len(first)] = [argument.clone() for argument in first]
        out = OPERATIONS[name](*changed)
        found.append(changed[0] if out is None else out)
    return found


def test_a_compiler_sees_one_node_each(device: torch.device):
    given = arguments(device)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph

    def everything(total: Tensor, vector: Tensor) -> list[Tensor]:
        found = [OPERATIONS[name](*given[name]) for name in OPERATIONS if not name.startswith("add_")]
        OPERATIONS["add_low_rank_sum_"](total, *given["add_low_rank_sum_"][1:])
        OPERATIONS["add_low_rank_sum_drawn_"](total, *given["add_low_rank_sum_drawn_"][1:])
        OPERATIONS["add_dense_sum_drawn_"](vector, *given["add_dense_sum_drawn_"][1:])
        return [*found, total, vector]

    compiled = torch.compile(everything, backend=backend, fullgraph=True)
    starts = given["add_low_rank_sum_"][0], given["add_dense_sum_drawn_"][0]
    actual, expected = (function(*(start.clone() for start in starts)) for function in (compiled, everything))
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)
    (graph,) = graphs
    called = {str(node.target).removeprefix("eggroll.").removesuffix(".default") for node in graph.graph.nodes}
    assert set(OPERATIONS) <= called


@pytest.mark.parametrize("name", ["linear_of_members", "linear_of_members_drawn"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_vmap_inside_the_model(name: str, shared: bool, dim: int, device: torch.device):
    operation, (_, *rest) = OPERATIONS[name], arguments(device)[name]
    x = torch.randn(*(() if shared else (MEMBERS,)), ROWS, 6, IN, device=device).movedim(-2, dim)
    out = torch.vmap(lambda x: operation(x, *rest), in_dims=dim)(x)
    assert out.shape == (6, MEMBERS, ROWS, OUT)
    one_by_one = torch.stack([operation(part, *rest) for part in x.unbind(dim)])
    assert error(out, one_by_one) < 1e-6


def test_a_vmap_over_something_else(device: torch.device):
    x, weight, *rest = arguments(device)["linear_of_members"]
    with pytest.raises(NotImplementedError, match="can be vectorised over `x` alone"):
        torch.vmap(lambda w: linear.linear_of_members(x, w, *rest))(weight.expand(2, -1, -1))
