"""Checks every access of a kernel to memory, in Triton's interpreter: what compute-sanitizer is for on a GPU.

A pointer is a number there, so each argument is given addresses of its own, far from those of any other, and an
offset that is wrong by however much does not land in another argument. Checked is that

- every element that is read or written is one of the argument's, as its shape and strides have it, and aligned;
- an element is written by one store of a launch, and read by no other program and by no later load: on a GPU programs
  run in any order and side by side, where the interpreter runs one after the other;
- nothing depends on what a load leaves open, the elements that its mask excludes where it has no `other`.

`install` has all launches of a process checked; `check_programs` runs some programs of a launch whose tensors are on
the meta device, which is how addresses beyond 2**31 elements are checked that nobody has the memory for.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

__all__ = ["MemoryFault", "check_programs", "install"]

# Bytes of the addresses of one argument, whose first byte is in their middle.
_SPACE = 1 << 48

Program = tuple[int, int, int]


class MemoryFault(BaseException):
    """What a kernel does to memory that it must not. No `Exception`, after which the engine tries another way."""


class _Argument:
    """A tensor that a kernel is given, and where it is told that it is."""

    def __init__(self, name: str, number: int, tensor: Tensor):
        self.name = name
        self.first = number * _SPACE + _SPACE // 2
        self.itemsize = tensor.element_size()
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.elements = span + 1 if tensor.numel() else 0
        self.reached = 0  # of these, from the first to the last that the kernel has read or written
        self.in_memory = tensor.device.type != "meta"
        self.address = tensor.data_ptr() if self.in_memory else 0
        self.storage = tensor.untyped_storage()
        # Which elements between its first and its last are the tensor's, if not all.
        self.own: np.ndarray | None = None
        if self.in_memory and self.elements > tensor.numel():
            own = torch.zeros(self.elements, dtype=torch.bool)
            own.as_strided(tensor.shape, tensor.stride()).fill_(True)
            self.own = own.numpy()


class _Launch:
    """The accesses of one launch, numbered from 1 in the order in which the interpreter makes them."""

    def __init__(self, kernel: str, names: list[str]):
        self.kernel = kernel
        self.names = names
        self.arguments: list[_Argument] = []
        self.program_of: list[Program] = [(0, 0, 0)]  # of each access; there is none with the number 0
        self.loads: list[tuple[int, _Argument, np.ndarray, int]] = []  # which access, of what, at which offsets
        self.store_of: dict[int, np.ndarray] = {}  # by storage: which access has written each byte, 0 for none

    def pointer(self, tensor: Tensor) -> int:
        """Where the kernel is told that the next of its tensors is."""
        argument = _Argument(self.names[len(self.arguments)], len(self.arguments) + 1, tensor)
        self.arguments.append(argument)
        return argument.first

    def load(self, pointers: Any, mask: np.ndarray, other: Any) -> np.ndarray:
        dtype = interpreter._get_np_dtype(pointers.get_element_ty())
        if other is None:
            # Not 0, as in the interpreter: a GPU leaves in the register whatever was there.
            other = np.full(pointers.data.shape, 0xFF, np.uint8).repeat(dtype.itemsize, -1).view(dtype)
        argument, offsets = self._locate("reads", pointers, mask, dtype.itemsize)
        if argument is None:
            return other
        if not argument.in_memory:
            return np.where(mask, dtype.type(0), other)
        self.loads.append((len(self.program_of) - 1, argument, offsets, dtype.itemsize))
        return interpreter._interpreter.load(_addresses(argument, pointers), mask, other, dtype)

    def store(self, pointers: Any, values: np.ndarray, mask: np.ndarray) -> None:
        itemsize = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        argument, offsets = self._locate("writes", pointers, mask, itemsize)
        if argument is None or not argument.in_memory:
            return
        storage = argument.storage.data_ptr()
        if storage not in self.store_of:
            self.store_of[storage] = np.zeros(argument.storage.nbytes(), np.int64)
        store_of, places = self.store_of[storage], _bytes(argument, offsets, itemsize)
        access = len(self.program_of) - 1
        if (earlier := store_of[places]).any():
            at = int(np.flatnonzero(earlier.any(-1))[0])
            before = self.program_of[int(earlier[at].max())]
            raise self._fault(f"writes {_element(argument, offsets, at)}, which program {before} has written")
        lanes = np.arange(len(places))
        store_of[places[:, 0]] = lanes
        last = store_of[places[:, 0]]
        if (last != lanes).any():
            written = np.ascontiguousarray(values[mask]).view(np.uint8).reshape(len(lanes), -1)
            if (differ := (written != written[last]).any(-1)).any():
                at = int(np.flatnonzero(differ)[0])
                raise self._fault(f"writes two numbers to {_element(argument, offsets, at)} at once")
        store_of[places] = access
        interpreter._interpreter.store(_addresses(argument, pointers), values, mask)

    def finish(self) -> None:
        """What can be said once all programs have run: whether any has read what another one wrote."""
        programs = np.asarray(self.program_of)
        for access, argument, offsets, itemsize in self.loads:
            if (store_of := self.store_of.get(argument.storage.data_ptr())) is None:
                continue
            store = store_of[_bytes(argument, offsets, itemsize)]
            wrong = (store > 0) & ((store < access) | (programs[store] != programs[access]).any(-1))
            if wrong.any():
                at = int(np.flatnonzero(wrong.any(-1))[0])
                reader, writer = self.program_of[access], self.program_of[int(store[wrong][0])]
                raise MemoryFault(
                    f"{self.kernel}, program {reader}: reads {_element(argument, offsets, at)}, "
                    f"which program {writer} writes"
                )

    def _locate(self, does: str, pointers: Any, mask: np.ndarray, itemsize: int) -> tuple[Any, np.ndarray]:
        """Which argument an access is to, and the offsets in bytes from where it begins of what is not masked."""
        self.program_of.append(interpreter.interpreter_builder.grid_idx)
        lanes = pointers.data[mask]
        if not lanes.size:
            return None, lanes
        number = int(lanes[0]) // _SPACE
        if not 1 <= number <= len(self.arguments):
            raise self._fault(f"{does} at {int(lanes[0]):#x}, which is no argument's")
        argument = self.arguments[number - 1]
        offsets = lanes - np.uint64(argument.first)  # wraps below the first
        end, reached = argument.elements * argument.itemsize, int(offsets.max()) + itemsize
        if reached > end:
            at = int(np.flatnonzero(offsets > max(end - itemsize, 0))[0]) if end else 0
            raise self._fault(f"{does} {_element(argument, offsets, at)}, which has {argument.elements}")
        if ((offsets + np.uint64(argument.address)) & np.uint64(itemsize - 1)).any():
            raise self._fault(f"{does} `{argument.name}` at addresses that are no multiples of {itemsize} bytes")
        if argument.own is not None and not (own := argument.own[offsets // np.uint64(argument.itemsize)]).all():
            at = int(np.flatnonzero(~own)[0])
            raise self._fault(f"{does} {_element(argument, offsets, at)}, which its strides leave out")
        argument.reached = max(argument.reached, reached // argument.itemsize)
        return argument, offsets

    def _fault(self, what: str) -> MemoryFault:
        return MemoryFault(f"{self.kernel}, program {self.program_of[-1]}: {what}")


def _element(argument: _Argument, offsets: np.ndarray, at: int) -> str:
    """In words."""
    return f"element {int(offsets.view(np.int64)[at]) // argument.itemsize} of `{argument.name}`"


def _addresses(argument: _Argument, pointers: Any) -> np.ndarray:
    """Where the pointers' elements really are."""
    return pointers.data + np.uint64((argument.address - argument.first) % 2**64)


