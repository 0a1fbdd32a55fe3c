"""The core's tests run on every array library through one fixture."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from eggroll import philox, prng

LIBRARIES = {"numpy": "numpy", "array-api-strict": "array_api_strict", "torch": "torch", "jax": "jax.numpy"}


@functools.cache
def _jitted(plain: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    jitted = jax.jit(plain)
    return lambda k0, *words: (jitted if isinstance(k0, jax.Array) else plain)(k0, *words)


@pytest.fixture(params=LIBRARIES)
def xp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An array library; the tests of one that is not installed are skipped.

    JAX compiles each operation for each shape. The rounds of the generators, integers and hence equal either
    way, are compiled as one here, or most of the time of these tests would be spent on them.
    """
    library = pytest.importorskip(LIBRARIES[request.param], reason=f"{request.param} is not installed")
    if request.param == "jax":
        for module, name in ((prng, "_block"), (philox, "block")):
            monkeypatch.setattr(module, name, _jitted(getattr(module, name)))
    return library
