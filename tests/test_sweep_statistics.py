"""freqseg.work.sweep_statistics: means, intervals, tables."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from toy_sweeps import ROOT, pretended, toy  # noqa: F401 (fixtures)

from freqseg.faces.sweep_plots import sweep_plot
from freqseg.files import InputError
from freqseg.work.sweep_design import (
    Design,
    extended,
    finished,
    new_design,
)
from freqseg.work.sweep_statistics import comparison_markdown, estimate, in_percent, paired_difference, read_sweep
from freqseg.work.sweeps import sweep

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


def test_a_sweep_is_saved_anywhere(tmp_path: Path) -> None:
    pretended(tmp_path / "s", Design("toy", {"a": [1, 2]}, [0], {}), lambda point, seed: 0.5)
    result = read_sweep(tmp_path / "s")
    assert [path.name for path in result.save(tmp_path / "t")] == ["sweep.md", "sweep.json"]
    told = json.loads((tmp_path / "t" / "sweep.json").read_text())
    assert told["rows"][1]["measures"]["seg"] == {"value": 0.5, "low": None, "high": None, "n": 1, "values": {"0": 0.5}}
    assert told["rows"][1]["gain"]["value"] == 0.0


def test_figures_of_several_sweeps_stand_in_one_table_that_says_where_they_come_from() -> None:
    one = read_sweep(ROOT / "data" / "ablations" / "ffr_mu.json")
    text = comparison_markdown(["setting", "seg"], [["a|b", in_percent(one.rows[0].measures["seg"])]], one, commands=["freqseg seeds world"])
    assert text.splitlines()[:3] == ["| setting | seg |", "| --- | ---: |", f"| a\\|b | {in_percent(one.rows[0].measures['seg'])} |"]
    assert one.design.commands[-1] in text and "`freqseg seeds world`" in text and "the embedded world" in text and one.data[0] in text
