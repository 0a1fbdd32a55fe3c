"""Live comparison with a checkout: a stand-in of its shape, right and with a mistake in it."""

import json
import sys

import pytest
from parity.standin import write_checkout

from eggroll.parity.cli import main

pytestmark = pytest.mark.usefixtures("quick_compilation")


def compare(directory, tmp_path, *arguments):
    table = tmp_path / "table.json"
    status = main(["--reference", str(directory), "--quick", "--json", str(table), *arguments])
    return status, json.loads(table.read_text())["rows"]


def test_a_checkout_is_compared_without_its_own_init_and_in_silence(tmp_path, capfd):
    pytest.importorskip("torch")
    checkout = write_checkout(tmp_path / "checkout")
    only = "eggroll 0,eggrollbs 0,sparse 0: run"
    status, rows = compare(checkout, tmp_path, "--backends", "numpy,torch-cpu", "--only", only)
    out, err = capfd.readouterr()
    assert status == 0, out
    assert err == ""
    assert "loading" not in out
    assert "a product" not in out
    assert not [name for name in sys.modules if name.startswith("hyperscalees")]
    compared = {row["quantity"] for row in rows if row["verdict"] == "pass" and row["backend"] == "torch-cpu"}
    for noiser in ("eggroll", "eggrollbs"):
        lines = ("perturbation", "keys", "shaped", "outputs, generation 1", "params1", "params5")
        assert {f"{noiser} 0: {line}" for line in lines} <= compared
    assert [row["note"] for row in rows if row["quantity"] == "sparse 0: run"] == [
        "the 'sparse' noiser needs eggroll.jax.hyperscale"
    ] * 2


@pytest.mark.slow
def test_other_noisers_are_replayed_on_jax(tmp_path):
    checkout = write_checkout(tmp_path / "checkout")
    only = "sparse 0,noop 0: perturbation"
    status, rows = compare(checkout, tmp_path, "--backends", "jax-cpu", "--only", only)
    assert status == 0
    assert all(row["verdict"] == "pass" for row in rows)
    assert {row["quantity"] for row in rows} >= {"sparse 0: params5", "noop 0: perturbation"}


def test_a_mistake_in_the_noise_is_found(tmp_path):
    checkout = write_checkout(tmp_path / "checkout", square_root="float")
    status, rows = compare(checkout, tmp_path, "--backends", "numpy", "--only", "eggroll 0")
    verdicts = {row["quantity"]: row["verdict"] for row in rows}
    assert status == 1
    assert verdicts["eggroll 0: perturbation"] == verdicts["eggroll 0: params1"] == "FAIL"
    assert verdicts["eggroll 0: keys"] == verdicts["eggroll 0: shaped"] == "pass"


def test_a_checkout_that_cannot_be_imported_says_why(tmp_path, capsys):
    checkout = write_checkout(tmp_path / "checkout")
    (checkout / "src" / "hyperscalees" / "noiser" / "sparse.py").write_text("import gymnax_of_old\n")
    assert main(["--reference", str(checkout), "--backends", "numpy"]) == 2
    assert "cannot be imported: ModuleNotFoundError: No module named 'gymnax_of_old'" in capsys.readouterr().err
    assert not [name for name in sys.modules if name.startswith("hyperscalees")]


def test_a_directory_that_is_no_checkout_says_so(tmp_path, capsys):
    assert main(["--reference", str(tmp_path), "--backends", "numpy"]) == 2
    assert f"`--reference` must be a HyperscaleES checkout, got {tmp_path}" in capsys.readouterr().err
