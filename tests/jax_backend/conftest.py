"""What the tests of the JAX backend share."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """XLA without its costly passes: these tests compile many small programs and run each a few times.

    The replayed runs and the run on several devices are compiled as users' programs are.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
