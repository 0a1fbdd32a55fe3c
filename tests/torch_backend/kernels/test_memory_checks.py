"""Kernels that do wrong to memory, each in one way: the checks that all other tests run under find it."""

import re
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch_backend.kernels.memory_checks import MemoryFault, check_programs

from eggroll_torch.kernels.launch import launch

BLOCK = 8


@triton.jit
def _access_kernel(values, first, end, STORES: tl.constexpr, BLOCK: tl.constexpr):
    place = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if STORES:
        tl.store(values + place, 1.0, mask=place < end)
    else:
        tl.load(values + place, mask=place < end, other=0.0)


@triton.jit
def _unmasked_kernel(values, BLOCK: tl.constexpr):
    tl.load(values + tl.arange(0, BLOCK))


@triton.jit
def _strided_kernel(values, stride, BLOCK: tl.constexpr):
    tl.load(values + tl.arange(0, BLOCK) * stride)


@triton.jit
def _distant_kernel(source, target, distance):
    tl.store(target, tl.load(source + distance))


@triton.jit
def _misaligned_kernel(values, BLOCK: tl.constexpr):
    odd = (values.to(tl.pointer_type(tl.int8)) + 2).to(tl.pointer_type(tl.float32))
    tl.load(odd + tl.arange(0, BLOCK))


@triton.jit
def _shift_kernel(source, target, by, BLOCK: tl.constexpr):
    """In place right only if programs run in order, or, for a negative `by`, in reverse."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (place + by >= 0) & (place + by < tl.num_programs(0) * BLOCK)
    tl.store(target + place, tl.load(source + place + by, mask=inside, other=0.0))


@triton.jit
def _collision_kernel(values, lanes, DIFFER: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(values + lane // lanes, lane if DIFFER else lane // lanes)


@triton.jit
def _twice_kernel(values, BLOCK: tl.constexpr):
    tl.store(values + tl.arange(0, BLOCK), 1.0, mask=tl.arange(0, BLOCK) == 5)
    tl.store(values + tl.arange(0, BLOCK), 2.0)


@triton.jit
def _reread_kernel(values, BLOCK: tl.constexpr):
    tl.store(values + tl.arange(0, BLOCK), 1.0)
    tl.load(values + BLOCK - 1 - tl.arange(0, BLOCK))


@triton.jit
def _open_kernel(source, target, size, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(target + lane, tl.load(source + lane, mask=lane < size, other=OTHER))


@triton.jit
def _rows_kernel(values, length, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    tl.store(values + row * length + tl.arange(0, BLOCK), 1.0)


@triton.jit
def _atomic_kernel(values):
    tl.atomic_add(values, 1.0)


def run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    launch(kernel, (programs,), *arguments, device=torch.device("cpu"), **constants)


def numbers(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float32)


@pytest.mark.parametrize("stores", [True, False], ids=["stores", "loads"])
def test_elements_beside_a_tensor(stores: bool):
    """Of memory that goes on: a view, whose neighbours are another's."""
    values, how = numbers(30)[5:25], {"STORES": stores, "BLOCK": BLOCK}
    does = "writes" if stores else "reads"
    run(_access_kernel, 3, values, 0, 20, **how)
    with pytest.raises(MemoryFault, match=rf"program \(2, 0, 0\): {does} element 20 of `values`, which has 20"):
        run(_access_kernel, 3, values, 0, 21, **how)
    with pytest.raises(MemoryFault, match=rf"program \(0, 0, 0\): {does} element -1 of `values`, which has 20"):
        run(_access_kernel, 3, values, -1, 20, **how)
    with pytest.raises(MemoryFault, match=f"{does} element 0 of `values`, which has 0"):
        run(_access_kernel, 1, values[:0], 0, 1, **how)


def test_a_missing_mask():
    run(_unmasked_kernel, 1, numbers(8), BLOCK=BLOCK)
    with pytest.raises(MemoryFault, match="reads element 7 of `values`, which has 7"):
        run(_unmasked_kernel, 1, numbers(7), BLOCK=BLOCK)


