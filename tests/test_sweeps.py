"""freqseg.work.sweeps: many runs, interrupted and gone on with."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_sweeps import DFA, ROOT, executions, pretended, swept, toy  # noqa: F401 (fixtures)

from freqseg.faces.sweep_plots import save_sweep_plot, sweep_plot
from freqseg.files import InputError, locked
from freqseg.work.sweep_design import (
    new_design,
)
from freqseg.work.sweep_statistics import read_sweep
from freqseg.work.sweeps import sweep


def leftovers(folder: Path) -> list[str]:
    "Files that a writer had not finished."
    return [str(path) for path in folder.rglob("*") if path.name.endswith((".part", ".partial")) or re.match(r"\..+-\w{8}", path.name)]


@pytest.mark.parametrize(("grid", "seeds", "parameters", "message"), [
    ({"aa": [1.0]}, 1, {}, "no parameter 'aa'. Did you mean 'a'"),
    ({"a": [1.0]}, 1, {"bb": "y"}, "no parameter 'bb'. Did you mean 'b'"),
    ({"a": ["low"]}, 1, {}, "parameter a is float .*, not str 'low'"),
    ({"a": []}, 1, {}, "grid a has no value"),
    ({"a": [1, 2, 1.0]}, 1, {}, "grid a has the value 1.0 twice"),
    ({"b": "xyz"}, 1, {}, "grid b: give a list of values, not 'xyz'"),
    ({"a": 3}, 1, {}, "grid a: give a list of values, not 3"),
    ({"a": [math.nan]}, 1, {}, "a=nan: give finite numbers"),
    ({"anything": [object()]}, 1, {}, "anything=<object"),
    ({"seed": [1]}, 1, {}, "seed cannot be a parameter of the grid: .*with seeds"),
    ({"out": ["o"]}, 1, {}, "out cannot be a parameter of the grid"),
    ({"preset": ["smoke"]}, 1, {}, "preset cannot be a parameter of the grid: figures on different pictures"),
    ({"a,b": [1, 2]}, 1, {}, "grid a,b: give 2 values for these 2 parameters, not 1"),
    ({"a,b": [[1, "x", 2]]}, 1, {}, r"grid a,b: give 2 values for these 2 parameters, not \[1, 'x', 2\]"),
    ({"a,b": [[1, "x"]], "a": [2]}, 1, {}, "the grid names a twice"),
    ({"b,seed": [["x", 1]]}, 1, {}, "seed cannot be a parameter of the grid"),
    ({"a,b": [[1, "x"]]}, 1, {"b": "y"}, "b is in the grid, so it cannot be fixed"),
    ({"a": [1]}, 1, {"seed": 1}, "seed cannot be fixed: .*with seeds"),
    ({"a": [1]}, 1, {"out": "o"}, "out cannot be fixed"),
    ({"a": [1]}, 1, {"a": 2}, "a is in the grid, so it cannot be fixed"),
    ({"a": [1]}, 0, {}, "seeds has no value"),
    ({"a": [1]}, [], {}, "seeds has no value"),
    ({"a": [1]}, [1, 1], {}, "seeds has the value 1 twice"),
    ({"a": [1]}, [-1], {}, "seed -1: give whole numbers"),
    ({"a": [1]}, [0.5], {}, "seed 0.5: give whole numbers"),
    ({"a": [1]}, True, {}, "seeds=True"),
    ({"a": [1]}, "3", {}, "seeds='3'"),
])
def test_what_cannot_be_meant_is_refused_and_nothing_is_made(toy: Path, tmp_path: Path, grid: dict, seeds: object, parameters: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sweep(toy, tmp_path / "out", grid, seeds, parameters)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("jobs", [0, -1, 1.5, True, "2"])
def test_jobs_is_a_number_of_processes(toy: Path, tmp_path: Path, jobs: object) -> None:
    with pytest.raises(InputError, match="jobs=.*: give a whole number"):
        sweep(toy, tmp_path / "out", {"a": [1]}, 1, jobs=jobs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("grid", "parameters", "message"), [
    ({"lambda_hi": [0.1]}, {}, "no parameter 'lambda_hi'. Did you mean 'lambda_h'"),
    ({"lr": [1e-3, -1.0]}, {}, "lr=-1.0: give"),
    ({"iterations": [2, 100]}, {}, "warmup=2 leaves nothing of iterations=2"),
    ({"maps": ["transport", "transprot"]}, {}, "maps='transprot': did you mean 'transport'"),
    ({"mu": [0.2]}, {"preset": "voc"}, "preset voc needs the data"),
    ({"mu": [0.2]}, {"preset": "wrold"}, "wrold.*world"),
])
def test_a_training_notebook_is_asked_for_its_plan(tmp_path: Path, grid: dict, parameters: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sweep(DFA, tmp_path / "out", grid, 1, parameters)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_run_has_its_folder_record_and_share_of_the_machine(swept: tuple[Path, Path]) -> None:
    out, log = swept
    assert {line.split()[2] for line in log.read_text().splitlines()} == {"1"}
    for value in (1.0, 2.0):
        record = json.loads((out / f"a={value},seed=0" / "toy.ipynb").read_text())
        assert record["metadata"]["papermill"]["parameters"]["a"] == value
    assert {path.name for path in out.iterdir() if path.is_file()} == {".lock", "sweep.json", "sweep.md"}
    assert not leftovers(out)


@pytest.mark.slow
def test_failures_are_told_and_stop_nobody(swept: tuple[Path, Path]) -> None:
    result = read_sweep(swept[0])
    assert [len(row.seeds) for row in result.rows] == [1, 1, 0, 0, 0]
    assert set(result.failed) == {"a=12.0,seed=0", "a=13.0,seed=0", "a=9.0,seed=0"}
    assert "left no figures" in result.failed["a=12.0,seed=0"]
    assert "AssertionError: unlucky" in result.failed["a=13.0,seed=0"] and "toy.traceback.txt" in result.failed["a=13.0,seed=0"]
    assert "ended by signal 9" in result.failed["a=9.0,seed=0"] and "fewer jobs" in result.failed["a=9.0,seed=0"]
    text = (swept[0] / "sweep.md").read_text()
    assert "## Without figures: 3 of 5 runs" in text and "unlucky" in text and "| 13.0 | 0 | – |" in text


@pytest.mark.slow
def test_what_is_done_stays_done_and_the_rest_is_run(toy: Path, swept: tuple[Path, Path]) -> None:
    out, log = swept
    again = sweep(toy, out, {"a": [1.0, 2.0]}, 1, {"log": str(log)}, progress=False, command="first")
    before = executions(log)
    assert again.executed == () and before == [f"a={value},seed=0" for value in (1.0, 12.0, 13.0, 2.0, 9.0)]
    torn = out / "a=1.0,seed=0" / "metrics.json"
    torn.write_text(torn.read_text()[:40])
    (out / "a=2.0,seed=0" / "parameters.json").write_text(json.dumps({"a": 3.0}))
    more = sweep(toy, out, {"a": [2, 13, 1, 3.0]}, 1, {"log": str(log)}, jobs=2, progress=False, command="second")
    assert sorted(more.executed) == ["a=1.0,seed=0", "a=13.0,seed=0", "a=2.0,seed=0", "a=3.0,seed=0"]  # a failure is tried again
    assert executions(log) == sorted([*before, *more.executed])
    assert more.design.grid == {"a": [1.0, 2.0, 12.0, 13.0, 9.0, 3.0]} and more.design.commands == ("first", "second")
    assert [row.measures["seg"].value for row in more.rows if row.seeds] == pytest.approx([0.1, 0.2, 0.3])
    assert len(more.failed) == 3 and json.loads((out / "sweep.json").read_text()) == json.loads(json.dumps(more.as_dict()))


@pytest.mark.slow
def test_the_bar_names_failures_and_without_figures_there_is_no_picture(toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    result = sweep(toy, tmp_path / "out", {"a": [11.0]}, 1, {"log": str(tmp_path / "log")}, jobs=5)
    told = capfd.readouterr().err
    assert "sweep of toy" in told and "1/1" in told and "a=11.0,seed=0: the notebook ran to its end, but left no figures" in told
    assert save_sweep_plot(result) is None and "No run has finished yet" in (tmp_path / "out" / "sweep.md").read_text()
    with pytest.raises(InputError, match="nothing to draw"):
        sweep_plot(result)


def test_a_folder_in_use_and_another_sweep_are_refused(toy: Path, tmp_path: Path) -> None:
    pretended(tmp_path / "out", new_design(toy, {"a": [1]}, 1), lambda point, seed: 0.5)
    with locked(tmp_path / "out"), pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        sweep(toy, tmp_path / "out", {"a": [1]}, 1)
    with pytest.raises(InputError, match="b: not given there, 'y' now"):
        sweep(toy, tmp_path / "out", {"a": [1]}, 1, {"b": "y"})
    with pytest.raises(InputError, match="system: toy there, dfa now"):
        sweep(DFA, tmp_path / "out", {"mu": [0.1]}, 1)
    assert sweep(toy, tmp_path / "out", {"a": [1]}, 1, progress=False).executed == ()


def test_folders_that_differ_in_case_alone_are_refused(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="b=x,seed=0 and b=X,seed=0 would be one"):
        sweep(toy, tmp_path / "out", {"b": ["x", "X"]}, 1)


def alive(pid: int) -> bool:
    "Is the process there, and no zombie?"
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z" if Path("/proc").exists() else os.kill(pid, 0) is None
    except OSError:
        return False


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    "Wait for a condition."
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_leaves_nobody_behind_and_goes_on(toy: Path, tmp_path: Path, number: int) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    program = f"from freqseg.work.sweeps import sweep; sweep({str(toy)!r}, {str(out)!r}, {{'a': [1.0, 2.0]}}, 2, {{'log': {str(log)!r}, 'nap': 6.0}}, jobs=2)"
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert until(lambda: len(executions(log)) == 2), parent.stderr.read() if parent.poll() is not None else "the runs do not begin"
    kernels = [int(line.split()[0]) for line in log.read_text().splitlines()]
    parent.send_signal(number)
    told = parent.communicate(timeout=60)[1]
    assert parent.returncode != 0 and ("KeyboardInterrupt" in told) == (number == signal.SIGINT)
    assert until(lambda: not any(map(alive, kernels)), 30)
    assert until(lambda: not leftovers(out), 5)
    assert read_sweep(out).missing == {"a=1.0,seed=0": "begun, not finished", "a=2.0,seed=0": "begun, not finished",
                                       "a=1.0,seed=1": "not run yet", "a=2.0,seed=1": "not run yet"}
    result = sweep(toy, out, {"a": [1.0, 2.0]}, 1, {"log": str(log), "nap": 6.0}, jobs=2, progress=False)
    assert len(result.executed) == 2 and len(result.missing) == 2 and not result.failed


@pytest.mark.slow
def test_two_trainings_share_the_world_and_one_table(tmp_path: Path) -> None:
    notebook, out = ROOT / "nbs" / "train" / "weclip.ipynb", tmp_path / "out"
    result = sweep(notebook, out, {"lr": [1e-3, 1e-4]}, 1, {"iterations": 4}, jobs=2, progress=False)
    assert result.failed == {} and "drawn by a program" in result.caveat and result.design.system == "weclip"
    assert result.data == ("the embedded world, folder world, split test, 8 pictures",)
    assert set(result.measures) >= {"seg", "mask", "seed", "boundary"}
    assert [path.name for path in out.rglob("ImageSets")] == ["ImageSets"]
    metrics = json.loads((out / "lr=0.0001,seed=0" / "metrics.json").read_text())
    assert metrics["settings"]["lr"] == 1e-4 and metrics["settings"]["seed"] == 0
    assert result.rows[1].measures["seg"].value == metrics["report"]["figures"]["seg"]["miou"]["value"]
    assert "The pictures are drawn by a program" in result.markdown() and "fixed: preset=smoke, iterations=4" in result.markdown()
    # Killed after its training: the next call goes on from the checkpoint, which was the last step, and only evaluates.
    (out / "lr=0.0001,seed=0" / "parameters.json").unlink()
    last = (out / "lr=0.0001,seed=0" / "last.safetensors")
    before = last.stat().st_mtime_ns
    again = sweep(notebook, out, {"lr": [1e-3, 1e-4]}, 1, {"iterations": 4}, progress=False)
    assert again.executed == ("lr=0.0001,seed=0",) and last.stat().st_mtime_ns == before
    assert again.rows == result.rows
