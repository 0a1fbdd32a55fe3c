"""Tolerances, the rows of the table, and the verdict."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

__all__ = [
    "BFLOAT16",
    "CHUNKED",
    "EQUAL",
    "NORMALS",
    "OUTPUTS",
    "SHAPED",
    "TRAINED",
    "TRAINED_BFLOAT16",
    "InexpressibleError",
    "Pair",
    "Report",
    "Row",
    "Tolerance",
    "ulp_distance",
]


class InexpressibleError(Exception):
    """A backend has no way to compute this; the message says why. It is listed as skipped, never as passed."""


@dataclass(frozen=True)
class Tolerance:
    """How far an array may be from the expected one.

    Attributes:
        unit: ``"equal"``, ``"ulp"`` (float32 values in between), ``"absolute"``, or ``"relative"`` to the largest
            magnitude in the expected array.
        limit: how many of them.
    """

    unit: Literal["equal", "ulp", "absolute", "relative"]
    limit: float = 0.0

    def __str__(self) -> str:
        words = {"equal": "equal", "ulp": f"{self.limit:g} ULP", "absolute": f"{self.limit:.3g}"}
        return words.get(self.unit, f"{self.limit:.3g} relative")

    def excess(self, actual: np.ndarray, expected: np.ndarray, scale: float | None = None) -> float:
        """The difference as a multiple of what is allowed; infinite for NaN, another shape or another kind.

        Args:
            scale: what a relative tolerance is relative to, instead of the largest magnitude in `expected`.
        """
        if not comparable(actual, expected):
            return np.inf
        difference = largest_difference(actual, expected)
        if difference == 0:
            return 0.0
        if self.unit == "ulp":
            return ulp_distance(actual, expected) / self.limit
        if self.unit == "relative":
            allowed = self.limit * (float(np.abs(expected).max()) if scale is None else scale)
        else:
            allowed = self.limit
        return difference / allowed if allowed else np.inf


EQUAL = Tolerance("equal")
# docs/parity.md says where each tolerance comes from.
NORMALS = Tolerance("ulp", 4)
OUTPUTS = Tolerance("relative", 1e-5)
SHAPED = Tolerance("absolute", 1e-6)
CHUNKED = Tolerance("relative", 1e-6)
TRAINED = Tolerance("relative", 1e-4)
# One unit in the last place of bfloat16, which has 8 significant bits; then that unit squared into fitness, shaped,
# and averaged over members into a step.
BFLOAT16 = Tolerance("relative", 2.0**-7)
TRAINED_BFLOAT16 = Tolerance("relative", 2.0**-5)


@dataclass(frozen=True)
class Pair:
    """One array as a backend computed it and as it should be; `scale` as in `Tolerance.excess`."""

    where: str
    actual: np.ndarray
    expected: np.ndarray
    scale: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table: one quantity on one backend."""

    quantity: str
    backend: str
    verdict: Literal["pass", "FAIL", "skipped"]
    tolerance: str = "-"
    values: int = 0
    max_abs: float | None = None
    max_ulp: int | None = None
    note: str = ""


