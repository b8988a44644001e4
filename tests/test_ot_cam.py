"""Transport CAM: score, class shares, plan and maps."""

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freqseg.cam import background_score
from freqseg.files import InputError
from freqseg.ot_cam import (class_marginal, map_similarity, neighbourhood_mean, score_matrix, similarity_matrix, transport_cam, transport_maps,
                            transport_plan)
from freqseg.sinkhorn import doubly_stochastic, transport

H, W, K = 4, 5, 6
N = H * W
PRESENT = torch.tensor([[True, True, False, True, True, False], [False, True, True, True, True, True]])
EXACT = {"iterations": 5000, "tolerance": 1e-9}
quick = settings(max_examples=20)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "Similarity (2, N, K) and two affinities (2, N, N)."
    low, high = (doubly_stochastic(torch.rand(2, N, N, dtype=torch.float64) ** 4 + 1e-3, 1000, 1e-9, symmetric="average")
                 for _ in range(2))
    return torch.rand(2, N, K, dtype=torch.float64).to(dtype), low.to(dtype), high.to(dtype)


# ---- similarity -----------------------------------------------------------------------------------------------------

def cosines_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    "Cosines (2, 4 classes + 3 background prompts, H, W) and image labels (2, 4)."
    generator = torch.Generator().manual_seed(0)
    return 0.2 + 0.1 * torch.randn(2, 7, H, W, generator=generator), torch.tensor([[True, False, True, False], [False, True, False, False]])


