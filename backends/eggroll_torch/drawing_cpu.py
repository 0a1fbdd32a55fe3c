"""Draws on a CPU, compiled by Numba; the definition is `eggroll.prng`, the callers are `drawing` and `threefry`.

A number takes Threefry 120 integer operations; to write and read it a few times would take as long again, so a
block of numbers stays in the first cache from counter to normal. Only sums, products, divisions and square roots of
IEEE 754 are used, and the compiler may not contract them, so the normals are the same to the bit on every CPU.
"""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from eggroll import philox, prng

__all__ = ["draw", "fold_in"]

# Elements whose bits are drawn before they become floats; whole blocks of Philox.
_BLOCK = 1024
# Numbers of 32 bits in the widest registers.
_LANES = 16
# Elements that are worth a thread: below, on two cores, handing them out cost more than drawing them (300 us).
_SHARE = 1 << 17

# Normals that are computed before it is looked whether some are of the tail; and how many numbers there are at either
# end of (-1, 1) that may be: ``1 - u * u`` below ``exp(-5)``, with a margin for rounding.
_GROUP, _IN_TAIL = 64, np.int32(14_500)

# What bits become.
_NORMAL, _BITS, _TABLE = 0, 1, 2
_NO_TABLE = np.empty(0, np.float32)

_u32, _i32, _f32 = np.uint32, np.int32, np.float32
_PARITY = _u32(prng.PARITY)
_EVEN_ROTATIONS, _ODD_ROTATIONS = prng.ROTATIONS
_M0, _M1 = map(np.uint64, philox.MULTIPLIERS)
_W0, _W1 = map(_u32, philox.WEYL)
_ROUNDS = philox.ROUNDS
# What Numba keeps on disk is stamped with the time of this file alone: touch it when constants of the core change.
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7, _C8 = map(_f32, prng.ERFINV_CENTRAL)
_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7, _T8 = map(_f32, prng.ERFINV_TAIL)
_SQRT2, _LN2 = _f32(prng.SQRT2), _f32(math.log(2))
_ONE, _TWO, _2_5, _3, _5 = map(_f32, (1, 2, 2.5, 3, 5))
_THIRD, _FIFTH, _SEVENTH = (_f32(1 / n) for n in (3, 5, 7))
_MANTISSA = _i32((1 << 23) - 1)
_ROOT_HALF = np.float32(math.sqrt(0.5)).view(np.int32)  # its bits
_UNIFORM_STEP, _UNIFORM_SHIFT = _f32(2.0**-22), _f32(1 - 2.0**-24)


def fold_in(keys: np.ndarray, data: np.ndarray) -> np.ndarray:
    """`eggroll.prng.fold_in` of `keys`, uint32 of shape ``(n, 2)``, and `data`, uint32 of shape ``(n,)``."""
    out = np.empty((len(data), 2), np.uint32)
    _fold_in(np.ascontiguousarray(keys), np.ascontiguousarray(data), out)
    return out


