"""`import eggroll` loads no framework, and a backend without its framework says what to install."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import eggroll

HOUSE = Path(eggroll.__file__).parent
FACADES = {"torch.py", "jax.py"}
FRAMEWORKS = {
    "torch",
    "jax",
    "jaxlib",
    "optax",
    "flax",
    "quax",
    "equinox",
    "numba",
    "eggroll_torch",
    "eggroll_jax",
    "tqdm",
}
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "import eggroll",
        "import eggroll; dir(eggroll); eggroll.EggrollConfig()",
        "import eggroll.config, eggroll.prng, eggroll.perturbation, eggroll.fitness, eggroll.update",
        "import eggroll.prng as p, eggroll.update as u, eggroll as e, numpy as n\n"
        "u.direction(p.key(0), (3, 2), 0, n.ones(2), e.EggrollConfig(population_size=2))",
    ],
)
def test_the_core_loads_no_framework(code):
    done = run(f"{code}\nimport sys\nprint(*sorted({FRAMEWORKS!r} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def imported_roots(tree: ast.AST) -> set[str]:
    """The top-level packages that a file imports anywhere but under ``if TYPE_CHECKING``."""
    roots = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots.add(node.module.partition(".")[0])
        roots |= imported_roots(node)
    return roots


CORE = sorted(path.name for path in HOUSE.glob("*.py") if path.name not in FACADES)


def test_the_core_is_where_it_is_looked_for():
    assert {"__init__.py", "config.py", "prng.py", "perturbation.py", "fitness.py", "update.py"} <= set(CORE)
    assert imported_roots(ast.parse("def f():\n    import jax.numpy as jnp")) == {"jax"}


@pytest.mark.parametrize("name", CORE)
def test_no_file_of_the_core_imports_a_framework(name):
    assert not imported_roots(ast.parse((HOUSE / name).read_text())) & FRAMEWORKS


@pytest.mark.parametrize(
    ("code", "missing", "message"),
    [
        ("import eggroll.torch", "torch", "eggroll.torch needs PyTorch: pip install 'eggroll-xp[torch]'"),
        (
            "from eggroll import EGGROLLTrainer",
            "torch",
            "eggroll.torch needs PyTorch: pip install 'eggroll-xp[torch]'",
        ),
        (
            "import eggroll; eggroll.ESTrainer",
            "torch",
            "eggroll.torch needs PyTorch: pip install 'eggroll-xp[torch]'",
        ),
        ("import eggroll.jax", "jax", "eggroll.jax needs jax: pip install 'eggroll-xp[jax]'"),
        ("import eggroll.jax", "optax", "eggroll.jax needs optax: pip install 'eggroll-xp[jax]'"),
        ("import eggroll.jax", "quax", "eggroll.jax needs quax: pip install 'eggroll-xp[jax]'"),
    ],
)
def test_a_facade_without_its_framework_says_which_extra_to_install(code, missing, message):
    if missing in {"optax", "quax"}:
        pytest.importorskip("jax", reason="jax is not installed")
    done = run(BLOCK.format(missing={missing}) + code)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(f"ModuleNotFoundError: {message}")


def test_the_core_works_where_no_framework_is_installed():
    done = run(BLOCK.format(missing=FRAMEWORKS) + "import eggroll; print(eggroll.EggrollConfig().draws)")
    assert (done.returncode, done.stdout.strip()) == (0, "128"), done.stderr


def test_public_names():
    assert set(eggroll.__all__) == {"EGGROLLTrainer", "ESTrainer", "EggrollConfig", "VanillaESTrainer"}
    assert set(eggroll.__all__) <= set(dir(eggroll))
    with pytest.raises(AttributeError, match="module 'eggroll' has no attribute 'Trainer'"):
        _ = eggroll.Trainer
