"""Write the parameters cells of the training notebooks, as the systems' options are now: `python .ci/parameters.py`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nbformat  # noqa: E402

from freqseg.systems.segmenter import known_systems  # noqa: E402
from freqseg.work.experiments import parameters_cell  # noqa: E402

EXAMPLE = "weclip"  # what the notebook for any system trains as it stands


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
    cells = {"system": parameters_cell(EXAMPLE, general=True), **{system: parameters_cell(system) for system in known_systems()}}
    for name, source in cells.items():
        path = ROOT / "nbs" / "train" / f"{name}.ipynb"
        if path.exists() and update(path, source):
            print(f"written: {path.relative_to(ROOT)}")
