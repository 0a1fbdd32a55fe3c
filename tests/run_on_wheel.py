"""Builds the wheel, installs it into a fresh environment outside the repository, and runs the suite on it there.

Everything but eggroll comes from the environment that runs this script, through a path entry, so nothing is installed
twice; the editable install of that environment does not reach through such an entry.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="eggroll-wheel-") as folder:
        outside = Path(folder)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", str(outside / "dist"), str(REPOSITORY))
        (wheel,) = (outside / "dist").glob("*.whl")
        venv.create(outside / "venv", with_pip=True)
        python = outside / "venv" / "bin" / "python"
        run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
        site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", capture=True).strip()
        Path(site, "development.pth").write_text(sysconfig.get_path("purelib") + "\n")
        for part in ("tests", "examples", "benchmarks", "docs"):
            shutil.copytree(REPOSITORY / part, outside / part)
        for part in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPOSITORY / part, outside)
        where = run(str(python), "-c", "import eggroll; print(eggroll.__file__)", capture=True, cwd=outside)
        if Path(site) not in Path(where.strip()).parents:
            raise SystemExit(f"the wheel is not what is imported: {where}")
        arguments = [str(python), "-m", "pytest", "-p", "no:cacheprovider", *sys.argv[1:]]
        return subprocess.run(arguments, cwd=outside).returncode


def run(*command: str, capture: bool = False, cwd: Path | None = None) -> str:
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None, cwd=cwd)
    return done.stdout if capture else ""


if __name__ == "__main__":
    sys.exit(main())
