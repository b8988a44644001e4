"""A notebook and a folder of a sweep, for tests."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import nbformat
import pytest

from freqseg.work.sweep_design import (
    Design,
)
from freqseg.work.sweeps import sweep

ROOT = Path(__file__).resolve().parent.parent
DFA = ROOT / "nbs" / "train" / "dfa.ipynb"
PARAMETERS = """
a = 1.0     # what is swept
b = "x"     # a word
anything = None
seed = 0
out = "."
log = ""    # a line is added to this file by every execution
nap = 0.0   # seconds
"""
BODY = """
import json, os, pathlib, signal, time
with open(log, "a") as file: print(os.getpid(), pathlib.Path(out).name, os.environ["OMP_NUM_THREADS"], file=file)
time.sleep(nap)
assert a != 13, "unlucky"
if a == 9: os.kill(os.getppid(), signal.SIGKILL)
figures = {"seg": {"miou": {"value": a / 10 + seed / 100}, "boundary": {"value": 0.1}}, "seed": {"miou": {"value": None}}}
report = dict(figures=figures, dataset="toys", split="test", images=3, world=False)
text = json.dumps(dict(report=report))
if a != 11: pathlib.Path(out, "metrics.json").write_text(text[:30] if a == 12 else text)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A notebook that does what a training notebook does, in no time."
    path = tmp_path_factory.mktemp("toy") / "toy.ipynb"
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(BODY)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def executions(log: Path) -> list[str]:
    "Names of the runs that were executed, in any order."
    return sorted(line.split()[1] for line in log.read_text().splitlines()) if log.exists() else []


def pretended(out: Path, design: Design, value: Callable[[dict, int], float | None], world: bool = False, dataset: str = "toys") -> None:
    "A sweep's folder as runs would leave it; a run without value was never begun."
    out.mkdir()
    (out / "sweep.json").write_text(json.dumps({"design": asdict(design)}))
    for run in design.runs:
        if (miou := value(run.point, run.seed)) is None:
            continue
        figures = {name: {"miou": {"value": miou}, "boundary": {"value": miou / 2}} for name in ("seed", "mask", "seg")}
        report = dict(figures=figures, dataset=dataset, split="test", images=1200, world=world)
        (out / run.name).mkdir()
        (out / run.name / "metrics.json").write_text(json.dumps({"report": report}))
        (out / run.name / "parameters.json").write_text(json.dumps(design.parameters(run)))


@pytest.fixture(scope="module")
def swept(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    "A folder with a sweep of two values and three failures, and the log of executions."
    folder = tmp_path_factory.mktemp("swept")
    sweep(toy, folder / "out", {"a": [1.0, 2.0, 12.0, 13.0, 9.0]}, 1, {"log": str(folder / "log")}, jobs=2, progress=False, command="first")
    yield folder / "out", folder / "log"
