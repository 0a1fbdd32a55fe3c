"""The comparison with the core that the kernels have to pass before they are used."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from eggroll import prng
from eggroll_torch.kernels import check, update


@pytest.mark.parametrize("rng", ["threefry", "philox"])
def test_the_kernels_pass(rng: prng.Rng, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """With both ways to draw a sum: in the kernel, for a matrix of one tile, and before it."""
    add, drawn = update._add_sum_, []

    def noted(total: Any, coefficients: Any, A: Any, *rest: Any) -> None:
        drawn.append(A.drawn)
        add(total, coefficients, A, *rest)

    monkeypatch.setattr(update, "_add_sum_", noted)
    assert check.problem(device, rng) is None
    assert set(drawn) == {True, False}


def test_it_does_not_matter_what_is_going_on_around(device: torch.device):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast(device.type, torch.bfloat16), torch.enable_grad(), torch.device("meta"):
            assert check.problem(device, "threefry") is None
    finally:
        torch.set_default_dtype(torch.float32)


def slightly_wrong(operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation whose last number is another one."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = operation(*args, **kwargs)
        spoilt = args[0] if out is None else out
        last = spoilt.view(-1)[-1:]
        last += 1 + last.abs() // 4
        return out

    return wrong


@pytest.mark.parametrize(
    "name",
    [
        "fold_in",
        "draw_rows",
        "dense_of_members",
        "add_dense_sum_drawn_",
        "linear_of_members",
        "linear_of_members_drawn",
        "add_low_rank_sum_",
        "add_low_rank_sum_drawn_",
    ],
)
def test_what_is_wrong_is_named(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check, name, slightly_wrong(getattr(check, name)))
    found = check.problem(device, "threefry")
    assert found is not None
    assert found.startswith(f"{name} ")
    assert "is off by" in found


def test_what_raises_is_named(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(check, "draw_rows", broken)
    assert check.problem(device, "threefry") == "draw_rows raises RuntimeError (no kernel image)"


def test_no_room_is_not_a_wrong_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(check, "draw_rows", full)
    with pytest.raises(torch.OutOfMemoryError):
        check.problem(device, "threefry")