def test_elements_between_those_of_a_view():
    run(_strided_kernel, 1, numbers(24)[::3], 3, BLOCK=BLOCK)
    run(_strided_kernel, 1, numbers(1).expand(8), 0, BLOCK=BLOCK)
    with pytest.raises(MemoryFault, match="reads element 2 of `values`, which its strides leave out"):
        run(_strided_kernel, 1, numbers(24)[::3], 2, BLOCK=BLOCK)


def test_one_argument_reached_from_another():
    both = numbers(16)
    for distance in (8, 2**20, -(2**40)):
        with pytest.raises(MemoryFault, match=re.escape(f"reads element {distance} of `source`, which has 8")):
            run(_distant_kernel, 1, both[:8], both[8:], distance)
    with pytest.raises(MemoryFault, match=r"reads at 0x[0-9a-f]+, which is no argument's"):
        run(_distant_kernel, 1, both[:8], both[8:], -(2**47))


def test_misaligned_elements():
    with pytest.raises(MemoryFault, match="reads `values` at addresses that are no multiples of 4 bytes"):
        run(_misaligned_kernel, 1, numbers(16), BLOCK=BLOCK)


@pytest.mark.parametrize("by", [1, -1])
def test_an_element_that_another_program_writes(by: int):
    """The order of the interpreter gives one of these shifts the right numbers."""
    values = numbers(16)
    run(_shift_kernel, 2, values, values, 0, BLOCK=BLOCK)
    run(_shift_kernel, 2, values, values.clone(), by, BLOCK=BLOCK)
    with pytest.raises(MemoryFault, match=r"program \(., 0, 0\): reads .*, which program \(., 0, 0\) writes"):
        run(_shift_kernel, 2, values, values, by, BLOCK=BLOCK)


def test_an_element_that_is_written_twice():
    run(_collision_kernel, 1, numbers(8), 1, DIFFER=True, BLOCK=BLOCK)
    with pytest.raises(MemoryFault, match=r"program \(1, 0, 0\): writes .*, which program \(0, 0, 0\) has written"):
        run(_collision_kernel, 2, numbers(8), 1, DIFFER=True, BLOCK=BLOCK)
    with pytest.raises(MemoryFault, match=r"writes element 5 of `values`, which program \(0, 0, 0\) has written"):
        run(_twice_kernel, 1, numbers(8), BLOCK=BLOCK)


def test_two_numbers_for_one_element():
    run(_collision_kernel, 1, numbers(8), 2, DIFFER=False, BLOCK=BLOCK)
    with pytest.raises(MemoryFault, match="writes two numbers to element 0 of `values` at once"):
        run(_collision_kernel, 1, numbers(8), 2, DIFFER=True, BLOCK=BLOCK)


def test_an_element_that_is_read_after_it_was_written():
    """By another thread, which does not wait."""
    with pytest.raises(MemoryFault, match=r"program \(0, 0, 0\): reads .*, which program \(0, 0, 0\) writes"):
        run(_reread_kernel, 1, numbers(8), BLOCK=BLOCK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_load_leaves_open_shows(dtype: torch.dtype):
    source, target = numbers(8).to(dtype), numbers(8).to(dtype)
    run(_open_kernel, 1, source, target, 5, OTHER=0.0, BLOCK=BLOCK)
    assert target.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    run(_open_kernel, 1, source, target, 5, OTHER=None, BLOCK=BLOCK)
    assert target.isnan().tolist() == [False] * 5 + [True] * 3


def test_memory_that_nobody_has_written_shows():
    target = numbers(8)
    run(_shift_kernel, 1, target.new_empty(8), target, 0, BLOCK=BLOCK)
    assert target.isnan().all()


def test_atomic_operations_are_refused():
    with pytest.raises(Exception, match="atomic operations are not checked"):
        run(_atomic_kernel, 1, numbers(1))


def test_addresses_that_nobody_has_the_memory_for():
    values = torch.empty(2**16 + 1, 2**15, device="meta")
    grid, last = (2**16 + 1, 1, 1), (2**16, 0, 0)
    arguments = {"values": values, "length": 2**15, "BLOCK": 2**15}
    reached = check_programs(_rows_kernel, grid, {**arguments, "WIDE": True}, [last])
    assert reached == {"values": values.numel()}
    with pytest.raises(MemoryFault, match="writes element -2147483648 of `values`, which has 2147516416"):
        check_programs(_rows_kernel, grid, {**arguments, "WIDE": False}, [last])
