"""Runs the notebooks and keeps their outputs, small: ``python -m tools.notebooks [NAME ...]``.

Pictures are reduced to 64 colours, and progress bars on stderr are dropped, so that a notebook on a website shows what it does
and the repository stays light. ``tests/test_notebooks.py`` runs them again and compares what they print.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def executed(path: Path) -> Any:
    """The notebook with the outputs of a run from top to bottom, offline and on one core."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": path.parent}}
    return NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()


def shrink(notebook: Any) -> None:
    """Drop what nobody reads in a notebook's outputs, and reduce its pictures."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            data = output.get("data", {})
            # Both are the same picture.
            data.pop("image/jpeg", None)
            if "image/png" in data:
                data["image/png"] = _reduced(data["image/png"])


def _reduced(picture: str) -> str:
    kept = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(picture))) as opened:
        opened.convert("RGB").quantize(64).save(kept, "PNG", optimize=True)
    return base64.b64encode(kept.getvalue()).decode()


def main(names: list[str]) -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            notebook = executed(path)
            shrink(notebook)
            nbformat.write(notebook, path)
            print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1:])
