"""Prototypes and rectification: equal to slow loops, exactly nothing at full pass, gradients only where they belong."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from freqseg.files import InputError
from freqseg.prototypes import (SELECTIONS, FrequencyRectification, attenuated, attenuation_gap, class_prototypes, rectification_loss,
                                unit_vectors)
from freqseg.spectra import high_frequency_share, split_bands

few = settings(max_examples=20)
seeds = st.integers(0, 2**31)
cutoffs = st.sampled_from((0.0, 0.1, 0.25, 0.4, 0.49))
shapes = st.sampled_from(("square", "disc"))

def scene(seed, batch=2, dim=6, classes=4, grid=(5, 6), dtype=torch.float64):
    "Random tokens, maps scaled to reach 1, and which classes are present."
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, dim, *grid, generator=random, dtype=dtype)
    cam = torch.rand(batch, classes, *grid, generator=random, dtype=dtype)
    cam = cam / cam.amax((-2, -1), keepdim=True)
    return tokens, cam, torch.rand(batch, classes, generator=random) < 0.6

def parts(tokens, cam, present, mu=0.25, shape="square"):
    "Every step of the rectification, one after the other."
    low, _ = split_bands(tokens, mu, shape)
    prototypes, has_prototype = class_prototypes(tokens, cam, present)
    gap = attenuation_gap(tokens, low, prototypes)
    return low, prototypes, has_prototype, gap, attenuated(gap, has_prototype)

def cosine(a, b):
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))

def slow_rectification(tokens, cam, present, mu, shape, threshold=0.7):
    "The definition, one image, one class and one token at a time: loss, gaps and selection."
    low = split_bands(tokens, mu, shape)[0].numpy()
    tokens, cam = tokens.numpy(), cam.numpy()
    places = [(i, j) for i in range(cam.shape[2]) for j in range(cam.shape[3])]
    gap, chosen, images = np.zeros(cam.shape), np.zeros(cam.shape, bool), []
    for b in range(len(tokens)):
        classes = []
        for c in range(cam.shape[1]):
            sure = [tokens[b, :, i, j] for i, j in places if cam[b, c, i, j] > threshold]
            if not present[b, c] or not sure: continue
            p = sum(sure) / len(sure)
            for i, j in places: gap[b, c, i, j] = abs(cosine(tokens[b, :, i, j], p) - cosine(low[b, :, i, j], p))
            chosen[b, c] = gap[b, c] > gap[b, c].mean()
            costs = [1 - cosine(tokens[b, :, i, j], low[b, :, i, j]) for i, j in places if chosen[b, c, i, j]]
            classes.append(sum(costs) / len(costs) if costs else 0.0)
        images.append(sum(classes) / len(classes) if classes else 0.0)
    return sum(images) / len(images), torch.from_numpy(gap), torch.from_numpy(chosen)


# ---- against the definition -----------------------------------------------------------------------------------------

@few
@given(seeds, cutoffs, shapes)
def test_the_module_equals_a_loop_over_images_classes_and_tokens(seed, mu, shape):
    tokens, cam, present = scene(seed)
    result = FrequencyRectification(mu, shape)(tokens, cam, present)
    loss, gap, chosen = slow_rectification(tokens, cam, present, mu, shape)
    assert float(result.loss) == pytest.approx(loss, abs=1e-12)
    assert torch.allclose(result.gap, gap, atol=1e-12) and torch.equal(result.selected, chosen)

@few
@given(seeds, st.floats(0.0, 0.95))
def test_a_prototype_is_the_mean_of_the_tokens_above_the_threshold(seed, threshold):
    tokens, cam, present = scene(seed)
    prototypes, has_prototype = class_prototypes(tokens, cam, present, threshold)
    assert torch.equal(has_prototype, present)   # every map reaches 1
    for b, c in has_prototype.nonzero().tolist():
        assert torch.allclose(prototypes[b, c], tokens[b][:, cam[b, c] > threshold].mean(1), atol=1e-12)
    assert not prototypes[~has_prototype].any()

def test_a_map_below_the_threshold_has_no_prototype():
    tokens, cam, _ = scene(0)
    cam[0, 1] *= 0.7
    prototypes, has_prototype = class_prototypes(tokens, cam)
    assert not has_prototype[0, 1] and not prototypes[0, 1].any() and has_prototype.sum() == has_prototype.numel() - 1

def test_the_module_bundles_the_single_steps():
    inputs = scene(3)
    low, prototypes, has_prototype, gap, chosen = parts(*inputs)
    result = FrequencyRectification(0.25, weight=3.0)(*inputs)
    for ours, theirs in ((result.low, low), (result.high, inputs[0] - low), (result.prototypes, prototypes), (result.has_prototype, has_prototype),
                         (result.gap, gap), (result.selected, chosen)):
        assert torch.equal(ours, theirs)
    assert torch.equal(result.loss, 3 * rectification_loss(inputs[0], low, chosen, has_prototype))
    assert not list(FrequencyRectification().parameters()) and "mu=0.25" in repr(FrequencyRectification(0.25))


# ---- invariants -----------------------------------------------------------------------------------------------------

@few
@given(seeds, shapes, st.sampled_from((torch.float32, torch.float64, torch.bfloat16)), st.sampled_from(SELECTIONS))
def test_full_pass_gives_gap_0_and_loss_0_exactly(seed, shape, dtype, select):
    tokens, cam, present = scene(seed)
    tokens = tokens.to(dtype).requires_grad_()
    result = FrequencyRectification(0.5, shape, select=select)(tokens, cam, present)
    result.loss.backward()
    assert result.loss == 0 and not result.gap.any() and not result.selected.any() and not result.high.any()
    assert not tokens.grad.any()

@few
@given(seeds)
def test_forcing_a_selection_at_full_pass_still_costs_nothing(seed):
    tokens, _, present = scene(seed)
    everything = torch.ones(*present.shape, *tokens.shape[2:], dtype=torch.bool)
    assert rectification_loss(tokens, tokens.clone(), everything, present) == 0

@few
@given(seeds, cutoffs)
def test_no_gradient_reaches_the_low_pass_version_or_the_prototypes(seed, mu):
    tokens, cam, present = scene(seed)
    tokens.requires_grad_(); cam.requires_grad_()
    low, prototypes, has_prototype, gap, chosen = parts(tokens, cam, present, mu)
    low.retain_grad()
    loss = rectification_loss(tokens, low, chosen, has_prototype)
    loss.backward()
    assert low.requires_grad and low.grad is None and cam.grad is None
    assert not prototypes.requires_grad and not gap.requires_grad
    fixed = tokens.detach().clone().requires_grad_()   # the gradient is that for a target which is a constant
    rectification_loss(fixed, low.detach(), chosen, has_prototype).backward()
    assert torch.equal(tokens.grad, fixed.grad)

@few
@given(seeds)
def test_only_selected_tokens_get_a_gradient(seed):
    tokens, cam, present = scene(seed)
    tokens.requires_grad_()
    result = FrequencyRectification(0.25)(tokens, cam, present)
    result.loss.backward()
    assert torch.equal(tokens.grad.norm(dim=1) > 0, result.selected.any(1))

@few
@given(seeds)
def test_absent_classes_contribute_nothing(seed):
    tokens, cam, present = scene(seed)
    module = FrequencyRectification(0.25)
    with_absent, scrambled = module(tokens, cam, present), cam.clone()
    scrambled[~present] = torch.rand(int((~present).sum()), *cam.shape[2:], dtype=cam.dtype)
    assert torch.equal(module(tokens, scrambled, present).loss, with_absent.loss)
    assert not with_absent.selected[~present].any() and not with_absent.gap[~present].any()
    alone = [module(tokens[b:b + 1], cam[b:b + 1, present[b]]).loss for b in range(len(tokens))]   # the absent ones left out altogether
    assert torch.allclose(with_absent.loss, torch.stack(alone).mean(), atol=1e-12)

def test_nobody_present_gives_0_and_a_gradient_of_0():
    tokens, cam, present = scene(1)
    tokens.requires_grad_()
    loss = FrequencyRectification()(tokens, cam, torch.zeros_like(present)).loss
    loss.backward()
    assert loss == 0 and not tokens.grad.any()

@few
@given(seeds)
def test_classes_that_share_a_patch_each_select_for_themselves(seed):
    tokens, cam, _ = scene(seed, classes=3)
    together = FrequencyRectification(0.25)(tokens, cam)
    for c in range(3):
        assert torch.equal(together.selected[:, c:c + 1], FrequencyRectification(0.25)(tokens, cam[:, c:c + 1]).selected)

def test_one_patch_with_two_classes_is_selected_by_both():
    tokens, cam, _ = scene(0, batch=1, classes=1)
    twice = cam.repeat(1, 2, 1, 1)
    result = FrequencyRectification(0.25)(tokens, twice)
    assert result.selected.sum(1).max() == 2
    assert torch.allclose(result.loss, FrequencyRectification(0.25)(tokens, cam).loss)   # a mean over classes, not a sum

@few
@given(seeds)
def test_the_order_of_classes_and_images_does_not_matter(seed):
    tokens, cam, present = scene(seed, batch=3)
    classes, images = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    module = FrequencyRectification(0.25)
    one, other = module(tokens, cam, present), module(tokens[images], cam[images][:, classes], present[images][:, classes])
    assert torch.equal(one.selected[images][:, classes], other.selected) and torch.allclose(one.loss, other.loss, atol=1e-12)

@few
@given(seeds, st.floats(1e-3, 1e3))
def test_selection_and_loss_do_not_depend_on_the_length_of_all_tokens(seed, factor):
    tokens, cam, present = scene(seed)
    module = FrequencyRectification(0.25)
    one, other = module(tokens, cam, present), module(factor * tokens, cam, present)
    assert torch.equal(one.selected, other.selected) and torch.allclose(one.loss, other.loss, atol=1e-10)

@few
@given(seeds, cutoffs)
def test_gap_and_loss_stay_in_their_range(seed, mu):
    result = FrequencyRectification(mu)(*scene(seed))
    assert result.gap.min() >= 0 and result.gap.max() <= 2 + 1e-12 and 0 <= result.loss <= 2 + 1e-12

@pytest.mark.parametrize("seed", range(2))
def test_gradients_are_those_of_finite_differences(seed):
    tokens, cam, present = scene(seed, dim=3, grid=(3, 4))
    present[:, 0] = True
    low, _, has_prototype, _, chosen = parts(tokens, cam, present)
    assert torch.autograd.gradcheck(lambda x: rectification_loss(x, low, chosen, has_prototype), tokens.requires_grad_(), atol=1e-6)


# ---- selection ------------------------------------------------------------------------------------------------------

@given(st.floats(1e-6, 2.0), st.integers(2, 40))
def test_a_constant_gap_selects_nothing_above_its_mean(value, side):
    gap = torch.full((1, 1, side, side), value)
    assert not attenuated(gap, torch.ones(1, 1, dtype=torch.bool)).any()

@few
@given(seeds, st.floats(0.01, 1.0))
def test_a_share_selects_the_highest_gaps_and_just_so_many(seed, share):
    _, gap, has_prototype = scene(seed)
    chosen = attenuated(gap, has_prototype, "share", share)
    assert (chosen.sum((-2, -1))[has_prototype] == math.ceil(share * 30 - 1e-6)).all() and not chosen[~has_prototype].any()
    for b, c in has_prototype.nonzero().tolist():
        rest = gap[b, c][~chosen[b, c]]
        assert not len(rest) or gap[b, c][chosen[b, c]].min() >= rest.max()


# ---- what it does ---------------------------------------------------------------------------------------------------

def test_descending_the_loss_lowers_the_high_frequency_share_of_free_tokens():
    tokens, cam, present = scene(0, dim=8, grid=(8, 8))
    present[:, 0] = True
    module, start = FrequencyRectification(0.25), tokens.clone()
    first = module(tokens, cam, present)
    chosen = first.selected.any(1)

    def high(x): return split_bands(x, 0.25)[1].square().sum(1)[chosen].sum() / x.square().sum(1)[chosen].sum()

    tokens.requires_grad_()
    for _ in range(30):
        loss = module(tokens, cam, present).loss
        with torch.no_grad(): tokens -= 40 * torch.autograd.grad(loss, tokens)[0]
    after = tokens.detach()
    assert module(after, cam, present).loss < first.loss / 2 and high(after) < high(start) / 2
    assert high_frequency_share(after).mean() < high_frequency_share(start).mean()


# ---- extreme inputs and low precision -------------------------------------------------------------------------------

@pytest.mark.parametrize("factor", [0.0, 1e-38, 1e-30, 1e-20, 1e20, 1e30])
def test_tokens_of_any_size_give_finite_losses_and_gradients(factor):
    tokens, cam, present = scene(2, dtype=torch.float32)
    tokens = (factor * tokens).requires_grad_()
    low, _, has_prototype, gap, _ = parts(tokens.detach(), cam, present)
    everything = torch.ones_like(cam, dtype=torch.bool)
    loss = rectification_loss(tokens, low, everything, has_prototype)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(gap).all() and not tokens.grad.isnan().any()
    if factor not in (0.0, 1e-38): assert torch.allclose(loss, rectification_loss(tokens / factor, low / factor, everything, has_prototype), atol=1e-5)

def test_single_tokens_of_zero_and_constant_maps_are_harmless():
    tokens, cam, present = scene(4)
    tokens[:, :, 2, 3] = 0
    tokens[1] = 1.0
    tokens.requires_grad_()
    loss = FrequencyRectification(0.25)(tokens, torch.ones_like(cam), present).loss
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(tokens.grad).all() and tokens.grad.abs().max() < 100

@given(st.lists(st.floats(-2.0**127, 2.0**127, width=32), min_size=3, max_size=3))
def test_unit_vectors_have_length_1_or_0(entries):
    vector = torch.tensor([entries])
    expected = 1.0 if vector.abs().max() > 1e-37 else None   # denormal numbers have few digits, or none where they are flushed
    length = float(unit_vectors(vector).norm())
    assert length == pytest.approx(expected, abs=1e-5) if expected else length <= 1.001

def test_bf16_stays_close_to_fp32_and_the_loss_is_fp32():
    tokens, cam, present = scene(5, dim=64, grid=(10, 10), dtype=torch.float32)
    module = FrequencyRectification(0.25)
    full, half = module(tokens, cam, present), module(tokens.bfloat16(), cam.bfloat16(), present)
    assert half.loss.dtype == half.gap.dtype == half.prototypes.dtype == torch.float32 and half.high.dtype == torch.bfloat16
    assert torch.allclose(full.loss, half.loss, rtol=0.05) and torch.allclose(full.gap, half.gap, atol=0.1)

def test_autocast_does_not_cost_precision():
    tokens, cam, present = scene(6, dtype=torch.float32)
    plain = FrequencyRectification(0.25)(tokens, cam, present)
    with torch.autocast("cpu", dtype=torch.bfloat16): cast = FrequencyRectification(0.25)(tokens, cam, present)
    assert torch.equal(plain.loss, cast.loss) and torch.equal(plain.selected, cast.selected)

def test_half_precision_gradients_return_in_the_dtype_of_the_tokens():
    tokens, cam, present = scene(7)
    tokens = tokens.bfloat16().requires_grad_()
    FrequencyRectification(0.25)(tokens, cam, present).loss.backward()
    assert tokens.grad.dtype == torch.bfloat16 and torch.isfinite(tokens.grad).all() and tokens.grad.any()

def test_the_high_frequency_tokens_keep_their_graph_for_the_second_head():
    tokens, cam, present = scene(8)
    FrequencyRectification(0.25)(tokens.requires_grad_(), cam, present).high.square().sum().backward()
    assert torch.allclose(tokens.grad, 2 * split_bands(tokens.detach(), 0.25)[1], atol=1e-12)   # the filter is a projection


# ---- mistakes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, message", [
    ({"mu": -0.1}, "mu=-0.1"), ({"mu": 0.6}, "0 to 0.5"), ({"shape": "circle"}, "'disc'"), ({"threshold": 1.0}, "0.7"),
    ({"weight": -1.0}, "weight"), ({"weight": float("nan")}, "weight"), ({"select": "top"}, "'share'"), ({"share": 0.0}, "share=0.0")])
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(InputError, match=message): FrequencyRectification(**settings)

def test_shapes_that_disagree_are_named():
    tokens, cam, present = scene(0)
    low, prototypes, has_prototype, gap, chosen = parts(tokens, cam, present)
    with pytest.raises(InputError, match="resize the maps"): class_prototypes(tokens, cam[..., :-1])
    with pytest.raises(InputError, match="present"): class_prototypes(tokens, cam, present[:, :2])
    with pytest.raises(InputError, match="low"): attenuation_gap(tokens, low[:1], prototypes)
    with pytest.raises(InputError, match="low"): rectification_loss(tokens, low[:1], chosen, has_prototype)
    with pytest.raises(InputError, match="omega"): rectification_loss(tokens, low, chosen[..., :-1], has_prototype)
    with pytest.raises(InputError, match="has_prototype"): rectification_loss(tokens, low, chosen, has_prototype[:, :2])
    with pytest.raises(InputError, match="has_prototype"): attenuated(gap, has_prototype[:, :2])
    with pytest.raises(InputError, match="select='best'"): attenuated(gap, has_prototype, "best")
    with pytest.raises(InputError, match="share=2"): attenuated(gap, has_prototype, "share", 2)
