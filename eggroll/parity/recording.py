"""Files of recorded vectors: NumPy archives, read whole and checked entry by entry."""

import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Recording", "VectorError", "read_directory"]

Kind = type | tuple[type, ...]


class VectorError(ValueError):
    """A directory or a file of vectors that cannot be used; the message names it and says what is wrong."""


class Recording:
    """One file: arrays by name.

    Args:
        name: what messages call it.
        arrays: its entries.
    """

    def __init__(self, name: str, arrays: Mapping[str, np.ndarray]):
        self.name = name
        self._arrays = dict(arrays)

    @classmethod
    def read(cls, path: Path) -> "Recording":
        """Reads an ``.npz`` file whole, without unpickling anything.

        Raises:
            VectorError: it cannot be read, is truncated, or is not an archive of arrays.
        """
        try:
            file = np.load(path, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise VectorError(f"{path}: must be an archive of arrays (.npz), got a single array")
            with file:
                return cls(path.name, {name: file[name] for name in file.files})
        except VectorError:
            raise
        except OSError as error:
            raise VectorError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise VectorError(f"{path}: not an archive of arrays (.npz), or a truncated one: {error}") from None

    def error(self, what: str) -> VectorError:
        return VectorError(f"{self.name}: {what}")

    def names(self, prefix: str) -> list[str]:
        """The entries whose name begins so, without that beginning."""
        return [name.removeprefix(prefix) for name in self._arrays if name.startswith(prefix)]

    def array(self, name: str, kinds: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """An entry, checked.

        Args:
            kinds: ``"integer"``, given back as it is, or ``"float"``, given back as float32.
            shape: None where any length will do.
        """
        if name not in self._arrays:
            raise self.error(f"has no entry {name!r}")
        array = self._arrays[name]
        if array.dtype.kind not in {"integer": "iu", "float": "f"}[kinds]:
            raise self.error(f"entry {name!r} must be {kinds}, got {array.dtype}")
        fits = len(shape) == array.ndim and all(
            want in (None, got) for want, got in zip(shape, array.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if length is None else str(length) for length in shape)
            raise self.error(f"entry {name!r} must have the shape ({wanted}), got {array.shape}")
        return array if kinds == "integer" else array.astype(np.float32)

    def key(self, name: str) -> np.ndarray:
        """An entry that is a key: uint32, shape ``(2,)``."""
        return self.words(name, (2,))

    def words(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """An entry of integers in [0, 2**32), as uint32."""
        values = self.array(name, "integer", shape)
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**32:
            raise self.error(f"entry {name!r} must hold integers in [0, 2**32)")
        return values.astype(np.uint32)

    def parsed(self, name: str) -> Any:
        """An entry that is a JSON text."""
        if name not in self._arrays:
            raise self.error(f"has no entry {name!r}")
        array = self._arrays[name]
        try:
            if array.ndim or array.dtype.kind != "U":
                raise ValueError(f"an array of {array.dtype} of shape {array.shape}")
            return json.loads(str(array))
        except ValueError as error:
            raise self.error(f"entry {name!r} must be a JSON text, got {error}") from None

    def fields(self, where: str, found: Any, kinds: Mapping[str, Kind]) -> dict[str, Any]:
        """The members of a JSON object that `kinds` lists with their types; others are left alone."""
        if not isinstance(found, dict):
            raise self.error(f"{where} must be a JSON object, got {type(found).__name__}")
        for name, kind in kinds.items():
            if name not in found:
                raise self.error(f"{where} has no {name!r}")
            value = found[name]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise self.error(f"{where}: {name!r} is {value!r}, of the wrong type")
            if isinstance(value, int | float) and value < 0:
                raise self.error(f"{where}: {name!r} must not be negative, got {value!r}")
        return {name: found[name] for name in kinds}

    def cases(self, kinds: Mapping[str, Kind]) -> list[dict[str, Any]]:
        """The entry ``cases``: a JSON list of objects with these members."""
        cases = self.parsed("cases")
        if not isinstance(cases, list):
            raise self.error(f"entry 'cases' must be a JSON list, got {type(cases).__name__}")
        return [self.fields(f"case {place}", case, kinds) for place, case in enumerate(cases)]


def read_directory(directory: Path, prefixes: Iterable[str]) -> list[tuple[str, Recording]]:
    """Every ``.npz`` file of a directory with the prefix of its kind, in the order of their names.

    Raises:
        VectorError: no directory, no such file in it, one of another kind, or one that cannot be read.
    """
    if not directory.is_dir():
        raise VectorError(f"must be a directory of recorded vectors, got {directory}")
    found = []
    for path in sorted(directory.glob("*.npz")):
        kind = next((prefix for prefix in prefixes if path.name.startswith(prefix)), None)
        if kind is None:
            known = ", ".join(f"{prefix}*.npz" for prefix in prefixes)
            raise VectorError(f"{path}: must be one of {known}")
        found.append((kind, Recording.read(path)))
    if not found:
        raise VectorError(f"must hold recorded vectors (.npz), {directory} has none")
    return found
