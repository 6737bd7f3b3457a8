"""Every notebook runs from top to bottom on the small model, prints what it is kept with, and calls the library."""

import sys

import nbformat
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from tools import notebooks

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHIPPED = ROOT / "data" / "tiny-llava" / "model.safetensors"
#: What a notebook may define: a method is what that notebook is about.
DEFINES = {"write_your_own_method": 1}


def printed(notebook):
    """What each code cell prints, but for cells whose tag says that they print times."""
    return [
        "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code" and "times" not in cell.metadata.get("tags", [])
    ]


@pytest.mark.full
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_is_kept_with(path):
    if not SHIPPED.exists():
        pytest.skip("the small model's weights are not in data/tiny-llava; run python -m tools.small_models tiny-llava")
    assert printed(notebooks.executed(path)) == printed(nbformat.read(path, as_version=4)), (
        f"run: python -m tools.notebooks {path.stem}"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_defines_nothing_and_is_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    lines = [line.lstrip() for cell in notebook.cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    assert sum(line.startswith("class ") for line in lines) == DEFINES.get(path.stem, 0)
    if path.stem not in DEFINES:
        assert not any(line.startswith(("def ", "async def ")) for line in lines)
    assert path.stat().st_size < 100_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in code), "kept without outputs"
    assert not [cell for cell in code if any(output.output_type == "error" for output in cell.outputs)]
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
