"""Tolerances hold what they should and nothing else; a report is green only if something was compared."""

import numpy as np
import pytest

from eggroll.parity.report import EQUAL, InexpressibleError, Pair, Report, Tolerance, ulp_distance

ONE = np.float32(1)
NEXT = np.nextafter(ONE, np.float32(2))


def verdict(tolerance, actual, expected):
    report = Report()
    report.compare("q", "b", tolerance, lambda: [Pair("here", np.asarray(actual), np.asarray(expected))])
    return report.rows[0].verdict


@pytest.mark.parametrize(
    ("tolerance", "actual", "expected", "holds"),
    [
        (EQUAL, [1, 2], [1, 2], True),
        (EQUAL, np.uint32([0]), np.uint32([2**32 - 1]), False),
        (EQUAL, [ONE], [NEXT], False),
        (EQUAL, [np.float32(0)], [np.float32(-0.0)], True),
        (Tolerance("ulp", 1), [ONE], [NEXT], True),
        (Tolerance("ulp", 1), [ONE], [np.nextafter(NEXT, np.float32(2))], False),
        (Tolerance("absolute", 0.1), [5.05], [5.0], True),
        (Tolerance("absolute", 0.1), [5.15], [5.0], False),
        (Tolerance("relative", 0.1), [10.9, 1.0], [10.0, 1.9], True),
        (Tolerance("relative", 0.1), [10.9, 1.0], [10.0, 2.1], False),
        (Tolerance("relative", 0.1), [0.0], [0.0], True),
        (Tolerance("relative", 0.1), [1e-9], [0.0], False),
        (Tolerance("absolute", 9.0), [np.nan], [1.0], False),
        (Tolerance("absolute", 9.0), [np.inf], [np.inf], False),
        (Tolerance("absolute", 9.0), [1.0, 1.0], [1.0], False),
        (Tolerance("absolute", 9.0), [1], [1.0], False),
    ],
)
def test_a_tolerance(tolerance, actual, expected, holds):
    assert verdict(tolerance, actual, expected) == ("pass" if holds else "FAIL")


def test_ulp_distance_counts_across_zero():
    tiny = np.nextafter(np.float32(0), ONE)
    assert ulp_distance(np.asarray([tiny]), np.asarray([-tiny])) == 2


def test_a_row_says_where_the_worst_difference_is():
    report = Report()
    near, far = np.asarray([1.0]), np.asarray([3.0, 2.0])
    report.compare("q", "b", EQUAL, lambda: [Pair("a", near, near), Pair("z", far, far + 1.5)])
    [row] = report.rows
    assert (row.values, row.max_abs, row.note) == (3, 1.5, "at z")
    assert "FAIL (at z)" in report.table()


def test_what_raises_fails_and_what_cannot_be_expressed_is_skipped():
    def broken():
        raise RuntimeError("no such thing\nand more")

    def inexpressible():
        raise InexpressibleError("it has no bfloat16")

    report = Report()
    report.compare("broken", "b", EQUAL, broken)
    report.compare("inexpressible", "b", EQUAL, inexpressible)
    report.compare("empty", "b", EQUAL, list)
    assert [row.verdict for row in report.rows] == ["FAIL", "skipped", "FAIL"]
    assert [row.note for row in report.rows] == [
        "RuntimeError: no such thing",
        "it has no bfloat16",
        "nothing to compare",
    ]


def test_green_needs_a_row_that_holds_and_none_that_fails():
    one = np.ones(1)
    report = Report()
    assert not report.ok
    report.skip("q", "b", "no")
    assert not report.ok
    assert report.summary().startswith("nothing was compared")
    report.compare("q", "b", EQUAL, lambda: [Pair("x", one, one)])
    assert report.ok
    report.compare("q", "b", EQUAL, lambda: [Pair("x", one, one + 1)])
    assert not report.ok


def test_only_what_is_asked_for_is_computed():
    report = Report(only=("bits",))
    report.compare("normals", "b", EQUAL, lambda: pytest.fail("not asked for"))
    report.skip("normals", "b", "no")
    assert report.rows == []
    assert Report(only=("run 0: keys",)).wants_any("run 0: ")
    assert not Report(only=("run 1",)).wants_any("run 0: ")
