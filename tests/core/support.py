"""What the tests of the core share: the recorded vectors, and comparisons that do not know the array library."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

REFERENCE = Path(__file__).parents[1] / "reference"


@functools.cache
def recorded(name: str) -> dict[str, np.ndarray]:
    """The arrays of ``tests/reference/<name>.npz``."""
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def recorded_cases(name: str) -> list[dict[str, Any]]:
    """The cases that ``tests/reference/<name>.npz`` lists."""
    return json.loads(str(recorded(name)["cases"]))


def to_numpy(array: Any) -> np.ndarray:
    """An array of any library as NumPy's; bfloat16, which NumPy lacks, as float32."""
    if str(array.dtype).endswith("bfloat16"):
        array = array.float() if hasattr(array, "float") else array.astype("float32")
    return np.asarray(array)


def ulp_distance(a: Any, b: Any) -> int:
    """How many float32 values lie between `a` and `b`, at the worst element."""

    def place(x: Any) -> np.ndarray:
        x = to_numpy(x)
        assert x.dtype == np.float32
        word = np.atleast_1d(x).view(np.int32).astype(np.int64)
        return np.where(word < 0, -(2**31) - word, word)

    assert to_numpy(a).shape == to_numpy(b).shape
    return int(np.abs(place(a) - place(b)).max(initial=0))


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """`actual` equals `expected` to `tolerance`, relative to the largest magnitude in `expected`."""
    actual, expected = to_numpy(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    scale = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def compiled(xp: Any, function: Any) -> Any:
    """`function` of arrays as its library runs it at best: under `jax.jit` in JAX, as it is elsewhere.

    JAX run eagerly compiles each operation anew for each shape, which takes five times as long.
    """
    if xp.__name__ != "jax.numpy":
        return function
    import jax

    return jax.jit(function)