def test_the_rest_is_what_the_maps_of_the_classes_leave() -> None:
    cosines, labels = cosines_and_labels()
    similarity = similarity_matrix(cosines, labels)
    torch.testing.assert_close(similarity, similarity_matrix(cosines[:, :4], labels))   # background prompts have no say
    for image, row in enumerate(labels):
        for c in range(4):
            flat = cosines[image, c].flatten()
            expected = (flat - flat.min()) / (flat.max() - flat.min()) * row[c]
            torch.testing.assert_close(similarity[image, :, c], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(similarity[..., 4], 1 - similarity[..., :4].amax(-1))


def test_how_loud_a_class_is_in_a_picture_matters_to_the_softmax_only() -> None:
    cosines, labels = cosines_and_labels()
    louder = cosines + torch.tensor([0.3, 0.3, 0.3, 0.3, 0, 0, 0]).view(7, 1, 1)
    torch.testing.assert_close(similarity_matrix(louder, labels), similarity_matrix(cosines, labels), atol=1e-5, rtol=1e-4)
    quiet, loud = (similarity_matrix(x, labels, 10.0, "prompts") for x in (cosines, louder))
    assert (loud[..., 4] < quiet[..., 4]).all()


def test_with_prompts_rows_are_shares_of_the_present_classes_and_all_prompts() -> None:
    cosines, labels = cosines_and_labels()
    similarity = similarity_matrix(cosines, labels, 10.0, "prompts")
    logits = 10 * torch.cat([cosines[0, [0, 2]], cosines[0, 4:]]).flatten(1)
    shares = logits.exp() / logits.exp().sum(0)
    expected = torch.stack([shares[0], torch.zeros(N), shares[1], torch.zeros(N), shares[2:].sum(0)], 1)
    torch.testing.assert_close(similarity[0], expected)
    with pytest.raises(InputError, match="needs background prompts"): similarity_matrix(cosines[:, :4], labels, contrast="prompts")
    with pytest.raises(InputError, match="contrast='sky'"): similarity_matrix(cosines, labels, contrast="sky")


# ---- score ----------------------------------------------------------------------------------------------------------

def test_class_score_is_the_weighted_mean_of_both_propagations() -> None:
    similarity, low, high = inputs()
    low, high = 3 * low, high * torch.rand(2, N, 1)  # rows need not sum to 1
    expected = (2.0 * torch.einsum("bij,bjk->bik", low / low.sum(-1, keepdim=True), similarity)
                + 0.3 * torch.einsum("bij,bjk->bik", high / high.sum(-1, keepdim=True), similarity))
    torch.testing.assert_close(score_matrix(similarity, low, high, 2.0, 0.3), expected)


def test_literal_score_is_the_printed_sum() -> None:
    similarity, low, high = inputs()
    expected = (low[..., None] * similarity[:, None]).sum(2) + 0.1 * high.sum(2)[..., None]
    torch.testing.assert_close(score_matrix(similarity, low, 1 * high, score="literal"), expected)


def test_the_literal_second_term_cannot_change_the_plan() -> None:
    similarity, low, high = inputs()
    high = high * torch.rand(2, N, 1)
    plans = [transport_plan(similarity, low, h, PRESENT, score="literal", **EXACT) for h in (None, high)]
    torch.testing.assert_close(*plans, atol=1e-10, rtol=1e-7)
    by_class = [transport_plan(similarity, low, h, PRESENT, **EXACT) for h in (None, high)]
    assert (by_class[0] - by_class[1]).abs().max() > 1e-5


def test_identity_affinities_give_the_similarity_back() -> None:
    similarity, *_ = inputs()
    eye = torch.eye(N, dtype=torch.float64).expand(2, N, N)
    torch.testing.assert_close(score_matrix(similarity, eye), similarity)
    torch.testing.assert_close(score_matrix(similarity, eye, eye), 1.1 * similarity)


def test_empty_affinity_rows_stay_zero() -> None:
    affinity = torch.rand(1, 4, 4)
    affinity[0, 2] = 0
    means = neighbourhood_mean(affinity, torch.ones(1, 4, 1))
    torch.testing.assert_close(means, torch.tensor([1.0, 1, 0, 1]).view(1, 4, 1))


# ---- class shares ---------------------------------------------------------------------------------------------------

@quick
@given(st.floats(0.01, 1e4), st.floats(1e-9, 0.01))
def test_shares_sum_to_one_over_present_classes_and_keep_the_floor(temperature: float, floor: float) -> None:
    similarity, *_ = inputs(torch.float32)
    share = class_marginal(50 * similarity, temperature, floor, PRESENT)
    torch.testing.assert_close(share.sum(-1), torch.ones(2))
    assert not share[~PRESENT].any() and share[PRESENT].min() >= floor / (1 + K * floor) * 0.999


def test_temperature_one_is_the_printed_softmax_and_the_default_that_of_the_mean() -> None:
    similarity, *_ = inputs()
    torch.testing.assert_close(class_marginal(similarity, 1.0, 1e-12), torch.softmax(similarity.sum(1), -1), atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(class_marginal(similarity), torch.softmax(similarity.mean(1), -1))


def test_the_printed_softmax_saturates_and_the_floor_keeps_everybody_in() -> None:
    similarity = 0.1 * torch.rand(1, 400, 3) + torch.tensor([0.2, 0.1, 0.0])
    share = class_marginal(similarity, 1.0)
    assert share[0, 0] > 0.999 and (share >= 0.99e-6).all()
    assert transport_plan(similarity, torch.eye(400)[None], temperature=1.0).isfinite().all()


# ---- plan -----------------------------------------------------------------------------------------------------------

@quick
@given(st.sampled_from([0.02, 0.1, 1.0]), st.sampled_from(["class", "literal"]), st.booleans())
def test_marginals_to_tolerance(eps: float, score: str, with_high: bool) -> None:
    similarity, low, high = inputs(torch.float32)
    plan = transport_plan(similarity, low, high if with_high else None, PRESENT, epsilon=eps, score=score, iterations=2000)
    torch.testing.assert_close(plan.sum(-1), torch.full((2, N), 1 / N), atol=0, rtol=1e-5)
    torch.testing.assert_close(plan.sum(-2), class_marginal(similarity, present=PRESENT), atol=1e-9, rtol=1.1e-4)


def test_plan_equals_pot() -> None:
    similarity, low, high = inputs()
    plan = transport_plan(similarity, low, high, PRESENT, **EXACT)
    score, share = score_matrix(similarity, low, high), class_marginal(similarity, present=PRESENT)
    for b in range(2):
        here = PRESENT[b]
        expected = ot.sinkhorn(torch.full((N,), 1 / N, dtype=torch.float64), share[b, here], -score[b][:, here], 0.1,
                               method="sinkhorn_log", stopThr=1e-13)
        torch.testing.assert_close(plan[b][:, here], expected, atol=1e-9, rtol=1e-6)


def test_a_patch_that_is_paid_more_by_everybody_changes_nothing() -> None:
    similarity, low, high = inputs()
    score, share = score_matrix(similarity, low, high), class_marginal(similarity, present=PRESENT)
    shifted = score + torch.randn(2, N, 1)
    torch.testing.assert_close(transport(shifted, share, mask=PRESENT, **EXACT), transport(score, share, mask=PRESENT, **EXACT),
                               atol=1e-10, rtol=1e-7)


def test_large_eps_spreads_every_class_evenly() -> None:
    similarity, low, high = inputs()
    plan = transport_plan(similarity, low, high, PRESENT, epsilon=1e8)
    torch.testing.assert_close(plan, class_marginal(similarity, present=PRESENT)[:, None].expand_as(plan) / N, atol=1e-10, rtol=1e-6)


def test_given_shares_replace_the_estimated_ones() -> None:
    similarity, low, high = inputs()
    share = torch.softmax(torch.randn(2, K, dtype=torch.float64), -1)
    plan = transport_plan(similarity, low, high, share=share, **EXACT)
    torch.testing.assert_close(plan.sum(-2), share, atol=1e-9, rtol=1e-7)


# ---- maps -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("eps", [0.01, 0.1, 10.0])
def test_present_maps_peak_at_one_and_absent_ones_are_zero(dtype: torch.dtype, eps: float) -> None:
    cam = transport_cam(*inputs(dtype), (H, W), PRESENT, epsilon=eps)
    assert cam.shape == (2, K, H, W) and cam.dtype == dtype
    assert torch.equal(cam.amax((-2, -1)), PRESENT.to(dtype))
    assert (cam >= 0).all() and cam.isfinite().all()


def test_maps_are_the_columns_of_the_plan_row_major() -> None:
    similarity, low, high = inputs()
    plan = transport_plan(similarity, low, high)
    cam = transport_cam(similarity, low, high, (H, W))
    torch.testing.assert_close(cam[1, 2, 3, 1], plan[1, 3 * W + 1, 2] / plan[1, :, 2].max())


def test_maps_follow_permutations_of_patches_and_of_classes() -> None:
    similarity, low, high = inputs()
    cam = transport_cam(similarity, low, high, (H, W), PRESENT, **EXACT).flatten(2)
    patches, classes = torch.randperm(N), torch.randperm(K)
    moved = transport_cam(similarity[:, patches][..., classes], low[:, patches][..., patches], high[:, patches][..., patches],
                          (H, W), PRESENT[:, classes], **EXACT).flatten(2)
    torch.testing.assert_close(moved, cam[:, classes][..., patches], atol=1e-8, rtol=1e-6)


def test_absent_classes_have_no_influence_on_the_others() -> None:
    similarity, low, high = inputs()
    noisy = torch.where(PRESENT[:, None], similarity, 1e4 * torch.randn(2, N, K))
    torch.testing.assert_close(transport_cam(noisy, low, high, (H, W), PRESENT, **EXACT),
                               transport_cam(similarity, low, high, (H, W), PRESENT, **EXACT), atol=1e-8, rtol=1e-6)


def test_a_picture_without_any_class_gets_empty_maps() -> None:
    similarity, low, high = (x.requires_grad_() for x in inputs())
    cam = transport_cam(similarity, low, high, (H, W), PRESENT & torch.tensor([[True], [False]]))
    cam.square().sum().backward()
    assert not cam[1].any() and torch.equal(cam[0].amax((-2, -1)) == 1, PRESENT[0])
    assert all(x.grad.isfinite().all() for x in (similarity, low, high))


def test_pictures_of_a_batch_do_not_meet() -> None:
    similarity, low, high = inputs()
    together = transport_cam(similarity, low, high, (H, W), PRESENT, **EXACT)
    alone = torch.cat([transport_cam(similarity[[b]], low[[b]], high[[b]], (H, W), PRESENT[[b]], **EXACT) for b in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("gradient", ["unroll", "implicit"])
def test_gradients_reach_similarity_and_affinities(gradient: str) -> None:
    similarity, low, high = (x[:1].detach() for x in inputs())
    similarity, low, high = similarity[:, :4].clone(), low[:, :4, :4].clone(), high[:, :4, :4].clone()
    for x in (similarity, low, high):
        x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *x: transport_cam(*x, (2, 2), PRESENT[:1], gradient=gradient, iterations=3000, tolerance=1e-13),
        (similarity, low, high), atol=1e-5)


@pytest.mark.parametrize("call", [
    lambda s, a: transport_cam(s, a, None, (3, 5)), lambda s, a: transport_cam(s, a[:, 1:], None, (H, W)),
    lambda s, a: transport_cam(s, a, a[:1], (H, W)), lambda s, a: transport_cam(s, a, a, (H, W), PRESENT[:, 1:]),
    lambda s, a: score_matrix(s, a, a, score="printed"), lambda s, a: transport_cam(s, a, a, (H, W), epsilon=0.0),
    lambda s, a: class_marginal(s, temperature=0.0), lambda s, a: class_marginal(s, floor=0.0),
])
def test_what_a_user_can_get_wrong_is_named(call) -> None:
    similarity, low, _ = inputs()
    with pytest.raises(InputError, match=r"\w+"):
        call(similarity, low)


def test_without_affinities_every_patch_keeps_its_own_score() -> None:
    similarity, *_ = inputs()
    eye = torch.eye(N, dtype=torch.float64).expand(2, N, N)
    for score in ("class", "literal"): torch.testing.assert_close(score_matrix(similarity, score=score), similarity)
    torch.testing.assert_close(transport_cam(similarity, None, None, (H, W)), transport_cam(similarity, eye, None, (H, W)))


def test_one_picture_is_a_batch_of_one_and_classes_may_be_indices() -> None:
    similarity, smoothed, inverse = inputs()
    expected = transport_cam(similarity[:1], smoothed[:1], inverse[:1], (H, W), PRESENT[:1], **EXACT)
    for present in (PRESENT[0], [0, 1, 3, 4], PRESENT[0].numpy()):
        torch.testing.assert_close(transport_cam(similarity[0], smoothed[0], inverse[0], (H, W), present, **EXACT), expected)
    with pytest.raises(InputError, match=r"similarity \(6,\): give \(B, N, K\)"): score_matrix(similarity[0, 0])


def test_the_background_competes_in_every_picture() -> None:
    cam, present = torch.rand(2, K, H, W, dtype=torch.float64), PRESENT
    similarity = map_similarity(cam * present[..., None, None])
    torch.testing.assert_close(similarity[..., -1], background_score(cam * present[..., None, None]).flatten(1))
    _, smoothed, inverse = inputs()
    maps = transport_maps(similarity, smoothed, inverse, (H, W), present, epsilon=0.05)
    everybody = torch.cat([present, torch.ones(2, 1, dtype=torch.bool)], 1)
    torch.testing.assert_close(maps, transport_cam(similarity, smoothed, inverse, (H, W), everybody, epsilon=0.05))
    assert (maps[:, -1].amax((-2, -1)) == 1).all() and not maps[:, :-1][~present].any()


@pytest.mark.cuda
def test_cuda_equals_cpu() -> None:
    arguments = inputs(torch.float32)
    expected = transport_cam(*arguments, (H, W), PRESENT, **EXACT | {"tolerance": 1e-5})
    found = transport_cam(*(a.cuda() for a in arguments), (H, W), PRESENT.cuda(), **EXACT | {"tolerance": 1e-5})
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-3)


def test_similarity_of_one_picture_and_of_all_classes() -> None:
    cosines, labels = cosines_and_labels()
    expected = similarity_matrix(cosines[:1], labels[:1])
    torch.testing.assert_close(similarity_matrix(cosines[0], labels[0]), expected)
    everybody = similarity_matrix(cosines[:, :4])
    torch.testing.assert_close(everybody, similarity_matrix(cosines[:, :4], torch.ones(2, 4, dtype=torch.bool)))
    with pytest.raises(InputError, match=r"cosines \(4, 5\): give \(B, K \+ Kb, h, w\)"): similarity_matrix(cosines[0, 0])
