"""The README's Python blocks run, in order, and do what the text around them says."""

import re
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

README = Path(__file__).parents[1] / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="the README is not part of the wheel")


def python_blocks():
    text = README.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        # Empty lines in front, so that a traceback gives the line of the README.
        yield "\n" * (text[: match.start()].count("\n") + 1) + match[1]


@pytest.fixture
def one_thread():
    """The blocks are small: two threads that wait for each other on a busy machine take many times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_python_blocks_run(capsys):
    blocks = list(python_blocks())
    assert len(blocks) == 5
    names = {}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for block in blocks:
            exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    one_by_one, best = re.search(r"accuracy ([\d.]+), of the best member seen ([\d.]+)", printed).groups()
    at_once = re.search(r"accuracy ([\d.]+), mean of the last members", printed)[1]
    assert float(one_by_one) > 0.75
    assert float(best) > 0.75
    assert float(re.search(r"loss ([\d.]+)", printed)[1]) < 0.05
    assert float(at_once) > 0.95
    assert names["metrics"]["generation"] == 101
    assert names["trainer"].generation == 5


def test_every_argument_is_in_the_table():
    import inspect

    from eggroll.torch import EGGROLLTrainer

    text = README.read_text(encoding="utf-8")
    table = text[text.index("## EGGROLLTrainer's arguments") : text.index("## Your own evolution strategy")]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    documented = {name: row[2].strip() for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    parameters = inspect.signature(EGGROLLTrainer).parameters
    assert set(documented) == set(parameters)
    for name, default in documented.items():
        value = parameters[name].default
        if isinstance(value, bool | int | float) or (isinstance(value, str) and default.startswith("`")):
            assert default.strip("`").strip('"') == str(value), name


def test_the_licence_is_where_it_says():
    assert (README.parent / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
