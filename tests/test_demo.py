"""`make demo`, on a budget of a few generations."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

DEMO = Path(__file__).parents[1] / "examples" / "digits.py"

pytestmark = pytest.mark.skipif(not DEMO.exists(), reason="the examples are not part of the wheel")


def start(*arguments):
    command = [sys.executable, str(DEMO), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=os.name == "posix"
    )


@pytest.fixture(scope="module")
def digits():
    """The demo as a module."""
    spec = importlib.util.spec_from_file_location("digits", DEMO)
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["digits"]


def size_of_png(path):
    from matplotlib import image

    height, width = image.imread(path).shape[:2]
    return width, height


def ends(group):
    """Whether the last process of the group ends within a minute."""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_demo_prints_a_table_and_draws_the_curves(tmp_path):
    picture = tmp_path / "folder" / "curves.png"
    process = start("--generations", 6, "--population", 8, "--seed", 3, "--out", picture)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    for method, evaluations in {"EGGROLL": 48, "full-rank ES": 48, "Adam on gradients": 6}.items():
        row = re.search(rf"^{method} +([\d.]+) % +[\d.]+ +{evaluations} +[\d.]+ MiB$", out, re.MULTILINE)
        assert row, out
        assert 0 <= float(row[1]) <= 100
    assert str(picture) in out
    assert err.count("test accuracy") >= 3  # the progress bars
    assert "Warning" not in err
    width, height = size_of_png(picture)
    assert 1000 < width < 4000
    assert 400 < height < 2000
    assert 10_000 < picture.stat().st_size < 1_000_000


def test_several_seeds_are_averaged(digits, tmp_path):
    results = [
        digits.Result(digits.Job(method, seed, 10, 8), [0, 10], [0.0, 1.0 + seed], [10.0, 90.0 + seed], 80, 2**20)
        for seed in (0, 1, 4)
        for method in ("eggroll", "gradient")
    ]
    table = digits.table(results)
    assert "90.00, 91.00, 94.00 % for seeds 0, 1, 4" in table
    assert re.search(r"^EGGROLL +91\.67 % +2\.7 +80 +1\.0 MiB$", table, re.MULTILINE), table
    assert "full-rank ES" not in table
    digits.plot(results, tmp_path / "curves.png")
    assert size_of_png(tmp_path / "curves.png")[0] > 1000


def test_the_split_never_changes_and_its_parts_are_disjoint(digits):
    train_x, test_x, train_y, test_y = digits.load_data()
    assert (len(train_x), len(test_x), len(train_y), len(test_y)) == (1437, 360, 1437, 360)
    assert test_y[:8].tolist() == digits.load_data()[3][:8].tolist()
    both = {image.tobytes() for image in train_x} & {image.tobytes() for image in test_x}
    assert not both


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--population", "7"], "argument --population: must be an even number of at least 2, got 7"),
        (["--generations", "0"], "argument --generations: must be a whole number of at least 1, got 0"),
        (["--seeds", "x"], "argument --seeds: must be a whole number, got 'x'"),
        (["--out", "curves.txt"], "argument --out: must be a file name that ends in .png, got 'curves.txt'"),
        (["--methods", "sgd"], "argument --methods: invalid choice: 'sgd'"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message, digits, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["digits.py", *arguments])
    with pytest.raises(SystemExit) as error:
        digits.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_argument_ends_the_command_with_2():
    process = start("--generatoins", 1)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "unrecognized arguments: --generatoins 1" in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.skipif(os.name != "posix", reason="SIGINT")
def test_ctrl_c_ends_it_cleanly(tmp_path):
    process = start("--generations", 100_000, "--population", 64, "--out", tmp_path / "curves.png")
    seen = b""
    while b"/100000" not in seen:  # the first progress bar is there
        seen += (piece := os.read(process.stderr.fileno(), 4096))
        assert piece, seen
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to every process of the group
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Interrupted." in err
    assert "Traceback" not in seen.decode() + err
    assert "leaked" not in err
    assert out == ""
    assert ends(process.pid), "a training process goes on"
