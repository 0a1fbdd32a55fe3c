"""The smaller examples run and learn, on a part of their budget; `make demo` has tests of its own."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not part of the wheel")


@pytest.fixture
def main(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What an example runs, by its name."""
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, request.param, module)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as missing:
        pytest.skip(f"needs {missing.name}")
    return module.main


@pytest.mark.parametrize("main", ["cartpole"], indirect=True)
def test_the_pole_is_balanced_for_longer(main):
    assert main(generations=10, verbose=False) > 60  # an untrained policy: 9


@pytest.mark.parametrize("main", ["jax_scan"], indirect=True)
def test_the_step_function_is_fitted(main):
    before, after = main()
    assert after > before / 2  # both are negative


@pytest.mark.parametrize("main", ["jax_nnx_digits"], indirect=True)
def test_digits_are_told_apart(main):
    assert main(generations=30) > 0.6  # one in ten by chance
