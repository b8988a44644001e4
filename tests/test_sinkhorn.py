"""Sinkhorn: marginals, robustness, gradients, and agreement with POT."""

import subprocess
import sys

import ot
import ot.batch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freqseg import sinkhorn as room
from freqseg.sinkhorn import doubly_stochastic, sinkhorn, transport

sizes = st.integers(1, 12)
quick = settings(max_examples=20)


def shares(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    "Positive masses that sum to 1."
    return torch.softmax(torch.randn(*shape, dtype=dtype), -1)


def patchy(n: int = 36, *lead: int) -> torch.Tensor:
    "A row-stochastic attention that prefers neighbours."
    place = torch.arange(n, dtype=torch.float64)
    near = -(place[:, None] - place[None]).abs() / 3
    return torch.softmax(near + torch.randn(*lead, n, n, dtype=torch.float64), -1)


# ---- marginals ------------------------------------------------------------------------------------------------------

@quick
@given(st.integers(0, 3), sizes, sizes, st.floats(0.1, 5))
def test_rows_are_exact_and_columns_within_tolerance(batch: int, r: int, c: int, spread: float) -> None:
    row, col = shares(batch, r), shares(batch, c)
    result = sinkhorn(spread * torch.randn(batch, r, c, dtype=torch.float64), row, col, iterations=5000, tolerance=1e-5)
    torch.testing.assert_close(result.plan.sum(-1), row, atol=0, rtol=1e-9)
    torch.testing.assert_close(result.plan.sum(-2), col, atol=0, rtol=1.01e-5)
    assert result.error.shape == (batch,) and (result.error <= 1e-5).all()
    torch.testing.assert_close(result.log_plan.exp(), result.plan)


def test_the_reported_error_is_the_columns_error_and_the_cap_holds() -> None:
    col = shares(3, 5)
    result = sinkhorn(8 * torch.randn(3, 20, 5, dtype=torch.float64), col=col, iterations=7, tolerance=1e-12)
    torch.testing.assert_close(result.error, (result.plan.sum(-2) / col - 1).abs().amax(-1), atol=1e-9, rtol=1e-6)
    assert result.iterations == 7 and not result.error.requires_grad


def test_an_easy_problem_stops_early() -> None:
    assert sinkhorn(0.1 * torch.randn(4, 400, 25)).iterations == room.CHECK_EVERY


def test_columns_are_rescaled_to_the_mass_of_the_rows() -> None:
    kernel, col = torch.randn(6, 4), torch.rand(4)
    one, other = (sinkhorn(kernel, torch.ones(6), factor * col).plan for factor in (1, 7))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one.sum(), torch.tensor(6.0))


@quick
@given(st.integers(2, 12), st.integers(1, 3))
def test_doubly_stochastic_rows_and_columns_sum_to_one(n: int, batch: int) -> None:
    for symmetric in (None, "average", "scaling"):
        plan = doubly_stochastic(torch.rand(batch, n, n) + 0.01, 1000, symmetric=symmetric)
        for axis in (-1, -2):
            assert (plan.sum(axis) - 1).abs().max() < 1.02e-4
        assert (plan >= 0).all()


