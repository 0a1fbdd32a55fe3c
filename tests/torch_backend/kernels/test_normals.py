"""The normal transform, against `eggroll.prng.normal`: for every mantissa, and at the worst that instructions may do.

A GPU's instructions for logarithm and root are not exact; the PTX manual bounds their errors. In the interpreter they
are made as large as that, in either direction.
"""

from typing import Any

import array_api_compat
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from core.support import ulp_distance
from torch import Tensor
from torch_backend.kernels.support import ON_GPU
from triton.runtime import interpreter

from eggroll import prng
from eggroll_torch.kernels import normals

# Bounds of lg2.approx (absolute for results up to 1, relative beyond) and of sqrt.approx (relative).
LOGARITHM, ROOT = 2.0**-22, 2.0**-23


@triton.jit
def _transform_kernel(bits, out, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(bits + place).to(tl.uint32, bitcast=True)
    tl.store(out + place, normals.normal_of_bits(words, out, "float32"))


def transformed(mantissas: Tensor) -> Tensor:
    """What the kernels make of bits with these mantissas, int32 ``(n,)``, float32 ``(n,)``."""
    block = 2**10 if ON_GPU else 2**16
    padded = torch.nn.functional.pad(mantissas << 9, (0, -len(mantissas) % block))
    out = torch.empty(len(padded), device=padded.device)
    _transform_kernel[(len(padded) // block,)](padded, out, BLOCK=block, enable_fp_fusion=False)
    return out[: len(mantissas)]


def defined(mantissas: Tensor) -> np.ndarray:
    words = mantissas.cpu().numpy()
    xp = array_api_compat.array_namespace(words)
    return prng._erfinv(xp, prng._uniform_of(xp, words, 23)) * prng.SQRT2


def mantissas(device: torch.device) -> Tensor:
    """All of them on a GPU; else a part, but all of the tail: half a percent at either end."""
    every = torch.arange(2**23, dtype=torch.int32, device=device)
    end = 2**23 // 200
    return every if ON_GPU else torch.cat([every[:end], every[end:-end:97], every[-end:]])


def test_every_mantissa(device: torch.device):
    chosen = mantissas(device)
    assert ulp_distance(transformed(chosen).cpu(), defined(chosen)) <= 3


@pytest.mark.skipif(ON_GPU, reason="a GPU has its own errors, which the test above sees")
@pytest.mark.parametrize("of_root", [-1, 1])
@pytest.mark.parametrize("of_logarithm", [-1, 1])
def test_errors_of_the_instructions_stay_within_the_tolerance(
    of_logarithm: int, of_root: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    def worst(exact: np.ndarray, bound: np.ndarray, direction: int) -> np.ndarray:
        """The float32 numbers furthest from `exact` in this direction that are within `bound`."""
        found = (exact + direction * bound).astype(np.float32)
        beyond = np.abs(found - exact) > bound
        return np.where(beyond, np.nextafter(found, np.float32(-direction * np.inf)), found)

    def log2(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        exact = np.log2(x.data.astype(np.float64))
        bound = LOGARITHM * np.where(x.data > 0.5, 1, np.abs(exact))
        return handle(np.minimum(worst(exact, bound, of_logarithm), 0), x)

    def root(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        exact = np.sqrt(x.data.astype(np.float64))
        return handle(worst(exact, ROOT * exact, of_root), x)

    def multiply_add(a: Any, b: Any, c: Any) -> interpreter.TensorHandle:
        """Rounded once, as on a GPU; the interpreter rounds the product, too."""
        return handle(a.data.astype(np.float64) * b.data + c.data, c)

    def handle(values: np.ndarray, like: interpreter.TensorHandle) -> interpreter.TensorHandle:
        return interpreter.TensorHandle(values.astype(np.float32), like.dtype.scalar)

    for name, instruction in {"log2": log2, "sqrt": root, "fma": multiply_add}.items():
        monkeypatch.setattr(interpreter.interpreter_builder, f"create_{name}", instruction)
    chosen = mantissas(device)
    assert ulp_distance(transformed(chosen), defined(chosen)) <= 3
