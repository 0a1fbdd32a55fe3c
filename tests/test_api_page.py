"""The page of public names and the names agree."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "api.md"


def documented(module: str) -> set[str]:
    section = PAGE.read_text().split(f"## `{module}`\n", 1)[1].split("\n## ", 1)[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE))


@pytest.mark.parametrize("module", ["eggroll", "eggroll.torch", "eggroll.jax"])
def test_every_public_name_is_on_the_page(module: str) -> None:
    exported = importlib.import_module(module).__all__
    assert set(exported) == documented(module)
    assert list(exported) == sorted(exported)


@pytest.mark.parametrize("module", ["eggroll", "eggroll.torch", "eggroll.jax"])
def test_every_public_name_exists_and_says_what_it_is(module: str) -> None:
    imported = importlib.import_module(module)
    for name in imported.__all__:
        assert (getattr(imported, name).__doc__ or "").strip(), name
