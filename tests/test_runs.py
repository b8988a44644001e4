"""Runs: a notebook with parameters is executed whole, or refused before it starts, or fails with a record."""

import json
import os
import re
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from hypothesis import given
from hypothesis import strategies as st

from freqseg.files import InputError
from freqseg.work.runs import Parameter, RunFailed, check_parameters, notebook_parameters, parse_parameter, run_notebook

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = """
steps = 3        # of the walk
rate = 0.1       # a share, where 0=none
title = "walk"   # printed
loud = False     # or quiet
edges = [1, 2]   # where it turns
anything = None
"""
BODY = """
import sys
assert steps < 10, f"{steps} steps are too many"
print(title, steps, rate, sys.executable, sep="|")
"""


def write_notebook(path: Path, *codes: tuple[str, list[str]]) -> Path:
    "A notebook of code cells, each with its tags."
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": tags}) for source, tags in codes]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A notebook with six parameters."
    return write_notebook(tmp_path_factory.mktemp("walk") / "walk.ipynb", (PARAMETERS, ["parameters"]), (BODY, []))


def printed(record: Path) -> str:
    "Everything that an executed notebook wrote to stdout."
    cells = json.loads(record.read_text())["cells"]
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))


# ---- what a notebook can be told ------------------------------------------------------------------------------------

def test_every_assignment_of_the_tagged_cell_is_a_parameter(walk: Path) -> None:
    known = notebook_parameters(walk)
    assert {name: parameter.default for name, parameter in known.items()} == {
        "steps": 3, "rate": 0.1, "title": "walk", "loud": False, "edges": [1, 2], "anything": None}


def test_the_help_of_a_parameter_is_its_comment(walk: Path) -> None:
    assert notebook_parameters(walk)["steps"].help == "of the walk"
    assert "# of the walk" in str(notebook_parameters(walk)["steps"])


def test_a_parameter_whose_comment_papermill_cannot_read_still_counts(walk: Path) -> None:
    assert "rate" not in papermill.inspect_notebook(str(walk))
    assert notebook_parameters(walk)["rate"] == Parameter("rate", 0.1, "")


def test_papermill_reads_every_parameter_of_the_shipped_notebooks() -> None:
    tagged = [path for path in sorted((ROOT / "nbs").glob("*/*.ipynb"))
              if any("parameters" in cell.metadata.get("tags", []) for cell in nbformat.read(path, 4).cells)]
    known = {path: set(notebook_parameters(path)) for path in tagged}
    assert len(tagged) > 6 and all(known.values())
    unread = {path.name: names for path in tagged if (names := known[path] ^ set(papermill.inspect_notebook(str(path))))}
    assert not unread, f"read by one of the two only: {unread}"


@pytest.mark.parametrize("tags", [[], [["parameters"], ["parameters"]]], ids=["none", "two"])
def test_a_notebook_without_one_parameters_cell_is_refused(tmp_path: Path, tags: list[list[str]]) -> None:
    path = write_notebook(tmp_path / "a.ipynb", *[("x = 1", tag) for tag in tags], ("x", []))
    with pytest.raises(InputError, match=f"has {len(tags)} cells tagged 'parameters'"):
        run_notebook(path, tmp_path / "out")


