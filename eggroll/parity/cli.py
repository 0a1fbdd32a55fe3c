"""The command: its arguments, and what it prints and returns."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .backends import Backend, backends_named, installed
from .quantities import compare_backends
from .report import Report, versions

__all__ = ["main"]

_DESCRIPTION = """
Compares every installed backend with the definition, the array-API core on NumPy: keys, bits, uniforms, normals,
factors, dense noise, outputs of populations of an MLP, a CNN and an attention block, shaped fitness, directions and
ten generations of training. With --vectors or --reference it compares with those instead.
"""
_EPILOG = """
exit status: 0 if something was compared and all of it holds, 1 if not, 2 for a bad argument or an unreadable file,
130 if it was interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("eggroll-parity: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    try:
        if options.write_vectors is not None:
            return _write_vectors(options)
        report = _report(options)
    except _UsageError as error:
        print(f"eggroll-parity: error: {error}", file=sys.stderr)
        return 2
    print(report.table())
    print()
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(report.summary())
    if not report.ok and not report.count("FAIL"):
        print(_why_nothing(options))
    return 0 if report.ok else 1


def _why_nothing(options: argparse.Namespace) -> str:
    if options.only:
        return f"no quantity could be compared whose name begins with {' or '.join(map(repr, options.only))}"
    if options.vectors or options.reference:
        return "none of it can be replayed on these backends"
    return "NumPy alone has nothing to compare with but --vectors: pip install 'eggroll-xp[torch]' or '[jax]'"


class _UsageError(Exception):
    """What a user can put right."""


def _report(options: argparse.Namespace) -> Report:
    report = Report(only=tuple(options.only or ()))
    backends = _backends(options.backends)
    # Before anything is computed: a path that cannot be written is a bad argument.
    _check_writable(options.json)
    if options.vectors is None and options.reference is None:
        compare_backends(report, backends, options.seed, options.quick)
    if options.vectors is not None:
        from .vectors import VectorError, compare_vectors

        try:
            compare_vectors(report, backends, options.vectors)
        except VectorError as error:
            raise _UsageError(f"`--vectors` {error}") from None
    if options.reference is not None:
        from .reference import CheckoutError, compare_reference

        try:
            compare_reference(report, backends, options.reference, options.seed, options.quick)
        except CheckoutError as error:
            raise _UsageError(f"`--reference` {error}") from None
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    return report


def _write_vectors(options: argparse.Namespace) -> int:
    directory = options.write_vectors
    for name in ("vectors", "reference", "json", "only", "backends", "quick"):
        if getattr(options, name) not in (None, False):
            raise _UsageError(f"`--write-vectors` compares nothing: it must be without `--{name}`")
    from .writing import write_vectors

    try:
        paths = write_vectors(directory, options.seed)
    except OSError as error:
        raise _UsageError(
            f"`--write-vectors` must be a directory that can be written, got {directory}: {error.strerror}"
        ) from None
    print(f"wrote {', '.join(path.name for path in paths)} to {directory}")
    return 0


def _backends(names: str | None) -> list[Backend]:
    if names is None:
        return installed()
    try:
        return backends_named([name.strip() for name in names.split(",")])
    except ValueError as error:
        raise _UsageError(f"`--backends` {error}") from None


def _check_writable(path: Path | None) -> None:
    """Raises an error unless it is a path that can be written; what is there, or is not, stays as it is."""
    if path is None:
        return
    new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise _UsageError(f"`--json` must be a file that can be written, got {path}: {error.strerror}") from None
    if new:
        path.resolve().unlink()


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**64:
        raise argparse.ArgumentTypeError(f"must be an int in [0, 2**64), got {text!r}")
    return seed


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("eggroll-parity", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument(
        "--backends",
        metavar="A,B",
        help="of numpy, torch, jax, or one device of them, such as torch-cuda; all that are installed by default",
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and configurations: under a minute")
    parser.add_argument(
        "--only", type=_names, metavar="A,B", help="quantities whose names begin like this, such as 'factors,bits'"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of keys, parameters and inputs (default 0)")
    parser.add_argument("--vectors", type=Path, metavar="DIR", help="replay the recorded vectors in this directory")
    parser.add_argument(
        "--reference", type=Path, metavar="DIR", help="compare live with the HyperscaleES checkout in this directory"
    )
    parser.add_argument(
        "--write-vectors",
        type=Path,
        metavar="DIR",
        help="compare nothing, but write vectors from --seed for --vectors, here or in another implementation",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table, with versions, to this file")
    return parser