@dataclass
class Report:
    """All rows so far.

    Args:
        only: beginnings of the names of the quantities to compare; empty for all.
        progress: called with each row as it is added.
    """

    only: tuple[str, ...] = ()
    progress: Callable[[Row], None] | None = None
    rows: list[Row] = field(default_factory=list)

    def wants(self, quantity: str) -> bool:
        """Whether `quantity` is among those to compare."""
        return not self.only or quantity.startswith(self.only)

    def wants_any(self, prefix: str) -> bool:
        """Whether a quantity whose name begins with `prefix` can be among those to compare."""
        return self.wants(prefix) or any(beginning.startswith(prefix) for beginning in self.only)

    def compare(self, quantity: str, backend: str, tolerance: Tolerance, pairs: Callable[[], Iterable[Pair]]) -> None:
        """Adds the row of `quantity`: whether all of `pairs()`, computed here, are within `tolerance`.

        `InexpressibleError` makes it a skipped row; any other exception a failed one, since a backend that cannot
        compute what it should does not agree. An empty comparison fails too.
        """
        if not self.wants(quantity):
            return
        try:
            row = _compared(quantity, backend, tolerance, list(pairs()))
        except InexpressibleError as reason:
            row = Row(quantity, backend, "skipped", note=str(reason))
        except Exception as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            row = Row(quantity, backend, "FAIL", str(tolerance), note=what)
        self.add(row)

    def skip(self, quantity: str, backend: str, reason: str) -> None:
        """Adds a row that says why `quantity` was not compared."""
        if self.wants(quantity):
            self.add(Row(quantity, backend, "skipped", note=reason))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.progress is not None:
            self.progress(row)

    def count(self, verdict: str) -> int:
        return sum(row.verdict == verdict for row in self.rows)

    @property
    def ok(self) -> bool:
        """Whether something was compared and all of it holds."""
        return self.count("pass") > 0 and self.count("FAIL") == 0

    def summary(self) -> str:
        counts = f"{self.count('pass')} hold, {self.count('FAIL')} fail, {self.count('skipped')} skipped"
        if self.ok:
            return f"parity holds: {counts}"
        return f"parity FAILS: {counts}" if self.count("FAIL") else f"nothing was compared: {counts}"

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {
            "ok": self.ok,
            "summary": self.summary(),
            "versions": versions(),
            "rows": [asdict(row) for row in self.rows],
        }

    def table(self) -> str:
        """All rows under a head, in aligned columns."""
        head = ["quantity", "backend", "values", "max abs diff", "max ULP", "tolerance", "verdict"]
        cells = [head, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        right = {2, 3, 4}
        lines = [
            "  ".join(
                cell.rjust(width) if place in right else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        return "\n".join([lines[0], "-" * min(max(map(len, lines)), 118), *lines[1:]])


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that are loaded."""
    libraries = ("numpy", "torch", "jax", "optax", "quax")
    loaded = {name: sys.modules[name].__version__ for name in libraries if name in sys.modules}
    return {"python": sys.version.split()[0], **{name: str(version) for name, version in loaded.items()}}


def comparable(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Whether the arrays have one shape, are both integers or both floats, and hold finite numbers."""
    same_kind = (actual.dtype.kind in "iu") == (expected.dtype.kind in "iu")
    return (
        actual.shape == expected.shape and same_kind and bool(np.isfinite(actual).all() & np.isfinite(expected).all())
    )


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest absolute difference, computed where it neither wraps nor rounds."""
    wide = np.int64 if a.dtype.kind in "iu" else np.float64
    return float(np.abs(a.astype(wide) - b.astype(wide)).max(initial=0))


def ulp_distance(a: np.ndarray, b: np.ndarray) -> int:
    """How many float32 values lie between `a` and `b`, at the worst element."""

    def place(x: np.ndarray) -> np.ndarray:
        word = np.atleast_1d(np.asarray(x, dtype=np.float32)).view(np.int32).astype(np.int64)
        return np.where(word < 0, -(2**31) - word, word)

    return int(np.abs(place(a) - place(b)).max(initial=0))


def _compared(quantity: str, backend: str, tolerance: Tolerance, pairs: list[Pair]) -> Row:
    values = sum(pair.expected.size for pair in pairs)
    if not values:
        return Row(quantity, backend, "FAIL", str(tolerance), note="nothing to compare")
    excess = [tolerance.excess(pair.actual, pair.expected, pair.scale) for pair in pairs]
    worst = int(np.argmax(excess))
    measurable = [pair for pair in pairs if comparable(pair.actual, pair.expected)]
    floats = [pair for pair in measurable if pair.expected.dtype.kind == "f"]
    return Row(
        quantity,
        backend,
        "FAIL" if excess[worst] > 1 else "pass",
        str(tolerance),
        values,
        max((largest_difference(pair.actual, pair.expected) for pair in measurable), default=None),
        max((ulp_distance(pair.actual, pair.expected) for pair in floats), default=None),
        _complaint(pairs[worst]) if excess[worst] > 1 else "",
    )


def _complaint(pair: Pair) -> str:
    if pair.actual.shape != pair.expected.shape:
        return f"at {pair.where}: shape {pair.actual.shape}, expected {pair.expected.shape}"
    return f"at {pair.where}" if comparable(pair.actual, pair.expected) else f"at {pair.where}: not finite numbers"


def _cells(row: Row) -> list[str]:
    verdict = f"{row.verdict} ({row.note})" if row.note else row.verdict
    return [
        row.quantity,
        row.backend,
        str(row.values) if row.values else "-",
        "-" if row.max_abs is None else f"{row.max_abs:.3g}",
        "-" if row.max_ulp is None else str(row.max_ulp),
        row.tolerance,
        verdict,
    ]