@pytest.mark.parametrize("columns", [5, room.WIDE - 1, room.WIDE, room.WIDE + 40])
def test_wide_and_narrow_matrices_are_scaled_alike(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    "With and without a copy of the transpose."
    kernel, found = torch.randn(2, 60, columns), []
    col = shares(columns)[None].float() * torch.ones(2, 1)
    for wide in (1, 10_000):
        monkeypatch.setattr(room, "WIDE", wide)
        found.append(sinkhorn(kernel, col=col, tolerance=1e-6, iterations=1000))
    torch.testing.assert_close(found[0].plan, found[1].plan, atol=1e-9, rtol=1e-4)
    torch.testing.assert_close(found[0].plan.sum(-2), col, atol=1e-7, rtol=1e-4)


def test_a_doubly_stochastic_matrix_is_a_fixed_point() -> None:
    permutations = torch.stack([torch.eye(9, dtype=torch.float64)[torch.randperm(9)] for _ in range(30)])
    matrix = (permutations * shares(30)[:, None, None]).sum(0) * 0.9 + 0.1 / 9
    torch.testing.assert_close(doubly_stochastic(matrix), matrix)
    symmetric = (matrix + matrix.T) / 2
    torch.testing.assert_close(doubly_stochastic(symmetric, symmetric="scaling"), symmetric)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("symmetric", ["average", "scaling"])
def test_symmetric_options_are_symmetric_to_the_last_bit(symmetric: str, dtype: torch.dtype) -> None:
    plan = doubly_stochastic(patchy(36, 2).to(dtype), symmetric=symmetric)
    assert torch.equal(plan, plan.mT) and plan.dtype == dtype


def test_symmetric_input_gives_symmetric_output_by_either_road() -> None:
    matrix = patchy()
    matrix = matrix + matrix.T
    alternating = doubly_stochastic(matrix, 5000, 1e-10)
    torch.testing.assert_close(alternating, alternating.T, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(doubly_stochastic(matrix, 5000, 1e-10, symmetric="scaling"), alternating, atol=1e-9, rtol=1e-7)


# ---- parity, invariance ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rounds", [1, 3, 12])
def test_fixed_rounds_are_column_then_row_normalisation(rounds: int) -> None:
    matrix = torch.rand(2, 20, 20, dtype=torch.float64)
    expected = matrix
    for _ in range(rounds):
        expected = expected / expected.sum(-2, keepdim=True)
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(doubly_stochastic(matrix, rounds=rounds), expected)
    torch.testing.assert_close(doubly_stochastic(matrix, rounds=rounds, symmetric="average"), (expected + expected.mT) / 2)


@pytest.mark.parametrize("symmetric", [None, "scaling"])
def test_rounds_in_logarithms_equal_rounds_in_numbers(monkeypatch: pytest.MonkeyPatch, symmetric: str | None) -> None:
    matrix = patchy(20, 3)
    fast = doubly_stochastic(matrix, 1000, 1e-9, symmetric=symmetric)
    monkeypatch.setattr(room, "TRUSTED", 1.0)  # nothing is trusted
    torch.testing.assert_close(doubly_stochastic(matrix, 1000, 1e-9, symmetric=symmetric), fast, atol=1e-9, rtol=1e-6)


@quick
@given(sizes, sizes)
def test_adding_a_function_of_the_row_or_the_column_changes_nothing(r: int, c: int) -> None:
    score, col = torch.randn(2, r, c, dtype=torch.float64), shares(2, c)
    plan = transport(score, col, epsilon=0.5, iterations=2000, tolerance=1e-10)
    for shift in (torch.randn(2, r, 1), torch.randn(2, 1, c)):
        torch.testing.assert_close(transport(score + shift, col, epsilon=0.5, iterations=2000, tolerance=1e-10), plan,
                                   atol=1e-9, rtol=1e-7)


def test_rows_and_columns_may_be_permuted() -> None:
    score, col = torch.randn(15, 6, dtype=torch.float64), shares(6)
    rows, columns = torch.randperm(15), torch.randperm(6)
    moved = transport(score[rows][:, columns], col[columns])
    torch.testing.assert_close(moved, transport(score, col)[rows][:, columns])


def test_a_batch_is_its_problems_one_by_one() -> None:
    kernel, col = 3 * torch.randn(2, 3, 30, 7, dtype=torch.float64), shares(2, 3, 7)
    together = sinkhorn(kernel, col=col, tolerance=1e-11, iterations=5000).plan
    alone = torch.stack([torch.stack([sinkhorn(kernel[i, j], col=col[i, j], tolerance=1e-11, iterations=5000).plan
                                      for j in range(3)]) for i in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-11, rtol=1e-8)


def test_large_eps_gives_the_product_of_the_marginals() -> None:
    score, row, col = torch.randn(3, 20, 6), shares(3, 20, dtype=torch.float32), shares(3, 6, dtype=torch.float32)
    plan = transport(score, col, row, epsilon=1e7)
    torch.testing.assert_close(plan, row[..., :, None] * col[..., None, :], atol=1e-7, rtol=1e-5)


def test_small_eps_approaches_the_optimal_assignment() -> None:
    score, row, col = torch.rand(12, 5, dtype=torch.float64), torch.full((12,), 1 / 12, dtype=torch.float64), shares(5)
    plan = transport(score, col, epsilon=2e-3, iterations=100_000, tolerance=1e-7)
    best = ot.emd(row.numpy(), col.numpy(), -score.numpy())
    assert abs((plan * score).sum() - (best * score.numpy()).sum()) < 5e-3


# ---- POT ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("eps", [0.02, 0.1, 1.0])
def test_plans_equal_pot(eps: float) -> None:
    score, col = torch.rand(4, 100, 9, dtype=torch.float64), shares(4, 9)
    row = torch.full((100,), 0.01, dtype=torch.float64)
    ours = transport(score, col, epsilon=eps, iterations=20_000, tolerance=1e-10)
    theirs = torch.stack([ot.sinkhorn(row, v, -s, eps, method="sinkhorn_log", numItermax=20_000, stopThr=1e-12)
                          for s, v in zip(score, col, strict=True)])
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-6)


def test_plans_equal_pot_in_batches() -> None:
    score, row, col = torch.rand(5, 40, 7, dtype=torch.float64), shares(5, 40), shares(5, 7)
    theirs = ot.batch.solve_batch(-score, 0.1, row, col, max_iter=10_000, tol=1e-12, method="log_sinkhorn").plan
    torch.testing.assert_close(transport(score, col, row, iterations=10_000, tolerance=1e-10), theirs, atol=1e-10, rtol=1e-6)


# ---- masks ----------------------------------------------------------------------------------------------------------

@quick
@given(st.lists(st.booleans(), min_size=1, max_size=8).filter(any))
def test_masked_columns_are_as_if_they_were_not_there(present: list[bool]) -> None:
    mask = torch.tensor(present)
    score, col = torch.randn(2, 10, len(present), dtype=torch.float64), shares(2, len(present))
    plan = transport(score, col, mask=mask, iterations=2000, tolerance=1e-10)
    assert not plan[..., ~mask].any()
    kept = transport(score[..., mask], col[:, mask], iterations=2000, tolerance=1e-10)
    torch.testing.assert_close(plan[..., mask], kept, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(plan.sum(-1), torch.full((2, 10), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("gradient", ["unroll", "implicit"])
@pytest.mark.parametrize("size", [1.0, 1e38])
def test_pictures_without_any_class_get_zeros_and_finite_gradients(gradient: str, size: float) -> None:
    score = (torch.randn(3, 8, 4) * size).clamp(-3e38, 3e38).requires_grad_()
    mask = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]])
    result = sinkhorn(score, mask=mask, gradient=gradient)
    assert not result.plan[1].any() and result.error[1] == 0
    torch.testing.assert_close(result.plan[2, :, 1].detach(), torch.full((8,), 1 / 8))
    (result.plan * torch.randn(3, 8, 4)).sum().backward()
    assert score.grad.isfinite().all() and not score.grad[1].any() and not score.grad[0, :, 1].any()


def test_rows_without_mass_get_zeros() -> None:
    row = torch.tensor([0.5, 0.0, 0.3, 0.2])
    plan = sinkhorn(torch.randn(4, 3), row).plan
    torch.testing.assert_close(plan.sum(-1), row)
    assert not plan[1].any()


# ---- extreme input --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gradient", ["unroll", "implicit"])
@pytest.mark.parametrize("size", [0.0, 50.0, 1e3, 1e5, 1e20, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_input_makes_nan(dtype: torch.dtype, size: float, gradient: str) -> None:
    score = (size * torch.randn(4, 40, 6)).clamp(-3e38, 3e38).to(dtype).requires_grad_()
    result = sinkhorn(score, col=torch.tensor([0.9, 1e-6, 1e-6, 0.05, 0.05, 1e-20]), gradient=gradient)
    assert result.plan.isfinite().all() and (result.plan >= 0).all() and result.plan.dtype == dtype
    torch.testing.assert_close(result.plan.float().sum(-1), torch.full((4, 40), 1 / 40), atol=0, rtol=2e-2)
    (result.plan.float() * torch.randn(4, 40, 6)).sum().backward()
    assert score.grad.isfinite().all()


@pytest.mark.parametrize("symmetric", [None, "average", "scaling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_affinities_make_no_nan(dtype: torch.dtype, symmetric: str | None) -> None:
    spread = torch.exp(80 * (torch.rand(20, 20) - 0.5)).to(dtype)
    for matrix in (spread, torch.zeros(20, 20, dtype=dtype), torch.eye(20, dtype=dtype), torch.full((20, 20), 3e38).to(dtype),
                   torch.ones(20, 20, dtype=dtype).triu()):
        plan = doubly_stochastic(matrix, 1000, symmetric=symmetric)
        assert plan.isfinite().all() and plan.max() < 1.02


def test_a_structure_that_cannot_be_solved_is_returned_with_its_error() -> None:
    kernel = torch.zeros(3, 3)
    kernel[:2, :2] = -torch.inf  # two rows that can only give to one column
    result = sinkhorn(kernel)
    assert result.plan.isfinite().all() and result.error > 0.5 and result.iterations == 100


def test_hard_scores_still_meet_the_marginals_in_fp32() -> None:
    score, col = torch.rand(8, 400, 25), shares(8, 25, dtype=torch.float32)
    result = sinkhorn(score / 5e-3, col=col, iterations=3000)
    assert (result.error <= 1e-4).all()
    torch.testing.assert_close(result.plan.sum(-2), col, atol=0, rtol=2e-4)


def test_autocast_does_not_touch_the_precision() -> None:
    matrix = patchy().float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = doubly_stochastic(matrix)
    torch.testing.assert_close(inside, doubly_stochastic(matrix), atol=0, rtol=0)


# ---- gradients ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
@pytest.mark.parametrize("options", [dict(rounds=3), dict(gradient="unroll"), dict(gradient="implicit")], ids=str)
def test_gradients_are_right(shape: tuple[int, int], options: dict) -> None:
    if "rounds" not in options:
        options = options | {"tolerance": 1e-13, "iterations": 2000}
    kernel = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    row, col = shares(2, shape[0]).requires_grad_(), shares(2, shape[1]).requires_grad_()
    assert torch.autograd.gradcheck(lambda k, a, b: sinkhorn(k, a, b, **options)[:2], (kernel, row, col), atol=1e-6)


@pytest.mark.parametrize("gradient", ["unroll", "implicit"])
def test_gradients_with_masks_are_right(gradient: str) -> None:
    kernel, col = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True), shares(2, 4).requires_grad_()
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    assert torch.autograd.gradcheck(
        lambda k, b: transport(k, b, mask=mask, epsilon=0.7, tolerance=1e-13, iterations=2000, gradient=gradient),
        (kernel, col), atol=1e-6)


@pytest.mark.parametrize("symmetric", [None, "average", "scaling"])
@pytest.mark.parametrize("gradient", ["unroll", "implicit"])
def test_gradients_of_doubly_stochastic_are_right(symmetric: str | None, gradient: str) -> None:
    matrix = (torch.rand(4, 4, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m: doubly_stochastic(m, 5000, 1e-13, symmetric=symmetric, gradient=gradient), matrix, atol=1e-6)


def test_gradients_through_logarithms_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "TRUSTED", 1.0)
    kernel, col = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), shares(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda k, b: sinkhorn(k, col=b, rounds=7).plan, (kernel, col), atol=1e-6)


def test_implicit_gradients_survive_a_plan_of_separate_blocks() -> None:
    kernel = torch.full((6, 6), -40.0)
    kernel[:3, :3] = kernel[3:, 3:] = 0
    kernel = (kernel + torch.randn(6, 6) / 5).requires_grad_()
    weight = torch.randn(6, 6)
    found = [torch.autograd.grad((sinkhorn(kernel, gradient=g, iterations=500, tolerance=1e-6).plan * weight).sum(), kernel)[0]
             for g in ("implicit", "unroll")]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_implicit_gradients_do_not_depend_on_the_number_of_threads() -> None:
    """After `torch.set_num_threads(2)` the batched LU of torch with MKL is wrong from about 150 x 150 (pytorch issue 142815).

    In a process of its own: what MKL was told cannot be taken back."""
    script = """
import torch
from freqseg.sinkhorn import doubly_stochastic
torch.manual_seed(0)
affinity = torch.rand(4, 200, 200, dtype=torch.float64) + 5 * torch.eye(200)
weight = torch.randn(4, 200, 200, dtype=torch.float64)
gradients = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    x = affinity.clone().requires_grad_()
    (doubly_stochastic(x, 500, 1e-12, gradient="implicit") * weight).sum().backward()
    gradients.append(x.grad)
torch.testing.assert_close(*gradients)
"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert done.returncode == 0 and "ERROR" not in done.stdout, done.stdout[-2000:]


# ---- options --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call", [
    lambda k: sinkhorn(k, gradient="magic"), lambda k: sinkhorn(k, rounds=3, gradient="implicit"),
    lambda k: sinkhorn(k, rounds=0), lambda k: sinkhorn(k, iterations=0), lambda k: sinkhorn(k, torch.tensor([-1.0, 1, 1])),
    lambda k: doubly_stochastic(k - 1), lambda k: doubly_stochastic(k[:2]), lambda k: doubly_stochastic(k, symmetric="yes"),
    lambda k: transport(k, torch.ones(3), epsilon=0),
])
def test_wrong_arguments_are_named(call) -> None:
    with pytest.raises(ValueError, match=r"\w+"):
        call(torch.full((3, 3), 0.5))


@pytest.mark.cuda
@pytest.mark.parametrize("gradient", ["unroll", "implicit"])
def test_cuda_equals_cpu(gradient: str) -> None:
    score, col = torch.rand(4, 50, 6), shares(4, 6, dtype=torch.float32)
    results = []
    for device in ("cpu", "cuda"):
        leaf = score.to(device).requires_grad_()
        plan = transport(leaf, col.to(device), epsilon=0.05, iterations=500, tolerance=1e-6, gradient=gradient)
        results.append((plan.detach().cpu(), torch.autograd.grad((plan * leaf).sum(), leaf)[0].cpu()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)
