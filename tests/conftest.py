"""What every test may rely on, however the suite was started."""

import signal
from collections.abc import Iterator

import pytest


def pytest_configure() -> None:
    # A shell that starts the suite in the background has it ignore Ctrl-C, and with it every process that it starts:
    # tests that interrupt something would then wait for ever.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # First what takes minutes: at the end one process would be at it while the other has nothing left to take over.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """XLA without its costly passes: most tests compile many small programs and run each a few times.

    The runs that are replayed through optax, the run on several devices, the parity command and the comparison with
    `jax.random` are compiled as users' programs are.
    """
    jax = pytest.importorskip("jax")
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def full_compilation(quick_compilation: None) -> Iterator[None]:
    """XLA as users run it, which may fuse a product with a sum."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
