"""Attributes that users may set at any time, and whose values are checked each time."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from eggroll.config import as_choice

__all__ = ["Setting", "one_of"]

T = TypeVar("T")


class Setting(Generic[T]):
    """An attribute of a class.

    Args:
        check: given the attribute's name and a value, returns the value or raises an error that says what is wrong.
    """

    def __init__(self, check: Callable[[str, Any], T]):
        self._check = check
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        if instance is None:
            return self  # type: ignore[return-value]  # to whoever looks at the class, such as `help`
        if self._name not in vars(instance):
            raise AttributeError(f"{self._name!r} is not set")
        return vars(instance)[self._name]

    def __set__(self, instance: Any, value: T) -> None:
        vars(instance)[self._name] = self._check(self._name, value)


def one_of(*choices: str) -> Callable[[str, Any], Any]:
    """The check of a `Setting` that is one of several words."""
    return lambda name, value: as_choice(name, value, choices)
