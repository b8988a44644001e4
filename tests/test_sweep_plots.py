"""freqseg.faces.sweep_plots: curves and bars."""

from pathlib import Path

import pytest
from toy_sweeps import pretended

from freqseg.faces.sweep_plots import sweep_plot
from freqseg.work.sweep_design import Design
from freqseg.work.sweep_statistics import read_sweep


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
