"""The examples in the docstrings of the PyTorch backend."""

import doctest
import importlib
import pkgutil

import pytest

import eggroll_torch

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(eggroll_torch.__path__, "eggroll_torch.")
    if ".kernels" not in module.name
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_the_public_classes_have_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in ("EGGROLLTrainer", "ESTrainer", "Population"):
        tests = finder.find(getattr(eggroll_torch, name), name)
        assert any(test.examples for test in tests), name