def draw(
    keys: Tensor, bounds: np.ndarray, runs: np.ndarray, kind: Literal["bits"] | prng.Precision, rng: prng.Rng
) -> Tensor:
    """Rows that hold, side by side, the draws of several keys.

    Args:
        keys: int32, shape ``(rows, n_keys, 2)``.
        bounds: int64, shape ``(n_runs + 1,)``: where in a row each run of elements, which count up from 0, starts,
            and where the last ends. With Philox multiples of 4.
        runs: uint32, shape ``(n_runs, 3)``: the key, the row and the stream of each; Threefry has the first alone.
        kind: normals of a precision, see `eggroll.prng.normal`; or the 32 random bits of each element.
        rng: the generator.

    Returns:
        float32, or int32 for bits, of shape ``(rows, bounds[-1])``.
    """
    rows, length = len(keys), int(bounds[-1])
    out = torch.empty(rows, length, dtype=torch.float32, device="cpu")
    words = keys.contiguous().numpy().view(np.uint32)
    flat = out.view(-1).numpy()
    conversion, table, shift = _NORMAL, _NO_TABLE, 0
    if kind == "bits":
        conversion = _BITS
    elif kind != "float32":
        conversion, table, shift = _TABLE, prng.narrow_normals(kind), prng.MANTISSA_SHIFTS[kind]

    def fill(start: int, stop: int) -> None:
        _fill(words, bounds, runs, rng == "philox", start, stop, conversion, table, shift, flat)

    threads = min(torch.get_num_threads(), flat.size // _SHARE)
    if threads > 1:
        # More parts than threads: a core that is taken for a while holds up one small part.
        cuts = [*(flat.size * part // (4 * threads) // 4 * 4 for part in range(4 * threads)), flat.size]
        list(_threads(torch.get_num_threads()).map(fill, cuts[:-1], cuts[1:]))
    elif flat.size:
        fill(0, flat.size)
    return out.view(torch.int32) if kind == "bits" else out


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="eggroll-noise")


if hasattr(os, "register_at_fork"):
    # A forked process has the pool but none of its threads, and would wait for them for ever.
    os.register_at_fork(after_in_child=_threads.cache_clear)


def _compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function that runs without the interpreter's lock, from disk where it was compiled before."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(signature, nogil=True, error_model="numpy", cache=True)(function)
        except Exception:  # no directory to write to, a full disk, a file cut short: not what was asked for
            return numba.njit(signature, nogil=True, error_model="numpy")(function)

    return decorate


_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic  # its callers do not give the context


@_intrinsic
def _with_widest_registers(typing_context):
    """Has the function that calls it use registers of 512 bits where there are some.

    LLVM prefers 256 bits even there, since some older processors slow down with more. These loops are long enough and
    take a quarter to a third less time. Numba can set this for a whole process, not for a function, and its builder
    knows no attributes that have values: hence the bare string.
    """

    def set_attribute(context, builder, signature, arguments):
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), set_attribute


_inlined = numba.njit(inline="always", error_model="numpy")


@_inlined
def _round(x0, x1, rotation):
    x0 = _u32(x0 + x1)
    return x0, _u32(_u32(_u32(x1 << _u32(rotation)) | _u32(x1 >> _u32(32 - rotation))) ^ x0)


@_inlined
def _even_group(x0, x1):
    for rotation in _EVEN_ROTATIONS:
        x0, x1 = _round(x0, x1, rotation)
    return x0, x1


@_inlined
def _odd_group(x0, x1):
    for rotation in _ODD_ROTATIONS:
        x0, x1 = _round(x0, x1, rotation)
    return x0, x1


@_inlined
def _threefry(k0, k1, counter):
    """Both words of ``block((k0, k1), 0, counter)``. Every sum is cut to 32 bits, or Numba would widen it."""
    k2 = _u32(k0 ^ k1 ^ _PARITY)
    x0, x1 = _even_group(k0, _u32(counter + k1))
    x0, x1 = _odd_group(_u32(x0 + k1), _u32(x1 + _u32(k2 + _u32(1))))
    x0, x1 = _even_group(_u32(x0 + k2), _u32(x1 + _u32(k0 + _u32(2))))
    x0, x1 = _odd_group(_u32(x0 + k0), _u32(x1 + _u32(k1 + _u32(3))))
    x0, x1 = _even_group(_u32(x0 + k1), _u32(x1 + _u32(k2 + _u32(4))))
    return _u32(x0 + k2), _u32(x1 + _u32(k0 + _u32(5)))


@_inlined
def _philox(k0, k1, c0, c1, c2):
    """The four words of the block of the key ``(k0, k1)`` at the counter ``(c0, c1, c2, 0)``."""
    c3 = _u32(0)
    for _ in range(_ROUNDS):
        product0, product1 = np.uint64(c0) * _M0, np.uint64(c2) * _M1
        c0, c1 = _u32(_u32(product1 >> np.uint64(32)) ^ c1 ^ k0), _u32(product1)
        c2, c3 = _u32(_u32(product0 >> np.uint64(32)) ^ c3 ^ k1), _u32(product0)
        k0, k1 = _u32(k0 + _W0), _u32(k1 + _W1)
    return c0, c1, c2, c3


@_inlined
def _uniform(bits):
    """The number on (-1, 1) that the bits stand for, and ``-log(1 - u * u)``."""
    u = _f32(_i32(bits >> _u32(9))) * _UNIFORM_STEP - _UNIFORM_SHIFT
    return u, -_log(_f32(_ONE - u * u))


@_inlined
def _from_the_end(bits):
    """How many numbers are between the one that the bits stand for and the nearer end of (-1, 1)."""
    k = _i32(bits >> _u32(9))
    return min(k, _i32(_MANTISSA - k))


@_inlined
def _central(u, w):
    """``sqrt(2) * erfinv(u)`` as `eggroll.prng.normal` has it where `w` is below 5."""
    c = w - _2_5
    p = (((((((_C0 * c + _C1) * c + _C2) * c + _C3) * c + _C4) * c + _C5) * c + _C6) * c + _C7) * c + _C8
    return p * u * _SQRT2


@_inlined
def _tail(u, w):
    """The same where `w` is 5 or more."""
    t = np.sqrt(w) - _3
    p = (((((((_T0 * t + _T1) * t + _T2) * t + _T3) * t + _T4) * t + _T5) * t + _T6) * t + _T7) * t + _T8
    return p * u * _SQRT2


@_inlined
def _log(y):
    """The natural logarithm of a normal positive number, to 1.2e-7 of the larger of 1 and the result.

    ``y = 2**e * m`` with `m` between the square roots of 1/2 and 2, and ``log(m) = 2 * atanh((m - 1) / (m + 1))``,
    whose series is cut where it is below float32's rounding.
    """
    distance = _i32(_f32(y).view(np.int32) - _ROOT_HALF)
    e = _f32(_i32(distance >> _i32(23)))
    m = _i32(_i32(distance & _MANTISSA) + _ROOT_HALF).view(np.float32)
    s = (m - _ONE) / (m + _ONE)
    z = s * s
    return e * _LN2 + (_TWO * s) * (((_SEVENTH * z + _FIFTH) * z + _THIRD) * z + _ONE)


@_compiled("void(uint32[:, ::1], uint32[::1], uint32[:, ::1])")
def _fold_in(keys, data, out):
    for i in range(len(data)):
        out[i, 0], out[i, 1] = _threefry(keys[i, 0], keys[i, 1], data[i])


@numba.njit(error_model="numpy")
def _threefry_bits(k0, k1, first, out):
    """The bits of elements `first`, `first` + 1, ... of one key's draw."""
    _with_widest_registers()
    for i in range(len(out)):
        x0, x1 = _threefry(k0, k1, _u32(first + _u32(i)))
        out[i] = _u32(x0 ^ x1)


@numba.njit(error_model="numpy")
def _philox_bits(k0, k1, row, stream, first, out):
    """The bits of the elements of whole blocks, the first of which is block `first` of one row of a key's draw."""
    _with_widest_registers()
    for i in range(len(out) // 4):
        out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3] = _philox(
            k0, k1, _u32(first + _u32(i)), row, stream
        )


@numba.njit(error_model="numpy")
def _normals(bits, out):
    """Normals; the tail, of one number in 300, whose root takes as long as all else, apart from the rest."""
    _with_widest_registers()
    for start in range(0, len(bits), _GROUP):
        group, normals = bits[start : start + _GROUP], out[start : start + _GROUP]
        outermost = _MANTISSA
        for i in range(len(group)):
            u, w = _uniform(group[i])
            normals[i] = _central(u, w)
            outermost = min(outermost, _from_the_end(group[i]))
        if outermost < _IN_TAIL:
            for i in range(len(group)):
                if _from_the_end(group[i]) < _IN_TAIL:
                    u, w = _uniform(group[i])
                    if w >= _5:
                        normals[i] = _tail(u, w)


@numba.njit(error_model="numpy")
def _floats(bits, conversion, table, shift, out):
    _with_widest_registers()
    if conversion == _NORMAL:
        _normals(bits, out)
    elif conversion == _BITS:
        out[:] = bits.view(np.float32)
    else:
        for i in range(len(bits)):
            out[i] = table[(bits[i] >> _u32(shift)) & _u32(len(table) - 1)]


@_compiled(
    "void(uint32[:, :, ::1], int64[::1], uint32[:, ::1], boolean, int64, int64, int64, float32[::1], int64, "
    "float32[::1])"
)
def _fill(keys, bounds, runs, philox, start, stop, conversion, table, shift, out):
    """Elements `start` to `stop` of all rows, one after the other."""
    _with_widest_registers()
    block = np.empty(_BLOCK + _LANES, np.uint32)
    length = bounds[-1]
    row, column = start // length, start % length
    run = np.searchsorted(bounds, column, side="right") - 1
    while start < stop:
        # Bits of as many runs as it takes to fill the block.
        filled, count = 0, min(_BLOCK, stop - start)
        while filled < count:
            n = min(bounds[run + 1] - column, count - filled)
            # Whole registers, which take less time than a part of one: the next run writes over what is too much.
            part = block[filled : filled + -(-n // _LANES) * _LANES]
            k0, k1 = keys[row, runs[run, 0], 0], keys[row, runs[run, 0], 1]
            first = column - bounds[run]
            if philox:
                _philox_bits(k0, k1, runs[run, 1], runs[run, 2], _u32(first // 4), part)
            else:
                _threefry_bits(k0, k1, _u32(first), part)
            filled += n
            column += n
            if column == bounds[run + 1]:
                run += 1
                if column == length:
                    row, column, run = row + 1, 0, 0
        _floats(block[:count], conversion, table, shift, out[start : start + count])
        start += count
