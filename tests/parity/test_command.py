"""The command: green on this machine, with every backend and with one; its arguments; what it writes."""

import json
import subprocess
import sys

import pytest

from eggroll.parity.cli import main

FRAMEWORKS = {"torch": {"torch"}, "jax": {"jax", "jaxlib", "optax", "quax"}}
WITHOUT = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
from eggroll.parity.cli import main
sys.exit(main({arguments!r}))
"""


def without(*frameworks, arguments):
    missing = set().union(*(FRAMEWORKS[name] for name in frameworks))
    code = WITHOUT.format(missing=missing, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)


def test_quick_is_green_with_every_backend_and_compares_everything(tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    assert main(["--quick", "--json", str(tmp_path / "table.json")]) == 0
    out = capsys.readouterr().out
    assert "parity holds" in out
    written = json.loads((tmp_path / "table.json").read_text())
    assert written["ok"] is True
    assert {"numpy", "torch", "jax"} <= set(written["versions"])
    for backend in ("torch-cpu", "jax-cpu"):
        rows = [row for row in written["rows"] if row["backend"] == backend]
        assert all(row["verdict"] == "pass" and row["values"] > 0 for row in rows)
        quantities = " ".join(row["quantity"] for row in rows)
        for quantity in (
            *(
                "fold_in",
                "split",
                "bits",
                "uniforms",
                "normals float32",
                "normals bfloat16",
                "factors A",
                "factors B",
            ),
            *("factors B", "dense noise", "outputs: MLP", "outputs: CNN", "outputs: attention", "direction: MLP"),
            *(
                "in chunks",
                "zscore",
                "group_zscore",
                "centered_rank",
                "fitness: sign",
                "baseline",
                "raw",
                "10 generations",
            ),
        ):
            assert quantity in quantities, quantity


@pytest.mark.parametrize(("missing", "there"), [("jax", "torch-cpu"), ("torch", "jax-cpu")])
def test_green_with_one_backend(missing, there):
    pytest.importorskip(there.partition("-")[0])
    done = without(missing, arguments=["--quick", "--only", "keys,population outputs: MLP"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert there in done.stdout
    assert missing not in done.stdout


def test_numpy_alone_has_nothing_to_compare_with_but_vectors():
    done = without("torch", "jax", arguments=["--quick"])
    assert done.returncode == 1
    assert "nothing was compared" in done.stdout
    assert "pip install 'eggroll-xp[torch]'" in done.stdout


def test_numpy_alone_replays_vectors(pytestconfig):
    vectors = str(pytestconfig.rootpath / "tests" / "reference")
    done = without("torch", "jax", arguments=["--vectors", vectors])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_backend_that_is_not_installed_says_what_to_install():
    done = without("jax", arguments=["--backends", "jax"])
    assert done.returncode == 2
    assert "`--backends` must name backends that are installed, got 'jax' (no jax)" in done.stderr
    assert "pip install 'eggroll-xp[jax]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "tensorflow"], "`--backends` must name backends of numpy, torch, jax, got 'tensorflow'"),
        (["--backends", "torch,"], "`--backends` must name backends of numpy, torch, jax, got ''"),
        (["--backends", "torch-tpu"], "`--backends` must name devices of this machine (torch-cpu"),
        (["--vectors", "/nowhere"], "`--vectors` must be a directory of recorded vectors, got /nowhere"),
        (["--reference", "/nowhere"], "`--reference` must be a HyperscaleES checkout, got /nowhere"),
        (["--write-vectors", "/dev/null"], "directory that can be written, got /dev/null: File exists"),
        (["--write-vectors", "there", "--json", "t.json"], "compares nothing: it must be without `--json`"),
        (["--write-vectors", "there", "--vectors", "/nowhere"], "compares nothing: it must be without `--vectors`"),
        (["--json", "/nowhere/table.json"], "`--json` must be a file that can be written, got /nowhere/table.json"),
    ],
)
def test_a_bad_argument_is_named(arguments, message, capsys):
    pytest.importorskip("torch")
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--seed", "many"], ["--seed", str(2**64)]])
def test_a_bad_seed_is_named(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"--seed: must be an int in [0, 2**64), got {arguments[1]!r}" in capsys.readouterr().err


def test_an_interruption_is_one_line_and_leaves_no_file(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("eggroll.parity.cli.compare_backends", interrupt)
    assert main(["--backends", "numpy", "--json", str(tmp_path / "table.json")]) == 130
    assert capsys.readouterr() == ("", "eggroll-parity: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_only_that_fits_nothing_is_not_green(capsys):
    assert main(["--backends", "numpy", "--only", "bit"]) == 1
    assert "no quantity could be compared whose name begins with 'bit'" in capsys.readouterr().out


def test_another_seed_is_another_comparison(tmp_path):
    pytest.importorskip("torch")
    tables = []
    for seed in ("3", "3", "4"):
        arguments = ["--quick", "--backends", "torch", "--only", "normals float32", "--seed", seed]
        assert main([*arguments, "--json", str(tmp_path / "table.json")]) == 0
        tables.append(json.loads((tmp_path / "table.json").read_text())["rows"])
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]
