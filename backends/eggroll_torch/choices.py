"""How the user wants single parameters perturbed: low rank, dense or frozen, with a rank and a sigma of their own."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from eggroll.config import as_choice, as_int, as_positive_float

__all__ = ["OPTIONS", "Choice", "choices_by_name"]

OPTIONS = ("noise", "rank", "sigma")
"""What a parameter group, or an entry of `noise`, may say."""

KINDS = ("low_rank", "dense", "frozen")


@dataclass(frozen=True)
class Choice:
    """What was chosen for one parameter; None where nothing was.

    Attributes:
        noise: ``"low_rank"``, ``"dense"`` or ``"frozen"``.
        rank: columns of the factors.
        sigma: scale of the perturbation.
    """

    noise: str | None = None
    rank: int | None = None
    sigma: float | None = None

    def over(self, other: "Choice") -> "Choice":
        """This choice, completed by another."""
        return Choice(
            other.noise if self.noise is None else self.noise,
            other.rank if self.rank is None else self.rank,
            other.sigma if self.sigma is None else self.sigma,
        )


def choices_by_name(
    noise: Mapping[str, Any] | None, param_groups: Iterable[Mapping[str, Any]], names: Mapping[int, str]
) -> dict[str, Choice]:
    """The choice for every parameter of the groups: the first pattern of `noise` that fits, completed by its group's.

    Args:
        noise: by name pattern (as in `fnmatch`), a kind or a mapping of `OPTIONS`.
        param_groups: the trainer's.
        names: of the model's parameters, by `id`.

    Raises:
        TypeError, ValueError: an unknown option or kind, a value that breaks its rule, a pattern that is no string or
            fits no parameter.
    """
    for pattern in noise or {}:
        if not isinstance(pattern, str):
            raise TypeError(f"`noise` must have name patterns, which are strings, as keys, got {pattern!r}")
    patterns = {pattern: _choice(f"noise[{pattern!r}]", value) for pattern, value in (noise or {}).items()}
    chosen: dict[str, Choice] = {}
    for group in param_groups:
        of_group = _choice("params", {option: group[option] for option in OPTIONS if group.get(option) is not None})
        for parameter in _parameters(group["params"]):
            name = names.get(id(parameter))
            if name is not None:
                fitting = (choice for pattern, choice in patterns.items() if fnmatch.fnmatchcase(name, pattern))
                chosen[name] = next(fitting, Choice()).over(of_group)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in chosen):
            raise ValueError(f"`noise` has the pattern {pattern!r}, which fits no parameter in `params`")
    return chosen


def _choice(where: str, value: Any) -> Choice:
    if isinstance(value, str):
        value = {"noise": value}
    if not isinstance(value, Mapping):
        raise TypeError(f"`{where}` must be one of {', '.join(map(repr, KINDS))} or a mapping, got {value!r}")
    if unknown := set(value) - set(OPTIONS):
        raise ValueError(f"`{where}` may have the options {list(OPTIONS)}, got {sorted(unknown, key=str)}")
    choice = Choice()
    if value.get("noise") is not None:
        choice = replace(choice, noise=as_choice(f"{where}: noise", value["noise"], KINDS))
    if value.get("rank") is not None:
        choice = replace(choice, rank=as_int(f"{where}: rank", value["rank"], 1))
    if value.get("sigma") is not None:
        choice = replace(choice, sigma=as_positive_float(f"{where}: sigma", value["sigma"]))
    return choice


def _parameters(params: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [params] if isinstance(params, Tensor) else params
