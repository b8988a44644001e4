"""How soon the explorer answers in the kernel: from an option that changed to pictures that are ready to be sent.

A move is `Analysis.shown`, `view_cells`, `mask_cells` and `spectrum_svg` for a new value of one option; the tower has run before, and no two
moves in a row are alike. Beside it the naive way in the same run: a whole new `explore` for every move, and then the same. Models: the embedded world's
CLIP at 224 (28 x 28 patches) and ViT-B/16 with random weights at 448 (as many), three classes each. Random weights: time does not depend on them.

    python benchmarks/bench_explorer.py [MOVES]   a table: medians, 95th percentiles, ratios; one thread
    pytest benchmarks/bench_explorer.py           one move of each kind through pytest-benchmark
"""
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice

import numpy as np
import pytest
import torch

from freqseg.clip import Backbone
from freqseg.faces.explorer import RANDOM, Analysis, View, explore, mask_cells, open_model, scene, spectrum_svg, view_cells

pytestmark = pytest.mark.benchmark
MODELS = {"world": ("star", "wheel", "moon"), f"ViT-B-16{RANDOM}": ("dog", "grass", "car")}   # a model and three names for it
MOVES, NAIVE = 60, 3


def sweep(option: str, low: float, high: float, **others: object) -> Callable[[], Iterator[View]]:
    "Views in which a slider goes up and down."
    values = np.linspace(low, high, 31).tolist()
    return lambda: cycle(View(**{option: value}, **others) for value in [*values, *values[-2:0:-1]])


OPTIONS: dict[str, Callable[[], Iterator[View]]] = {
    "mu": sweep("mu", 0., .5),
    "threshold": sweep("threshold", 0., 1.),
    "lambda_h, both affinities": sweep("lambda_h", .05, 2., affinity="both"),
    "epsilon, transport": sweep("epsilon", .02, 1., maps="transport", affinity="both"),
    "layers": lambda: cycle(View(layers=layers) for layers in (1, 2, 3, 4, 5, 6, 5, 4, 3, 2)),
    "opacity": sweep("opacity", 0., 1.),
}
NEW = "layers, each as if for the first time"   # an analysis keeps the affinities of the blocks that it has shown
OPTIONS[NEW] = OPTIONS["layers"]


def answer(analysis: Analysis, view: View) -> int:
    "Everything that goes to the browser after a move; its bytes."
    shown = analysis.shown(view)
    cells = [cell for row in view_cells(analysis, shown, view) for cell in row] + mask_cells(analysis, shown)
    return sum(len(cell.picture) for cell in cells) + len(spectrum_svg(shown, view.mu))


def timed(work: Callable[[View], object], views: Iterable[View]) -> np.ndarray:
    "Milliseconds of the work on every view, (views, 2): by the clock on the wall, and of the processor."
    told = []
    for view in views:
        begin = time.perf_counter(), time.process_time()
        work(view)
        told.append((1000 * (time.perf_counter() - begin[0]), 1000 * (time.process_time() - begin[1])))
    return np.array(told)


def measure(moves: int = MOVES, naive: int = NAIVE) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    "(model, option) -> milliseconds of every move, and of every naive move, as `timed` gives them."
    torch.set_num_threads(1)
    found = {}
    subject = scene(48)
    for name, names in MODELS.items():
        model = open_model(name)
        analysis = explore(subject, names, model)

        def quick(view: View, analysis: Analysis = analysis) -> int: return answer(analysis, view)

        def first(view: View, analysis: Analysis = analysis) -> int:
            analysis.related.clear()
            return answer(analysis, view)

        def slow(view: View, model: Backbone = model, names: Sequence[str] = names) -> int: return answer(explore(subject, names, model), view)

        for option, views in OPTIONS.items():
            told = views()
            ours = first if option == NEW else quick
            timed(ours, islice(told, 3))   # what a hand does before it is watched
            found[name, option] = timed(ours, islice(told, moves)), timed(slow, islice(told, naive))
    return found


@pytest.fixture(scope="module", params=MODELS, ids=["world-224", "ViT-B-16-448"])
def analysis(request: pytest.FixtureRequest, one_thread: None) -> Analysis:
    return explore(scene(48), MODELS[request.param], request.param)


@pytest.mark.parametrize("option", OPTIONS)
def test_move(benchmark, option: str, analysis: Analysis) -> None:
    views = OPTIONS[option]()

    def move() -> int:
        if option == NEW: analysis.related.clear()
        return answer(analysis, next(views))

    assert benchmark.pedantic(move, rounds=20, iterations=1, warmup_rounds=3) > 10_000


@pytest.mark.parametrize("option", OPTIONS)
def test_a_new_analysis_for_every_move_shows_the_same(option: str, analysis: Analysis) -> None:
    "The peers do the same work: what they show is equal."
    views = OPTIONS[option]()
    view = next(islice(views, 2, None))
    ours, theirs = analysis.shown(view), explore(analysis.subject, analysis.names, analysis.backbone).shown(view)
    assert (ours.labels == theirs.labels).all() and all(torch.equal(ours.columns[title], theirs.columns[title]) for title in theirs.columns)


def main(moves: int = MOVES) -> None:
    found = measure(moves)
    print(f"{torch.get_num_threads()} thread, torch {torch.__version__}, {moves} moves of each option, {NAIVE} naive ones; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print("| model | option moved | ms, median | ms, 95% | ms of CPU | naive: ms, median | ms of CPU | naive / explorer, CPU |\n|---|---|---:|---:|---:|---:|---:|---:|")
    for (name, option), (quick, slow) in found.items():
        (wall, cpu), (naive, naive_cpu) = np.median(quick, 0), np.median(slow, 0)
        print(f"| {name} | {option} | {wall:.0f} | {np.percentile(quick[:, 0], 95):.0f} | {cpu:.0f} | {naive:.0f} | {naive_cpu:.0f} | {naive_cpu / cpu:.1f} |")
    print("\nMilliseconds of CPU hold on a busy machine too.")


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
