"""The core's tests run on every array library through one fixture."""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from eggroll import philox, prng

LIBRARIES = {"numpy": "numpy", "array-api-strict": "array_api_strict", "torch": "torch", "jax": "jax.numpy"}


@functools.cache
def _jitted(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`, compiled where its last argument is of JAX; the namespace that may come first is no array."""
    import jax

    names = list(inspect.signature(plain).parameters)
    jitted = jax.jit(plain, static_argnums=[place for place, name in enumerate(names) if name == "xp"])
    return lambda *arguments: (jitted if isinstance(arguments[-1], jax.Array) else plain)(*arguments)


@pytest.fixture(params=LIBRARIES)
def xp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An array library; the tests of one that is not installed are skipped.

    JAX compiles each operation for each shape. The rounds of the generators and the polynomial of the normals are
    compiled as one here, or most of the time of these tests would be spent on them.
    """
    library = pytest.importorskip(LIBRARIES[request.param], reason=f"{request.param} is not installed")
    if request.param == "jax":
        request.getfixturevalue("quick_compilation")
        for module, name in ((prng, "_block"), (philox, "block"), (prng, "_erfinv")):
            monkeypatch.setattr(module, name, _jitted(getattr(module, name)))
    return library
