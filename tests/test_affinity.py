"""Affinities: symmetric and doubly stochastic, inverse complementary, propagation linear and mass-preserving, boxes right."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from skimage.measure import label, regionprops

from freqseg.affinity import (SOURCES, affinity_request, batched, box_mask, combine_affinities, inverse_affinity, inverse_of, invert_relation,
                              last_blocks, mean_relation, propagate, relations, selective_mean, smoothed_affinity, symmetrise)
from freqseg.clip import Backbone, Features, build_clip
from freqseg.files import InputError
from freqseg.spectra import gaussian_transfer, invert_attention

CONFIG = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 4, "width": 48, "head_width": 16, "patch_size": 8},
          "text_cfg": {"context_length": 8, "vocab_size": 9, "width": 32, "heads": 2, "layers": 1}}
N = 20

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def positive(*shape, seed=0):
    return normal(*shape, seed=seed).exp()

@pytest.fixture(scope="module")
def features():
    "Two images on a 4 x 5 grid, everything recorded in all four blocks, attention per head."
    clip = Backbone(build_clip(CONFIG), "tiny", None)
    return clip.encode(normal(2, 3, 32, 40), tokens=range(4), attention=range(4), qkv=range(4), per_head=True)

seeds = st.integers(0, 10_000)


# ---- relations ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source", SOURCES)
def test_relations_are_non_negative_with_rows_of_at_most_one(features, source):
    stack = relations(features, source, layers=3)
    assert stack.shape == (2, 3, N, N) and (stack >= 0).all() and (stack.sum(-1) <= 1 + 1e-5).all()

def test_attention_is_the_plain_slice_without_cls(features):
    assert torch.allclose(relations(features, layers=(1, -1))[:, 1], features.attention[3].mean(1)[:, 1:, 1:])

@pytest.mark.parametrize("source,name", [("qq", "queries"), ("kk", "keys"), ("vv", "values")])
def test_like_with_like_is_the_mean_softmax_over_heads(features, source, name):
    x = getattr(features, name)[2][:, :, 1:]
    expected = (x @ x.mT / 16 ** 0.5 / 0.5).softmax(-1)
    assert torch.allclose(relations(features, source, (2,), temperature=0.5)[:, 0], expected.mean(1), atol=1e-5)
    assert torch.allclose(relations(features, source, (2,), heads=[1], temperature=0.5)[:, 0], expected[:, 1], atol=1e-5)

def test_tokens_relate_by_cosine(features):
    x = F.normalize(features.tokens[1].flatten(2).mT, dim=-1)
    assert torch.allclose(relations(features, "tokens", (1,))[:, 0], (x @ x.mT / 0.1).softmax(-1), atol=1e-5)

def test_chosen_heads_average_to_all(features):
    parts = sum(relations(features, heads=[h]) for h in range(3)) / 3
    assert torch.allclose(parts, relations(features), atol=1e-6)

def test_relations_commute_with_a_permutation_of_images(features):
    assert torch.allclose(relations(features).flip(0), relations(Features(features.grid, 4, attention={
        i: a.flip(0) for i, a in features.attention.items()})))

def test_requests_make_the_encoder_record_what_is_needed():
    clip = Backbone(build_clip(CONFIG), "tiny", None)
    for source in SOURCES:
        found = clip.encode(normal(1, 3, 32, 32), joint=False, **affinity_request(clip.depth, source, layers=2))
        assert smoothed_affinity(found, source, layers=2).shape == (1, 16, 16)

def test_the_mean_relation_is_the_mean_of_all_and_leaves_the_features_as_they_are(features):
    before = {block: attention.clone() for block, attention in features.attention.items()}
    for source in SOURCES:
        for layers in (1, 2, 3, (0, 2)):
            assert torch.allclose(mean_relation(features, source, layers), relations(features, source, layers).mean(1), atol=1e-6)
    assert all(torch.equal(features.attention[block], attention) for block, attention in before.items())
    half = Features(features.grid, features.depth, attention={block: attention.bfloat16() for block, attention in before.items()})
    found = mean_relation(half)
    assert found.dtype == torch.float32 and torch.allclose(found, relations(half).float().mean(1), atol=1e-6)

@given(depth=st.integers(1, 24), layers=st.integers(1, 30))
def test_last_blocks_are_the_last(depth, layers):
    assert last_blocks(depth, layers) == tuple(range(depth))[-layers:]
    assert last_blocks(depth, (0, -1)) == (0, depth - 1)

def test_affinity_mistakes_are_named(features):
    lean = Features((4, 5), 4)
    for source in SOURCES:
        with pytest.raises(InputError, match="to encode"): relations(lean, source)
    with pytest.raises(InputError, match="unknown source of affinities 'keys'"): relations(features, "keys")
    with pytest.raises(InputError, match="unknown source of affinities 'keys'"): affinity_request(4, "keys")
    with pytest.raises(InputError, match="temperature=0"): relations(features, "kk", temperature=0)
    with pytest.raises(InputError, match="layers=0: take the relations of at least one"): relations(features, layers=0)
    with pytest.raises(InputError, match="at least one"): mean_relation(features, layers=())
    with pytest.raises(InputError, match="no heads"): relations(features, "tokens", heads=[0])
    with pytest.raises(InputError, match="per_head=True"):
        relations(Features((4, 5), 4, attention={i: a.mean(1) for i, a in features.attention.items()}), heads=[0])
    with pytest.raises(InputError, match="method="): symmetrise(positive(1, 4, 4), "softmax")


# ---- selection of layers --------------------------------------------------------------------------------------------

def test_selection_equals_a_loop_over_images():
    stack, reference = positive(3, 5, 6, 6, seed=1), positive(3, 6, 6, seed=2)
    for b in range(3):
        distance = torch.stack([(reference[b] - layer).sum() for layer in stack[b]])
        expected = stack[b][distance <= distance.mean()].mean(0)
        assert torch.allclose(selective_mean(stack, reference)[b], expected, atol=1e-6)

@given(seeds)
def test_selection_of_equal_layers_is_that_layer(seed):
    layer = positive(2, 1, 4, 4, seed=seed)
    chosen = selective_mean(layer.expand(2, 5, 4, 4), positive(2, 4, 4, seed=seed + 1))
    assert torch.allclose(chosen, layer[:, 0], rtol=1e-5)

def test_without_reference_the_mean_is_plain():
    stack = positive(2, 3, 4, 4)
    assert torch.allclose(selective_mean(stack), stack.mean(1))

def test_reference_multiplies_the_mean_and_gets_no_gradient(features):
    reference = torch.rand(2, N, N).requires_grad_()
    found = smoothed_affinity(features, reference=reference, normalise="average")
    product = selective_mean(relations(features), reference) * reference
    assert torch.allclose(found, (product + product.mT) / 2) and not found.requires_grad


# ---- symmetrising ---------------------------------------------------------------------------------------------------

@settings(max_examples=25)
@given(seeds)
def test_sinkhorn_affinity_is_symmetric_and_doubly_stochastic(seed):
    affinity = symmetrise(positive(2, 9, 9, seed=seed), iterations=500)
    assert torch.allclose(affinity, affinity.mT) and (affinity > 0).all()
    assert (affinity.sum(-1) - 1).abs().max() < 2e-4 and (affinity.sum(-2) - 1).abs().max() < 2e-4

@given(seeds)
def test_a_symmetric_doubly_stochastic_affinity_is_a_fixed_point(seed):
    swaps = torch.eye(6)[torch.randperm(6, generator=torch.Generator().manual_seed(seed))]
    affinity = (0.5 * (swaps + swaps.T) / 2 + 0.5 / 6)[None]
    assert torch.allclose(symmetrise(affinity), affinity, atol=1e-5)

def test_weclip_form_is_three_rounds_of_columns_then_rows_squared():
    affinity = positive(2, 7, 7, seed=3)
    expected = affinity
    for _ in range(3):
        expected = expected / expected.sum(-2, keepdim=True)
        expected = expected / expected.sum(-1, keepdim=True)
    expected = (expected + expected.mT) / 2
    assert torch.allclose(symmetrise(affinity, "weclip"), expected @ expected, atol=1e-5)

@given(seeds)
def test_symmetrising_commutes_with_a_permutation_of_patches(seed):
    affinity, order = positive(1, 8, 8, seed=seed), torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    permuted = symmetrise(affinity[:, order][:, :, order], "weclip")
    assert torch.allclose(permuted, symmetrise(affinity, "weclip")[:, order][:, :, order], atol=1e-5)

@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_a_doubly_stochastic_affinity(features, source):
    affinity = smoothed_affinity(features, source)
    assert (affinity.sum(-1) - 1).abs().max() < 2e-4 and torch.allclose(affinity, affinity.mT)


# ---- inverse --------------------------------------------------------------------------------------------------------

@given(seeds)
def test_attention_and_its_inverse_add_up_to_the_identity(seed):
    attention = normal(2, 12, 12, seed=seed).softmax(-1)
    inverse = invert_attention(attention, (3, 4))
    assert torch.allclose(attention + inverse, torch.eye(12).expand(2, 12, 12), atol=1e-6)
    assert inverse.sum(-1).abs().max() < 1e-5
    constant = propagate(inverse, torch.full((2, 3, 3, 4), 0.7))
    assert constant.abs().max() < 1e-5   # constant features -> 0

@pytest.mark.parametrize("transfer", [None, gaussian_transfer(0.2)])
@pytest.mark.parametrize("source", ["attention", "kk"])
def test_inverse_affinity_is_positive_symmetric_and_doubly_stochastic(features, transfer, source):
    affinity = inverse_affinity(features, source, transfer=transfer, sharpness=3.0)
    assert (affinity > 0).all() and torch.allclose(affinity, affinity.mT)
    assert (affinity.sum(-1) - 1).abs().max() < 2e-4

def test_inverse_affinity_all_pass_equals_the_written_out_form(features):
    mean = relations(features).mean(1)
    written = F.softplus(2 * (torch.eye(N) - mean / mean.sum(-1, keepdim=True))) + 1e-6
    assert torch.allclose(inverse_affinity(features, sharpness=2.0), symmetrise(written), atol=1e-6)

def test_sharpness_raises_the_share_of_the_patch_itself(features):
    own = [inverse_affinity(features, sharpness=s).diagonal(dim1=-2, dim2=-1).mean() for s in (1.0, 4.0, 16.0)]
    assert own[0] < own[1] < own[2]

@settings(max_examples=20)
@given(seeds, st.sets(st.integers(0, 11), max_size=12), st.sampled_from([None, gaussian_transfer(0.2)]))
def test_patches_that_attend_to_cls_alone_are_zero_rows_and_never_nan(seed, alone, transfer):
    relation = normal(2, 12, 12, seed=seed).softmax(-1) * 0.7
    relation[:, sorted(alone)] = 0
    before, inverse = relation.clone(), invert_relation(relation, (3, 4), transfer)
    assert torch.equal(relation, before) and inverse.isfinite().all() and inverse.sum(-1).abs().max() < 1e-5
    if transfer is None: assert not inverse[:, sorted(alone)].any()
    others = [row for row in range(12) if row not in alone]
    plain = invert_attention(relation / relation.sum(-1, keepdim=True).clamp(min=1e-30), (3, 4), transfer)
    assert torch.allclose(inverse[:, others], plain[:, others], atol=1e-6)
    affinity = inverse_of(relation, (3, 4), transfer, sharpness=3.0)
    assert affinity.isfinite().all() and (affinity > 0).all() and (affinity.sum(-1) - 1).abs().max() < 2e-4

def test_features_whose_patches_attend_to_cls_alone_have_an_inverse_affinity_and_maps(features):
    attention = torch.zeros(2, N + 1, N + 1)
    attention[..., 0] = 1
    blind = Features(features.grid, 4, attention={block: attention for block in range(4)})
    affinity = inverse_affinity(blind)
    assert affinity.isfinite().all() and torch.allclose(affinity, torch.full((2, N, N), 1 / N), atol=1e-5)
    assert propagate(affinity, torch.rand(2, 3, 4, 5), walk_steps=2).isfinite().all()

def test_the_sum_of_two_affinities_is_weighted_and_needs_some_weight():
    smoothed, inverse = positive(2, 6, 6), positive(2, 6, 6, seed=1)
    assert torch.allclose(combine_affinities(smoothed, inverse, "sum", 3.0, 1.0), 0.75 * smoothed + 0.25 * inverse)
    assert combine_affinities(smoothed, None, "sum", 0.0, 0.0) is smoothed
    with pytest.raises(InputError, match="both 0"): combine_affinities(smoothed, inverse, "sum", 0.0, 0.0)


# ---- propagation ----------------------------------------------------------------------------------------------------

def test_identity_and_power_zero_leave_the_map_alone():
    cam = torch.rand(2, 3, 4, 5)
    assert torch.allclose(propagate(torch.eye(N).expand(2, N, N), cam, walk_steps=4), cam)
    assert torch.allclose(propagate(positive(2, N, N), cam, walk_steps=0), cam)

@given(seeds, st.integers(1, 4))
def test_power_is_the_matrix_power(seed, power):
    affinity, cam = normal(2, N, N, seed=seed).softmax(-1), torch.rand(2, 3, 4, 5)
    whole = torch.einsum("bij,bkj->bki", torch.linalg.matrix_power(affinity, power), cam.flatten(2)).view_as(cam)
    assert torch.allclose(propagate(affinity, cam, power), whole, atol=1e-5)

@given(seeds)
def test_propagation_is_linear_and_stays_in_range(seed):
    affinity = symmetrise(positive(1, N, N, seed=seed), iterations=500)
    one, two = normalised(seed), normalised(seed + 1)
    assert torch.allclose(propagate(affinity, one + 2 * two), propagate(affinity, one) + 2 * propagate(affinity, two), atol=1e-5)
    assert propagate(affinity, one).max() <= 1 + 1e-3 and propagate(affinity, one).min() >= 0
    assert torch.allclose(propagate(affinity, one).sum(), one.sum(), rtol=1e-3)   # doubly stochastic: no evidence is made or lost

def normalised(seed):
    return torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))

def test_uniform_affinity_gives_the_mean():
    cam = torch.rand(2, 3, 4, 5)
    spread = propagate(torch.full((2, N, N), 1 / N), cam)
    assert torch.allclose(spread, cam.mean((-2, -1), keepdim=True).expand_as(cam), atol=1e-6)

def test_classes_travel_independently():
    affinity, cam = positive(2, N, N), torch.rand(2, 3, 4, 5)
    assert torch.allclose(propagate(affinity, cam)[:, 1:2], propagate(affinity, cam[:, 1:2]))

def test_rows_are_queries():
    affinity, cam = torch.zeros(1, N, N), torch.zeros(1, 1, 4, 5)
    affinity[0, 3, 7], cam[0, 0, 1, 2] = 1.0, 0.8   # patch 3 listens to patch 7 = (1, 2)
    assert propagate(affinity, cam)[0, 0, 0, 3] == 0.8 and propagate(affinity, cam).sum() == 0.8

def test_propagation_mistakes_are_named():
    with pytest.raises(InputError, match=r"expected \(2, 20, 20\)"): propagate(torch.eye(16)[None], torch.rand(2, 3, 4, 5))
    with pytest.raises(InputError, match="walk_steps=-1"): propagate(torch.eye(N).expand(2, N, N), torch.rand(2, 3, 4, 5), -1)


# ---- boxes ----------------------------------------------------------------------------------------------------------

@settings(max_examples=40)
@given(seeds, st.sampled_from([0.4, 0.7, 0.9]), st.booleans())
def test_boxes_equal_regionprops_map_by_map(seed, threshold, diagonal):
    cam = normal(2, 3, 6, 7, seed=seed).relu()
    mask = box_mask(cam, threshold, diagonal)
    for b in range(2):
        for k in range(3):
            strong, expected = (cam[b, k] >= threshold * cam[b, k].max()).numpy(), np.zeros((6, 7))
            for region in regionprops(label(strong, connectivity=2 if diagonal else 1)):
                top, left, bottom, right = region.bbox
                expected[top:bottom, left:right] = 1
            assert np.array_equal(mask[b, k].numpy(), expected)

@given(seeds, st.floats(0.05, 0.95))
def test_boxes_hold_the_maximum_and_shrink_with_the_threshold(seed, threshold):
    cam = torch.rand(2, 2, 5, 6, generator=torch.Generator().manual_seed(seed))
    mask = box_mask(cam, threshold)
    assert (mask[cam == cam.amax((-2, -1), keepdim=True)] == 1).all() and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert (box_mask(cam, threshold, diagonal=True)[cam >= threshold * cam.amax((-2, -1), keepdim=True)] == 1).all()

def test_empty_maps_have_no_box_and_neighbouring_maps_do_not_touch():
    cam = torch.zeros(1, 3, 4, 4)
    cam[0, 0, 0, 0], cam[0, 2, 3, 3] = 1.0, 1.0
    mask = box_mask(cam)
    assert mask[0, 1].sum() == 0 and mask[0, 0].sum() == 1 and mask[0, 2].sum() == 1

def test_the_box_holds_what_leaves():
    cam, box = torch.rand(1, 1, 4, 5), torch.zeros(1, 1, 4, 5)
    assert propagate(positive(1, N, N), cam, box=box).abs().max() == 0
    assert torch.allclose(propagate(positive(1, N, N), cam, box=torch.ones_like(box)), propagate(positive(1, N, N), cam))

def test_one_picture_is_a_batch_of_one():
    affinity, cam = positive(1, N, N), torch.rand(1, 3, 4, 5)
    expected = propagate(affinity, cam, 2, box_mask(cam))
    for given in (propagate(affinity[0], cam[0], 2, box_mask(cam[0])), propagate(affinity, cam[0].numpy(), 2, box_mask(cam))):
        assert torch.equal(given, expected)
    with pytest.raises(InputError, match=r"maps \(4, 5\): give \(B, K, h, w\)"): propagate(affinity, cam[0, 0])
    with pytest.raises(InputError, match=r"things \(2,\)"): batched(torch.zeros(2), "(B, K, h, w)", "things")
