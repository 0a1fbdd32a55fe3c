"""What is built and installed, seen from outside the repository."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = Path(__file__).parent
PACKAGES = {"eggroll": ROOT / "eggroll"} | {
    name: ROOT / "backends" / name for name in ("eggroll_torch", "eggroll_jax")
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / "eggroll" / "__init__.py").exists(), reason="there is no source tree to build from"
    ),
]

# What pip says where it has no network to fetch the build backend from.
UNREACHABLE = (
    "No matching distribution found for hatchling",
    "Could not find a version that satisfies",
    "Connection",
)


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTEST_ADDOPTS"}}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def pip(*arguments: object, cwd: Path) -> None:
    """Runs pip, which builds with the hatchling at hand, or with one that it fetches."""
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    done = run(
        sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--no-deps", *isolation, cwd=cwd
    )
    if done.returncode and any(reason in done.stderr for reason in UNREACHABLE):
        pytest.skip("pip cannot fetch hatchling, which builds the package")
    assert done.returncode == 0, done.stderr


def fresh_environment(directory: Path) -> Path:
    """The interpreter of a new environment that sees the packages of this one, but not its editable installs.

    A path in a ``.pth`` file is put on `sys.path`; the ``.pth`` files that lie there, which is how an editable
    install works, are not read.
    """
    venv.create(directory, with_pip=False)
    python = directory / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    found = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory)
    site = Path(found.stdout.strip())
    assert site.is_relative_to(directory)
    (site / "packages-of-the-parent.pth").write_text(
        "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    )
    return python


def install(python: Path, *what: object) -> None:
    pip("--python", python, "install", "--quiet", "--ignore-installed", *what, cwd=python.parent)


def where(python: Path, cwd: Path) -> dict[str, Path]:
    """Where an interpreter imports the packages from; the trainer has taken a step."""
    program = """
import torch, eggroll, eggroll.torch, eggroll_torch
model = torch.nn.Linear(3, 2)
trainer = eggroll.EGGROLLTrainer(model.parameters(), model=model, population_size=8, seed=0)
assert trainer.tell(trainer.ask()(torch.ones(3)).sum(1))["generation"] == 1
print(eggroll.__file__, eggroll_torch.__file__, sep="\\n")
"""
    done = run(python, "-c", program, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return dict(zip(("eggroll", "eggroll_torch"), map(Path, done.stdout.split()), strict=True))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--wheel-dir", directory, ROOT, cwd=directory)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel, outside the repository."""
    python = fresh_environment(tmp_path_factory.mktemp("installed") / "venv")
    install(python, wheel)
    return python


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        (Path(package) / path.relative_to(folder)).as_posix()
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert wheel.name.startswith("eggroll_xp-")


def test_the_wheel_carries_licence_and_requirements(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    assert "License-Expression: MIT" in lines
    required = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert sorted(line.split()[1].partition(">")[0] for line in required) == ["array-api-compat", "numpy"]
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_the_installed_wheel_is_what_is_imported(installed: Path):
    for path in where(installed, installed.parent).values():
        assert path.is_relative_to(installed.parents[1])


def test_the_installed_wheel_loads_no_framework_by_itself(installed: Path):
    program = "import sys, eggroll; assert not {'torch', 'jax', 'eggroll_torch'} & set(sys.modules)"
    done = run(installed, "-c", program, cwd=installed.parent)
    assert done.returncode == 0, done.stderr


def test_tests_pass_against_the_installed_wheel(installed: Path, tmp_path: Path):
    """A copy of some tests, away from the repository."""
    shutil.copytree(TESTS, tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    some = "tests/torch_backend/test_trajectories.py"
    done = run(
        installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "replays and None", some, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize("editable", [False, True], ids=["pip install .", "pip install -e ."])
def test_an_installation_from_the_source_tree(editable: bool, tmp_path: Path):
    python = fresh_environment(tmp_path / "venv")
    install(python, *(["--editable", ROOT] if editable else [ROOT]))
    home = ROOT if editable else tmp_path
    for path in where(python, tmp_path).values():
        assert path.is_relative_to(home)
