"""What every test may rely on, however the suite was started."""

import signal

import pytest


def pytest_configure() -> None:
    # A shell that starts the suite in the background has it ignore Ctrl-C, and with it every process that it starts:
    # tests that interrupt something would then wait for ever.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # First what takes minutes: at the end one process would be at it while the other has nothing left to take over.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
