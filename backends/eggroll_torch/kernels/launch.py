"""What every launch of a kernel shares: the device, the compiler's options, block sizes, numbers of narrow dtypes."""

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from eggroll import prng

from .portable import INTERPRETED

__all__ = [
    "DTYPES",
    "Source",
    "cdiv",
    "dot_precision",
    "drawn",
    "launch",
    "narrow_table",
    "power_of_two",
    "splits",
    "stored",
]

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Programs for each multiprocessor that a launch is split into where it has too few, and the shortest part of a sum
# that is worth a program of its own.
_PROGRAMS_OF_PROCESSOR = 4
_SHORTEST = 512

# What Triton compiled, and the constants among the kernel's parameters, by what they depend on. Forgotten where
# shapes keep changing, which must not fill the memory.
_REMEMBERED = 4096
_found: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}


class Source(NamedTuple):
    """Where a kernel gets one factor of the noise from, of shape ``(draws, features, rank)``.

    Attributes:
        values: the factor itself, or the keys that it is drawn from, int32 ``(draws, 2)``.
        strides: of the factor; not used if it is drawn.
        first: where a draw has the factor: with Threefry the row of ``(in + out, rank)`` at which it starts, with
            Philox its stream. See `eggroll.perturbation.low_rank_draws`.
        drawn: which of both.
        precision: the dtype to draw in.
        rng: the generator.
    """

    values: Tensor
    strides: tuple[int, ...]
    first: int
    drawn: bool
    precision: str
    rng: str

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What a kernel takes as ``values, stride_draw, stride_feature, stride_column, first``."""
        return (self.values, *self.strides, self.first)


def stored(factor: Tensor) -> Source:
    """A factor that is read, of any float dtype and any strides."""
    return Source(factor, factor.stride(), 0, False, "float32", "threefry")


def drawn(keys: Tensor, in_features: int, precision: str, rng: str) -> tuple[Source, Source]:
    """`A` and `B`, drawn where they are needed."""
    first = 1 if rng == "philox" else in_features
    return Source(keys, (0, 0, 0), first, True, precision, rng), Source(keys, (0, 0, 0), 0, True, precision, rng)


def launch(kernel: Any, grid: Any, *arguments: Any, device: torch.device, **constants: Any) -> None:
    """Runs a kernel on a device. All launches go through here. The meta device has nothing to run it on.

    The compiler must not fuse a multiplication with an addition on its own, see `normals.normal_of_bits`.

    Triton takes the host 10 to 70 microseconds to find what it compiled for such arguments, or chose for them, which
    is more than all else around a launch. What is found here again takes 5.

    Args:
        kernel: of `triton.jit` or `triton.autotune`.
        grid: how many programs along up to three axes, or a function of the constants.
        arguments: tensors and numbers, of the kernel's first parameters.
        constants: the other parameters, and options of the compiler.
    """
    if device.type == "meta":
        return
    key = (id(kernel), device, *constants.items(), *map(_kind, arguments))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if (found := _found.get(key)) is not None:
            compiled, others = found
            programs = grid(others) if callable(grid) else grid
            compiled[(*programs, 1, 1)[:3]](*arguments, *others.values())
            return
        named: dict[str, Any] = {}

        def noted(given: dict[str, Any]) -> Any:
            # Called last with what runs, whatever an autotuner tried before. Its `best_config` may by now be what
            # another thread runs.
            named.update(given)
            return grid(given) if callable(grid) else grid

        compiled = kernel[noted](*arguments, **constants, enable_fp_fusion=False)
    # The interpreter returns nothing, a compiler in the background what waits for it.
    if isinstance(compiled, CompiledKernel):
        if len(_found) >= _REMEMBERED:
            _found.clear()
        _found[key] = compiled, {name: named[name] for name in kernel.arg_names[len(arguments) :]}


def _kind(argument: Any) -> Any:
    """What the compiler distinguishes of an argument, at least."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return float if isinstance(argument, float) else argument


def cdiv(number: int, divisor: int) -> int:
    """How often `divisor` goes into `number`, rounded up. Triton's takes the host 5 microseconds."""
    return -(-number // divisor)


def power_of_two(number: int, at_least: int = 1, at_most: int = 2**62) -> int:
    """The power of two that holds `number`, within bounds."""
    return min(max(1 << (max(number, 1) - 1).bit_length(), at_least), at_most)


def splits(programs: int, length: int, device: torch.device) -> int:
    """In how many parts to compute a sum of `length` terms, so that `programs` times as many about fill the device.

    Rounded: parts have to be added up afterwards, which is not worth it where a device is nearly full.
    """
    programs = max(programs, 1)
    wanted = (_PROGRAMS_OF_PROCESSOR * _processors(device) + programs // 2) // programs
    return max(1, min(wanted, length // _SHORTEST))


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 matrices are multiplied, "ieee" or "tf32", as PyTorch has been told."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def narrow_table(precision: str, like: Tensor) -> Tensor:
    """The normals of a narrow precision, float32, on the device of `like`; for float32, which needs none, `like`."""
    return like if precision == "float32" else _narrow_table(precision, like.device)


@functools.cache
def _narrow_table(precision: prng.Precision, device: torch.device) -> Tensor:
    return torch.from_numpy(prng.narrow_normals(precision)).to(device)


@functools.cache
def _processors(device: torch.device) -> int:
    # The interpreter runs one program after the other; a few parts show that parts are summed.
    return (
        1 if INTERPRETED or device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
    )