def test_a_missing_or_broken_notebook_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.ipynb").write_text("{")
    with pytest.raises(InputError, match="there is no notebook"):
        notebook_parameters(tmp_path / "none.ipynb")
    with pytest.raises(InputError, match="broken.ipynb is not a notebook"):
        notebook_parameters(tmp_path / "broken.ipynb")


# ---- what is given --------------------------------------------------------------------------------------------------

def test_a_misspelled_parameter_names_the_nearest_and_nothing_runs(walk: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no parameter 'step'. Did you mean 'steps'"):
        run_notebook(walk, tmp_path / "out", {"step": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [("steps", "3"), ("steps", 2.5), ("steps", True), ("rate", "0.1"), ("rate", False),
                                             ("title", 3), ("loud", 1), ("edges", "12")])
def test_a_value_of_another_type_is_refused(walk: Path, name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"parameter {name} is .*, not {type(value).__name__}"):
        check_parameters(notebook_parameters(walk), {name: value})


@pytest.mark.parametrize(("name", "value"), [("rate", 1), ("edges", [3]), ("anything", 3), ("anything", "x"), ("loud", True)])
def test_a_value_that_fits_passes_unchanged(walk: Path, name: str, value: object) -> None:
    assert check_parameters(notebook_parameters(walk), {name: value}) == {name: value}


def test_a_path_is_given_as_text(walk: Path) -> None:
    assert check_parameters(notebook_parameters(walk), {"title": Path("a/b")}) == {"title": os.path.join("a", "b")}


@given(st.one_of(st.integers(-2**62, 2**62), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.lists(st.integers())))
def test_text_of_a_value_is_read_back_as_that_value(value: object) -> None:
    assert parse_parameter(Parameter("p", value), repr(value)) == value


@given(st.text())
def test_any_text_is_a_text_parameter(text: str) -> None:
    assert parse_parameter(Parameter("p", "x"), text) == text


@pytest.mark.parametrize(("default", "text"), [(3, "many"), (3, "2.5"), (True, "perhaps"), (0.5, "half"), ([1], "1")])
def test_text_that_means_no_such_value_is_refused(default: object, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"default {default!r}), which '{text}' is not")):
        parse_parameter(Parameter("p", default), text)


# ---- running --------------------------------------------------------------------------------------------------------

def test_the_record_holds_parameters_and_output_of_this_interpreter(walk: Path, tmp_path: Path) -> None:
    record = run_notebook(walk, tmp_path / "{odd} folder", {"steps": 5, "title": "five"})
    assert record == tmp_path / "{odd} folder" / "walk.ipynb"
    assert printed(record) == f"five|5|0.1|{sys.executable}\n"
    assert json.loads(record.read_text())["metadata"]["papermill"]["parameters"] == {"steps": 5, "title": "five"}


def test_a_failing_cell_leaves_notebook_and_traceback_and_raises(walk: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"cell In \[3\] failed: AssertionError: 11 steps are too many") as caught:
        run_notebook(walk, tmp_path / "run.ipynb", {"steps": 11})
    assert caught.value.record == tmp_path / "run.ipynb" and "too many" in caught.value.record.read_text()
    assert "assert steps < 10" in caught.value.traceback.read_text()
    assert "\x1b" not in caught.value.traceback.read_text()


@pytest.mark.slow
def test_the_record_of_a_run_that_is_done_outlives_one_that_fails(walk: Path, tmp_path: Path) -> None:
    record = run_notebook(walk, tmp_path / "run.ipynb", {"steps": 5})
    before = record.read_bytes()
    with pytest.raises(RunFailed, match="The notebook so far: .*run.again.ipynb") as caught:
        run_notebook(walk, record, {"steps": 11})
    assert record.read_bytes() == before and "too many" in caught.value.record.read_text()
    assert run_notebook(walk, record, {"steps": 7}) == record
    assert printed(record).startswith("walk|7|") and [path.name for path in tmp_path.iterdir()] == ["run.ipynb"]


def test_the_record_of_a_run_that_failed_gives_way_to_the_next(walk: Path, tmp_path: Path) -> None:
    for steps in (11, 12):
        with pytest.raises(RunFailed) as caught:
            run_notebook(walk, tmp_path / "run.ipynb", {"steps": steps})
        assert caught.value.record.name == "run.ipynb" and f"{steps} steps" in caught.value.record.read_text()


def test_a_kernel_that_dies_is_a_failed_run(tmp_path: Path) -> None:
    path = write_notebook(tmp_path / "die.ipynb", ("x = 1", ["parameters"]), ("import os; os._exit(1)", []))
    with pytest.raises(RunFailed, match="the kernel died"):
        run_notebook(path, tmp_path / "run.ipynb")
    assert (tmp_path / "run.ipynb").exists()


def test_a_run_never_overwrites_its_own_notebook(walk: Path) -> None:
    before = walk.read_bytes()
    with pytest.raises(InputError, match="would overwrite"):
        run_notebook(walk, walk.parent)
    assert walk.read_bytes() == before


def test_a_place_that_cannot_be_written_is_refused_before_the_run(walk: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write into"):
        run_notebook(walk, tmp_path / "file" / "run.ipynb")


def test_a_tuple_reaches_the_notebook_as_a_list(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    tagged = nbformat.v4.new_code_cell("scales = None", metadata={"tags": ["parameters"]})
    notebook.cells = [tagged, nbformat.v4.new_code_cell("assert scales == [1.0, 1.5], scales")]
    nbformat.write(notebook, tmp_path / "scales.ipynb")
    record = run_notebook(tmp_path / "scales.ipynb", tmp_path / "out", {"scales": (1.0, 1.5)})
    assert nbformat.read(record, 4).metadata.papermill.parameters["scales"] == [1.0, 1.5]
