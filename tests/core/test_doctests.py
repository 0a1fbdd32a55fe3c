"""The examples in the docstrings of the core run and say the truth."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["config", "prng", "perturbation", "fitness", "update"])
def test_doctests(name):
    results = doctest.testmod(importlib.import_module(f"eggroll.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
