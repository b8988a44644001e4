"""Entropic transport of 32 pictures, 400 patches to 25 prompts: freqseg beside POT, in one run, to the same accuracy.

Run `python benchmarks/bench_sinkhorn.py` for a table with ratios, or `pytest benchmarks/bench_sinkhorn.py` for
pytest-benchmark's statistics. One yardstick for all: the largest relative error of a class share, at most 1e-4. POT stops
on the Euclidean norm of all errors of a marginal, so it gets the loosest threshold with which it satisfies the yardstick.
"""
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import ot
import ot.batch
import pytest
import torch
from torch import Tensor

from freqseg.sinkhorn import doubly_stochastic, sinkhorn, transport

PROBLEMS, PATCHES, PROMPTS, TOLERANCE, MOST = 32, 400, 25, 1e-4, 10_000
EPSILONS = (0.5, 0.1, 0.05)
Solver = Callable[[Tensor, Tensor, float, float], Tensor]
pytestmark = pytest.mark.benchmark


def freqseg(score: Tensor, share: Tensor, eps: float, threshold: float) -> Tensor:
    return transport(score, share, epsilon=eps, tolerance=threshold, iterations=MOST)


def pot_loop(score: Tensor, share: Tensor, eps: float, threshold: float) -> Tensor:
    row = torch.full((PATCHES,), 1 / PATCHES)
    return torch.stack([ot.sinkhorn(row, v, -s, eps, method="sinkhorn_log", stopThr=threshold, numItermax=MOST)
                        for s, v in zip(score, share, strict=True)])


def pot_batch(score: Tensor, share: Tensor, eps: float, threshold: float) -> Tensor:
    "POT's batched solver corrects rows first and looks at them: given the transposed problem it looks at the classes."
    row = torch.full((PROBLEMS, PATCHES), 1 / PATCHES)
    return ot.batch.solve_batch(-score.mT, eps, share, row, max_iter=MOST, tol=threshold, method="log_sinkhorn").plan.mT


SOLVERS: dict[str, Solver] = {"freqseg": freqseg, "POT sinkhorn_log, looped": pot_loop, "POT solve_batch": pot_batch}


def problems() -> tuple[Tensor, Tensor]:
    "Scores in [0, 1] and class shares that differ by a factor of about a hundred."
    generator = torch.Generator().manual_seed(0)
    share = torch.softmax(torch.randn(PROBLEMS, PROMPTS, generator=generator), -1)
    return torch.rand(PROBLEMS, PATCHES, PROMPTS, generator=generator), share


def reached(plan: Tensor, share: Tensor) -> float:
    "The yardstick."
    return float((plan.sum(-2) / share - 1).abs().max())


def loosest_threshold(solver: Solver, eps: float) -> float:
    "The largest power of ten as stopping threshold with which the yardstick is satisfied."
    score, share = problems()
    for threshold in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        if reached(solver(score, share, eps, threshold), share) <= TOLERANCE * 1.01:
            return threshold
    raise RuntimeError(f"{solver.__name__} does not reach {TOLERANCE} at eps {eps}")


@pytest.mark.parametrize("eps", EPSILONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_transport(benchmark, name: str, eps: float) -> None:
    benchmark.group = f"32 x (400 x 25), eps {eps}"
    score, share = problems()
    threshold = loosest_threshold(SOLVERS[name], eps)
    plan = benchmark.pedantic(SOLVERS[name], (score, share, eps, threshold), rounds=3, warmup_rounds=1)
    assert reached(plan, share) <= TOLERANCE * 1.01


@pytest.mark.parametrize("gradient", ["unroll", "implicit"])
def test_transport_with_gradient(benchmark, gradient: str) -> None:
    benchmark.group = "32 x (400 x 25), eps 0.1, forward and backward"
    score, share = problems()
    score.requires_grad_()
    benchmark.pedantic(lambda: sinkhorn(score / 0.1, col=share, gradient=gradient).plan.square().sum().backward(), rounds=5)
    assert score.grad.isfinite().all() and score.grad.any()


@pytest.mark.parametrize("symmetric", [None, "average", "scaling"])
def test_doubly_stochastic(benchmark, symmetric: str | None) -> None:
    benchmark.group = "8 affinities of 400 x 400"
    affinity = torch.softmax(2 * torch.randn(8, PATCHES, PATCHES), -1)
    scaled = benchmark.pedantic(doubly_stochastic, (affinity,), dict(symmetric=symmetric), rounds=5)
    assert (scaled.sum(-1) - 1).abs().max() < 1e-3


def alternating_medians(calls: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    "Median milliseconds of processor time of each call, in turns: on a busy machine a clock on the wall tells little."
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    score, share = problems()
    print(f"{PROBLEMS} problems of {PATCHES} x {PROMPTS}, fp32, one thread, processor time")
    for eps in EPSILONS:
        thresholds = {name: TOLERANCE if solver is freqseg else loosest_threshold(solver, eps) for name, solver in SOLVERS.items()}
        times = alternating_medians({name: partial(solver, score, share, eps, thresholds[name]) for name, solver in SOLVERS.items()})
        for name, solver in SOLVERS.items():
            error = reached(solver(score, share, eps, thresholds[name]), share)
            print(f"eps {eps:<5} {name:26} {times[name]:8.1f} ms   error {error:.0e}   {times[name] / times['freqseg']:5.1f} x freqseg")


if __name__ == "__main__":
    main()
