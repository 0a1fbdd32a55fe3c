"""Ctrl-C, held back from what must happen whole."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["surely", "uninterrupted"]


class _Hold:
    """Ctrl-C held back, in the main thread."""

    def __init__(self, once: bool):
        self._once = once
        self._came = False
        self._active = threading.current_thread() is threading.main_thread()
        self._active = self._active and signal.getsignal(signal.SIGINT) is not None
        self._before: Any = None

    def begin(self) -> None:
        if self._active:
            self._before = signal.signal(signal.SIGINT, self._note)

    def end(self) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)
            if self._came:
                self._came = False
                signal.raise_signal(signal.SIGINT)

    def released(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function returns that Ctrl-C may interrupt, also one that has come before."""
        try:
            self.end()
            return function(*args)
        finally:
            self.begin()

    def _note(self, *signal_and_frame: Any) -> None:
        if self._came and self._once and callable(self._before):
            self._before(*signal_and_frame)
        self._came = True


@contextlib.contextmanager
def uninterrupted(once: bool = False) -> Iterator[_Hold]:
    """Holds Ctrl-C back until the body is done: what must happen whole happens whole.

    Args:
        once: whether a second one, of somebody who does not want to wait, comes through.
    """
    hold = _Hold(once)
    hold.begin()
    try:
        yield hold
    finally:
        hold.end()


def surely(restore: Callable[[], None]) -> None:
    """Calls what puts things back, however often, which is done whole also where Ctrl-C comes now."""
    try:
        with uninterrupted():
            restore()
    except BaseException:
        restore()  # the interrupt may have come before it was held back
        raise