def _bytes(argument: _Argument, offsets: np.ndarray, itemsize: int) -> np.ndarray:
    """Offsets in the storage, shape ``(lanes, itemsize)``: arguments of one storage may have several dtypes."""
    start = offsets.astype(np.int64) + (argument.address - argument.storage.data_ptr())
    return start[:, None] + np.arange(itemsize)


_launch: _Launch | None = None
_convert = interpreter._implicit_cvt
_execute = interpreter.GridExecutor.__call__


def install() -> None:
    """Has every launch of this process checked from here on."""
    builder = interpreter.interpreter_builder
    builder.create_masked_load = _masked_load
    builder.create_masked_store = _masked_store
    builder.create_atomic_rmw = builder.create_atomic_cas = _atomic
    interpreter._implicit_cvt = _converted
    interpreter.GridExecutor.__call__ = _checked


def check_programs(
    kernel: Any, grid: Program, arguments: dict[str, Any], programs: Iterable[Program]
) -> dict[str, int]:
    """Runs some programs of a launch whose tensors are on the meta device: 0 is read, and nothing written.

    Returns:
        How many elements of each tensor lie between its first and the last that was read or written.
    """
    global _launch
    executor = interpreter.GridExecutor(kernel.rewrite(), kernel.arg_names, grid)
    patched = interpreter._patch_lang(executor.fn)
    names = [name for name in kernel.arg_names if isinstance(arguments[name], Tensor)]
    launch = _launch = _Launch(kernel.__name__, names)
    try:
        given = {
            name: arguments[name] if name in executor.constexprs else _converted(arguments[name])
            for name in kernel.arg_names
        }
        interpreter.interpreter_builder.set_grid_dim(*grid)
        for program in programs:
            interpreter.interpreter_builder.set_grid_idx(*program)
            executor.fn(**given)
    finally:
        patched.restore()
        _launch = None
    return {argument.name: argument.reached for argument in launch.arguments}


def _checked(executor: Any, *arguments: Any, **constants: Any) -> None:
    global _launch
    named = dict(zip(executor.arg_names, arguments, strict=False)) | constants
    names = [name for name in executor.arg_names if isinstance(named.get(name), Tensor)]
    launch = _launch = _Launch(executor.fn.__name__, names)
    try:
        _execute(executor, *arguments, **constants)
    finally:
        _launch = None
    launch.finish()


def _converted(argument: Any) -> Any:
    converted = _convert(argument)
    if isinstance(argument, Tensor):
        assert _launch is not None
        converted.handle.data[:] = _launch.pointer(argument)
    return converted


def _masked_load(pointers: Any, mask: Any, other: Any, *how: Any, **more: Any) -> Any:
    assert _launch is not None
    found = _launch.load(pointers, mask.data, None if other is None else other.data)
    return interpreter.TensorHandle(found, pointers.get_element_ty())


def _masked_store(pointers: Any, values: Any, mask: Any, *how: Any) -> None:
    assert _launch is not None
    _launch.store(pointers, values.data, mask.data)


def _atomic(*arguments: Any) -> Any:
    raise NotImplementedError("atomic operations are not checked")
