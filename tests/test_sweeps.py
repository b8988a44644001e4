"""Sweeps: what is compared is checked first, runs mind their own business, what is done stays done, and the means are right."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import nbformat
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from freqseg.faces.sweep_plots import save_sweep_plot, sweep_plot
from freqseg.files import InputError
from freqseg.work.sweep_design import (Design, checked_grid, checked_seeds, extended, finished, new_design,
                                       read_design, run_name, run_plans, trained_system)
from freqseg.work.sweep_processes import environments
from freqseg.work.sweep_statistics import comparison_markdown, estimate, in_percent, paired_difference, read_sweep
from freqseg.work.sweeps import sweep
from freqseg.files import locked
from freqseg.systems.segmenter import known_systems

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


def leftovers(folder: Path) -> list[str]:
    "Files that a writer had not finished."
    return [str(path) for path in folder.rglob("*") if path.name.endswith((".part", ".partial")) or re.match(r"\..+-\w{8}", path.name)]


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


# ---- means and intervals --------------------------------------------------------------------------------------------

VALUES = st.lists(st.floats(0, 1), min_size=2, max_size=8).filter(lambda values: np.std(values) > 1e-6)


@given(VALUES)
def test_a_mean_has_students_interval(values: list[float]) -> None:
    found = estimate(dict(enumerate(values)))
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high), rel=1e-6, abs=1e-9)
    assert found.n == len(values)


def test_three_seeds_by_hand() -> None:
    found = estimate({0: 0.40, 1: 0.44, 2: 0.48})  # mean 0.44, s 0.04, t(0.975, 2) = 4.302653
    assert found.high - found.value == pytest.approx(4.302653 * 0.04 / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize(("values", "value"), [({}, math.nan), ({3: 0.5}, 0.5)])
def test_fewer_than_two_seeds_have_no_interval(values: dict, value: float) -> None:
    found = estimate(values)
    assert found.value == pytest.approx(value, nan_ok=True) and math.isnan(found.low) and math.isnan(found.high)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8).filter(lambda pairs: np.std([a - b for a, b in pairs]) > 1e-6))
def test_differences_are_paired_by_seed(pairs: list[tuple[float, float]]) -> None:
    first, other = (dict(enumerate(pair[side] for pair in pairs)) for side in (0, 1))
    shuffled = dict(reversed(other.items())) | {99: 0.3}  # the order does not matter, and a seed that one lacks does not count
    found = paired_difference(shuffled, first)
    wanted = scipy.stats.ttest_rel(list(other.values()), list(first.values())).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-6, abs=1e-9)
    assert found.n == len(pairs)


# ---- names ----------------------------------------------------------------------------------------------------------

PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=200),
                  st.lists(st.floats(0, 9), max_size=30))


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(["mu", "model", "scales", "größe"]), PLAIN))
def test_a_folder_name_suits_every_file_system(values: dict) -> None:
    name = run_name({**values, "seed": 0})
    assert re.fullmatch(r"[A-Za-z0-9_.+=,-]{1,200}", name) and not name.startswith((".", "-"))


@given(st.lists(PLAIN, unique_by=json.dumps, min_size=2, max_size=2))
def test_other_values_have_other_names(values: list) -> None:
    one, other = values
    if one == other:  # 1 and 1.0, 0 and false: the same to the grid or no pair at all
        return
    assert run_name({"p": one, "seed": 0}) != run_name({"p": other, "seed": 0})


@pytest.mark.parametrize(("values", "name"), [({"mu": 0.2, "seed": 1}, "mu=0.2,seed=1"), ({"decoder": "wavelet", "seed": 0}, "decoder=wavelet,seed=0"),
                                              ({"crf": None, "flip": True, "lr": 1e-5, "seed": 3}, "crf=None,flip=True,lr=1e-05,seed=3")])
def test_plain_values_are_readable(values: dict, name: str) -> None:
    assert run_name(values) == name


def test_commas_in_a_word_make_no_second_parameter() -> None:
    assert run_name({"a": "1,b=2", "b": "3"}) != run_name({"a": "1", "b": "2,b=3"})


# ---- what is refused before anything runs ---------------------------------------------------------------------------

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


def test_a_notebook_without_seed_or_out_cannot_be_swept(tmp_path: Path) -> None:
    cell = nbformat.v4.new_code_cell("a = 1\nout = ''", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), tmp_path / "n.ipynb")
    with pytest.raises(InputError, match="no parameter 'seed': a sweep gives every run a seed"):
        new_design(tmp_path / "n.ipynb", {"a": [1]}, 1)


@pytest.mark.parametrize("name", known_systems())
def test_the_system_of_every_training_notebook_is_found(name: str) -> None:
    assert trained_system(ROOT / "nbs" / "train" / f"{name}.ipynb") == name
    design = new_design(ROOT / "nbs" / "train" / f"{name}.ipynb", {"lr": [1e-3, 1e-4]}, 2, {"preset": "world"})
    assert [plan.chosen.settings.seed for plan in run_plans(design)] == [0, 0, 1, 1]


def test_the_preset_that_nobody_named_is_written_down() -> None:
    assert new_design(DFA, {"lr": [1e-3]}, 1).fixed == {"preset": "smoke"}


# ---- designs --------------------------------------------------------------------------------------------------------

def test_numbers_of_numpy_and_paths_become_plain() -> None:
    grid = checked_grid({"mu": np.array([0.1, 0.2]), "n": (np.int64(3),), "s": [(1.0, 2.0)], "p": [Path("x")]})
    assert json.loads(json.dumps(grid)) == grid == {"mu": [0.1, 0.2], "n": [3], "s": [[1.0, 2.0]], "p": ["x"]}
    assert checked_seeds(np.int64(2)) == [0, 1] and checked_seeds(np.array([4, 2])) == [4, 2]


def test_one_and_true_and_the_word_are_three_values() -> None:
    assert checked_grid({"a": [1, True, "1", None]}) == {"a": [1, True, "1", None]}


def test_all_values_come_before_the_next_seed(toy: Path) -> None:
    names = [run.name for run in new_design(toy, {"a": [1, 2], "b": ["x"]}, 2).runs]
    assert names == ["a=1,b=x,seed=0", "a=2,b=x,seed=0", "a=1,b=x,seed=1", "a=2,b=x,seed=1"]


def test_a_parameter_given_as_none_is_as_good_as_not_given(toy: Path) -> None:
    assert new_design(toy, {"a": [1]}, 1, {"anything": None}) == new_design(toy, {"a": [1]}, 1)


def test_more_seeds_and_values_extend_a_design_in_the_order_they_came(toy: Path) -> None:
    there, now = new_design(toy, {"a": [3, 1], "b": ["x"]}, 1), new_design(toy, {"b": ["x", "y"], "a": [1.0, 2]}, [5, 0])
    both = extended(there, now, "out")
    assert list(both.grid.items()) == [("a", [3, 1, 2]), ("b", ["x", "y"])] and both.seeds == [0, 5]


@pytest.mark.parametrize(("change", "message"), [
    (dict(system="other"), "system: toy there, other now"),
    (dict(fixed={"b": "z", "nap": 1.0}), "b: 'y' there, 'z' now"),
    (dict(fixed={"b": "y"}), "nap: 1.0 there, not given now"),
    (dict(fixed={"b": "y", "nap": 1.0, "anything": 3}), "anything: not given there, 3 now"),
    (dict(grid={"a": [1], "anything": [2]}), "grid: a there, a, anything now"),
])
def test_another_sweep_is_refused_with_what_differs(change: dict, message: str) -> None:
    there = Design("toy", {"a": [1]}, [0], {"b": "y", "nap": 1.0})
    with pytest.raises(InputError, match=f"out holds another sweep:\n  {re.escape(message)}\nChoose another out folder"):
        extended(there, Design(**{**asdict(there), **change}), "out")


def test_a_damaged_design_is_named_and_no_design_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no sweep"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text('{"design": {"system"')
    with pytest.raises(InputError, match="sweep.json is damaged. Remove it"):
        read_design(tmp_path)


# ---- running --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def swept(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    "A folder with a sweep of two values and three failures, and the log of executions."
    folder = tmp_path_factory.mktemp("swept")
    sweep(toy, folder / "out", {"a": [1.0, 2.0, 12.0, 13.0, 9.0]}, 1, {"log": str(folder / "log")}, jobs=2, progress=False, command="first")
    yield folder / "out", folder / "log"


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


# ---- the machine ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("cores", "jobs", "given", "threads"), [(8, 2, None, "4"), (8, 3, None, "2"), (2, 4, None, "1"), (8, 2, "1", "1"), (8, 4, "6", "2")])
def test_the_cores_are_dealt_out(monkeypatch: pytest.MonkeyPatch, cores: int, jobs: int, given: str | None, threads: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS") if given is None else monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environments(jobs) == [{"OMP_NUM_THREADS": threads}] * jobs


@pytest.mark.parametrize(("visible", "wanted"), [("0,1", ["0", "1", "0"]), ("3, 5", ["3", "5", "3"]), ("0", [None] * 3), ("", [None] * 3)])
def test_several_gpus_go_round(monkeypatch: pytest.MonkeyPatch, visible: str, wanted: list) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [place.get("CUDA_VISIBLE_DEVICES") for place in environments(3)] == wanted


# ---- tables and pictures --------------------------------------------------------------------------------------------

def test_the_table_shows_means_intervals_differences_and_what_is_missing(tmp_path: Path) -> None:
    design = Design("dfa", {"mu": [0.1, 0.2, 0.3]}, [0, 1, 2], {"preset": "world"}, ("freqseg sweep dfa",))
    values = {0.1: [0.40, 0.44, 0.48], 0.2: [0.42, None, 0.51], 0.3: [None, 0.5, None]}
    pretended(tmp_path / "s", design, lambda point, seed: values[point["mu"]][seed], world=True, dataset="the embedded world, folder world")
    result = read_sweep(tmp_path / "s")
    text = result.markdown()
    low, high = scipy.stats.t.interval(0.95, 1, 2.5, scipy.stats.sem([2, 3]))
    assert "| 0.1 | 3 | 44.0 [34.1, 53.9] |" in text
    assert text.count(f"| +2.5 [{low:+.1f}, {high:+.1f}] |") == 1 and "| 0.3 | 1 | 50.0 | 50.0 | 50.0 | 25.0 | +6.0 |" in text
    for told in ("Measured on the embedded world, folder world, split test, 1,200 pictures.", "**The pictures are drawn by a program", "say nothing about photographs",
                 "seeds: 0, 1, 2", "`freqseg sweep dfa`", "preset=world", "3 of 9 runs", "- mu=0.2,seed=1: not run yet"):
        assert told in text
    assert result.rows[1].gain.values == pytest.approx({0: 0.02, 2: 0.03}) and result.failed == {}


def test_a_measure_that_some_seeds_lack_tells_how_many_it_has(tmp_path: Path) -> None:
    design = Design("toy", {"a": [1]}, [0, 1, 2], {})
    pretended(tmp_path / "s", design, lambda point, seed: 0.5 if seed else math.nan)
    text = read_sweep(tmp_path / "s").markdown()
    assert "| 1 | 3 | 50.0 [50.0, 50.0] (2 seeds) |" in text and "embedded world" not in text


def test_runs_that_disagree_on_the_data_are_no_comparison(tmp_path: Path) -> None:
    design = Design("toy", {"a": [1, 2]}, [0], {})
    pretended(tmp_path / "s", design, lambda point, seed: 0.5)
    path = tmp_path / "s" / "a=2,seed=0" / "metrics.json"
    path.write_text(path.read_text().replace("1200", "7"))
    text = read_sweep(tmp_path / "s").markdown()
    assert "1,200 pictures; and toys, split test, 7 pictures" in text and "no comparison" in text


def test_parameters_that_change_together_are_rows_of_one_axis(toy: Path, tmp_path: Path) -> None:
    grid = {"a, b": [[1, "x"], [2, "y"], [1, "y"]], "nap": [0.0]}
    now = new_design(toy, grid, [0, 1])
    assert now.points == [{"a": 1, "b": "x", "nap": 0.0}, {"a": 2, "b": "y", "nap": 0.0}, {"a": 1, "b": "y", "nap": 0.0}]
    pretended(tmp_path / "s", now, lambda point, seed: point["a"] / 10 + seed / 100)
    text = read_sweep(tmp_path / "s").markdown()
    assert "| a | b | nap | seeds |" in text and "| 2 | y | 0.0 | 2 | 20.5 [14.1, 26.9] |" in text and "# Sweep of toy over a, b, nap" in text
    more = extended(now, new_design(toy, {**grid, "a, b": [[3, "y"], [2, "y"]]}, [0]), tmp_path)
    assert [point["a"] for point in more.points] == [1, 2, 1, 3]
    executed = sweep(toy, tmp_path / "s", {"a, b": [[2, "y"], [1, "x"]], "nap": [0.0]}, [0], {}, progress=False).executed
    assert executed == ()


def test_bands_are_told_in_the_record_and_not_in_the_table(tmp_path: Path) -> None:
    pretended(tmp_path / "s", Design("toy", {}, [0, 1], {}), lambda point, seed: 0.5 + seed / 10)
    for seed in (0, 1):
        path = tmp_path / "s" / f"seed={seed}" / "metrics.json"
        told = json.loads(path.read_text())
        told["report"]["figures"] |= {f"seg_{band}": {"miou": {"value": value + seed / 10}} for band, value in (("low", 0.3), ("high", 0.1))}
        path.write_text(json.dumps(told))
    result = read_sweep(tmp_path / "s")
    assert result.rows[0].measures["low"].value == pytest.approx(0.35) and result.rows[0].measures["high"].values == pytest.approx({0: 0.1, 1: 0.2})
    assert "band" not in result.markdown() and len(sweep_plot(result).axes[0].patches) == 3
    assert result.as_dict()["rows"][0]["measures"]["high"]["value"] == pytest.approx(0.15)


def test_a_record_tells_what_its_runs_told(tmp_path: Path) -> None:
    pretended(tmp_path / "s", Design("toy", {"a": [1, 2, 3]}, [0, 1], {"b": "x"}, ("freqseg sweep toy",)), lambda point, seed: 0.5 + seed / 10 if point["a"] != 3 else None, world=True)
    result = read_sweep(tmp_path / "s")
    result.save(tmp_path / "t")
    shutil.rmtree(tmp_path / "s")
    again = read_sweep(tmp_path / "t" / "sweep.json")
    assert again.markdown() == result.markdown() and again.as_dict() == result.as_dict() and again.missing.keys() == {"a=3,seed=0", "a=3,seed=1"}
    (tmp_path / "t" / "sweep.json").write_text("{}")
    with pytest.raises(InputError, match="no record of a sweep"):
        read_sweep(tmp_path / "t" / "sweep.json")


@pytest.mark.parametrize("content", ["", "[]", "null", '{"report": 3}', '{"report": {"figures": {}}}', '{"report"'])
def test_metrics_without_figures_are_not_done(tmp_path: Path, content: str) -> None:
    (tmp_path / "parameters.json").write_text("{}")
    (tmp_path / "metrics.json").write_text(content)
    assert finished(tmp_path, {}) is None


@pytest.mark.parametrize(("grid", "curved", "scale"), [
    ({"mu": [0.3, 0.1, 0.2]}, True, "linear"), ({"lr": [1e-4, 1e-2]}, True, "log"), ({"mu": [0.1, 0.2], "b": ["x"]}, True, "linear"),
    ({"b": ["x", "y"]}, False, "linear"), ({"flip": [True, False]}, False, "linear"), ({"mu": [0.1, 0.2], "lr": [1, 2]}, False, "linear"), ({}, False, "linear")])
def test_one_numeric_parameter_is_a_curve_and_the_rest_are_bars(tmp_path: Path, grid: dict, curved: bool, scale: str) -> None:
    pretended(tmp_path / "s", Design("toy", grid, [0, 1, 2], {}), lambda point, seed: 0.4 + 0.1 * seed)
    result = read_sweep(tmp_path / "s")
    axes, = sweep_plot(result).axes
    assert bool(axes.lines) == curved or not curved and len(axes.patches) == 3 * len(result.rows)
    assert axes.get_xscale() == scale
    if curved:
        x = axes.lines[0].get_xdata()
        assert list(x) == sorted(x) and all(-1e-9 <= end <= 100 + 1e-9 for end in axes.get_ylim())
        dots = [collection for collection in axes.collections if len(collection.get_offsets()) == 3 * len(result.rows)]
        assert len(dots) == 3
        low, high = axes.get_ylim()
        assert all(low <= y <= high for _, y in dots[0].get_offsets())


def test_a_sweep_is_saved_anywhere(tmp_path: Path) -> None:
    pretended(tmp_path / "s", Design("toy", {"a": [1, 2]}, [0], {}), lambda point, seed: 0.5)
    result = read_sweep(tmp_path / "s")
    assert [path.name for path in result.save(tmp_path / "t")] == ["sweep.md", "sweep.json"]
    told = json.loads((tmp_path / "t" / "sweep.json").read_text())
    assert told["rows"][1]["measures"]["seg"] == {"value": 0.5, "low": None, "high": None, "n": 1, "values": {"0": 0.5}}
    assert told["rows"][1]["gain"]["value"] == 0.0


# ---- being interrupted ----------------------------------------------------------------------------------------------

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


# ---- the real thing -------------------------------------------------------------------------------------------------

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


def test_figures_of_several_sweeps_stand_in_one_table_that_says_where_they_come_from() -> None:
    one = read_sweep(ROOT / "data" / "ablations" / "ffr_mu.json")
    text = comparison_markdown(["setting", "seg"], [["a|b", in_percent(one.rows[0].measures["seg"])]], one, commands=["freqseg seeds world"])
    assert text.splitlines()[:3] == ["| setting | seg |", "| --- | ---: |", f"| a\\|b | {in_percent(one.rows[0].measures['seg'])} |"]
    assert one.design.commands[-1] in text and "`freqseg seeds world`" in text and "the embedded world" in text and one.data[0] in text
