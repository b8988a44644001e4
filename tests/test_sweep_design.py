"""freqseg.work.sweep_design: what is compared, and what is refused before anything runs."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import nbformat
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_sweeps import DFA, ROOT, toy  # noqa: F401 (fixtures)

from freqseg.files import InputError
from freqseg.work.sweep_design import (
    Design,
    checked_grid,
    checked_seeds,
    extended,
    new_design,
    read_design,
    run_name,
    run_plans,
    trained_system,
)
from freqseg.work.sweep_statistics import read_sweep

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


def test_a_notebook_without_seed_or_out_cannot_be_swept(tmp_path: Path) -> None:
    cell = nbformat.v4.new_code_cell("a = 1\nout = ''", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), tmp_path / "n.ipynb")
    with pytest.raises(InputError, match="no parameter 'seed': a sweep gives every run a seed"):
        new_design(tmp_path / "n.ipynb", {"a": [1]}, 1)


@pytest.mark.parametrize("name", ["weclip", "wtclip", "dfa", "ffr"])
def test_the_system_of_every_training_notebook_is_found(name: str) -> None:
    assert trained_system(ROOT / "nbs" / "train" / f"{name}.ipynb") == name
    design = new_design(ROOT / "nbs" / "train" / f"{name}.ipynb", {"lr": [1e-3, 1e-4]}, 2, {"preset": "world"})
    assert [plan.chosen.settings.seed for plan in run_plans(design)] == [0, 0, 1, 1]


def test_the_preset_that_nobody_named_is_written_down() -> None:
    assert new_design(DFA, {"lr": [1e-3]}, 1).fixed == {"preset": "smoke"}


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
