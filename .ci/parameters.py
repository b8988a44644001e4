"""Write the parameters cell of every system's training notebook, as the systems' options are now: `python .ci/parameters.py`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nbformat  # noqa: E402

from freqseg.work.checkpoints import SYSTEMS  # noqa: E402
from freqseg.work.experiments import parameters_cell  # noqa: E402


def update(path: Path, source: str) -> bool:
    "Give the cell tagged `parameters` this source. Was there another?"
    notebook = nbformat.read(path, as_version=4)
    cell, = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    if cell.source == source:
        return False
    cell.source = source
    nbformat.write(notebook, path)
    return True


if __name__ == "__main__":
    for system in SYSTEMS:
        path = ROOT / "nbs" / "train" / f"{system}.ipynb"
        if update(path, parameters_cell(system)):
            print(f"written: {path.relative_to(ROOT)}")
