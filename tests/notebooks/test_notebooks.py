"""Every notebook runs from top to bottom, and opens in Colab."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CORE_SECONDS = 2 * 120  # two minutes on two CPU cores; processor time, so that a busy machine does not count


def environment() -> dict[str, str]:
    """What a kernel of a user's sees: one CPU device, pictures in the notebook, and this checkout importable."""
    without = ("MPLBACKEND", "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    ours = {name: value for name, value in os.environ.items() if name not in without}
    return {**ours, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), ours.get("PYTHONPATH"))))}


def pictures(cells) -> int:
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))


def children_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    before = children_seconds()
    client.execute(env=environment())  # raises the error of a cell that fails
    assert children_seconds() - before < CORE_SECONDS
    assert pictures(notebook.cells) == pictures(nbformat.read(path, as_version=4).cells), "commit it executed"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_executed(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    assert pictures(code[-1:]) == 1, "it ends in a plot"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_opens_in_colab_and_installs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown"
    assert f"colab.research.google.com/github/attnzoo/attnzoo/blob/main/notebooks/{path.name}" in cells[0].source
    first_code = next(cell for cell in cells if cell.cell_type == "code").source
    assert "pip install" in first_code
    assert 'find_spec("attnzoo") is None' in first_code, "nothing is installed over what is there"
