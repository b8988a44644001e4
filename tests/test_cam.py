"""Activation maps: gradients are autograd's and pytorch_grad_cam's, bands add up, labels follow the scores."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from freqseg.affinity import box_mask
from freqseg.cam import (as_present, background_score, band_cams, contrast_direction, cosine_map, grad_cam, grad_cam_evidence, grad_cam_weights,
                         intra_attention, intra_correlation, last_qkv, normalise_cam, patch_activations, patch_embeddings, patch_text_similarity,
                         pseudo_labels, refine_cam, side_path, similarity_evidence, similarity_request, value_path)
from freqseg.clip import Backbone, attention_weights, build_clip, merge_heads
from freqseg.files import InputError
from freqseg.spectra import band_stack

CONFIG = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8},
          "text_cfg": {"context_length": 8, "vocab_size": 9, "width": 32, "heads": 2, "layers": 1}}

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def directions(count, seed, dim=24):
    return F.normalize(normal(count, dim, seed=seed), dim=-1)

@pytest.fixture(scope="module")
def clip():
    return Backbone(build_clip(CONFIG), "tiny", None)

@pytest.fixture(scope="module", params=["plain", "qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "ls_init_value"])
def variant(request):
    "A backbone of every block variant of open_clip, with gains that differ from their neutral initial values."
    option = {} if request.param == "plain" else {request.param: 0.3 if request.param == "ls_init_value" else True}
    model = build_clip(CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | option})
    with torch.no_grad():
        for parameter in model.visual.parameters(): parameter.add_(0.05 * torch.randn_like(parameter))
    return Backbone(model, request.param, None)

@pytest.fixture(scope="module")
def scene(clip):
    "Three images on a 4 x 6 grid, five classes, some present, three background prompts."
    features = clip.encode(normal(3, 3, 32, 48), tokens=range(3), qkv=range(3))
    present = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 0, 1, 1]], dtype=torch.bool)
    return features, directions(5, 1), present, directions(3, 2)


# ---- GradCAM --------------------------------------------------------------------------------------------------------

def naive_weights(clip, features, text, present, background, pool="patches"):
    "One backward pass per image and class, through the softmax as written."
    out = torch.zeros(*present.shape, 48)
    for b, c in present.nonzero().tolist():
        ln1 = features.last_ln1[b:b + 1].clone().requires_grad_()
        tokens = clip.last_block(ln1, features.last_residual[b:b + 1])
        z = clip.project(tokens[:, 1:]).mean(1) if pool == "patches" else clip.project(tokens[:, :1])[:, 0]
        used = [k for k in range(len(text)) if present[b, k]]
        prompts = torch.cat([text[used], background])
        y = (clip.logit_scale * F.normalize(z, dim=-1) @ prompts.T).softmax(-1)[0, used.index(c)]
        out[b, c] = torch.autograd.grad(y, ln1)[0][0, 1:].mean(0)
    return out

@pytest.mark.parametrize("pool", ["patches", "cls"])
def test_batched_weights_equal_one_backward_pass_per_class(variant, scene, pool):
    features = variant.encode(normal(3, 3, 32, 48))
    ours = grad_cam_weights(variant, features, *scene[1:], pool=pool, exact=True)
    theirs = naive_weights(variant, features, *scene[1:], pool=pool)
    assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))

def test_weights_do_not_depend_on_the_chunk(clip, scene):
    assert torch.allclose(grad_cam_weights(clip, *scene, chunk=1), grad_cam_weights(clip, *scene, chunk=8), atol=1e-5)

def test_leaving_out_the_positive_factor_keeps_the_map(clip, scene):
    lean, exact = grad_cam(clip, *scene), grad_cam(clip, *scene, exact=True, eps=1e-20)
    assert torch.allclose(lean, exact, atol=1e-4)

class Scores(nn.Module):
    "The tower as pytorch_grad_cam wants it: pixels to class scores."
    def __init__(self, clip, prompts):
        super().__init__()
        self.visual, self.prompts, self.scale = copy.deepcopy(clip.model.visual).requires_grad_(True), prompts, clip.logit_scale
    def forward(self, images):
        x = self.visual.ln_post(self.visual.transformer(self.visual._embeds(images))) @ self.visual.proj
        return (self.scale * F.normalize(x[:, 1:].mean(1), dim=-1) @ self.prompts.T).softmax(-1)

def test_maps_equal_pytorch_grad_cam(clip):
    images, text, background = normal(2, 3, 32, 32), directions(3, 5), directions(4, 6)
    ours = grad_cam(clip, clip.encode(images), text, torch.ones(2, 3, dtype=torch.bool), background)
    ours = normalise_cam(F.interpolate(ours, size=(32, 32), mode="bilinear", align_corners=False))
    model = Scores(clip, torch.cat([text, background]))
    peer = GradCAM(model, [model.visual.transformer.resblocks[-1].ln_1], lambda t: t[:, 1:].mT.unflatten(2, (4, 4)))
    theirs = np.stack([peer(images, [ClassifierOutputTarget(c)] * 2) for c in range(3)], 1)
    assert np.abs(ours.numpy() - theirs).max() < 1e-3

def test_maps_are_in_range_and_absent_classes_are_zero(clip, scene):
    cam, present = grad_cam(clip, *scene), scene[2]
    assert cam.shape == (3, 5, 4, 6) and cam.min() >= 0 and cam.max() <= 1
    assert (cam[~present] == 0).all() and grad_cam_weights(clip, *scene)[~present].abs().max() == 0

def test_absent_classes_do_not_change_the_present_ones(clip, scene):
    features, text, present, background = scene
    used = present[1].nonzero().flatten()
    alone = clip.encode(normal(3, 3, 32, 48)[1:2])
    small = grad_cam(clip, alone, text[used], torch.ones(1, len(used), dtype=torch.bool), background)
    assert torch.allclose(small[0], grad_cam(clip, *scene)[1, used], atol=1e-4)

def test_maps_follow_a_permutation_of_classes(clip, scene):
    features, text, present, background = scene
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = grad_cam(clip, features, text[order], present[:, order], background)
    assert torch.allclose(permuted, grad_cam(clip, *scene)[:, order], atol=1e-4)

def test_image_without_classes_gives_zero_maps(clip, scene):
    features, text, present, background = scene
    assert (grad_cam(clip, features, text, torch.zeros_like(present), background) == 0).all()
    assert (grad_cam(clip, features, text, torch.zeros_like(present)) == 0).all()

def test_a_single_class_without_background_still_has_a_finite_map(clip, scene):
    features, text, _, _ = scene
    evidence = grad_cam_evidence(clip, features, text[:1], torch.ones(3, 1, dtype=torch.bool))
    assert torch.isfinite(evidence).all() and (evidence.abs().amax((-2, -1)) > 0).all()

@given(scale=st.floats(1, 1e4), seed=st.integers(0, 50))
def test_certainty_does_not_destroy_the_direction(scale, seed):
    text = directions(4, seed)
    direction = contrast_direction(text[:2], text, torch.ones(2, 4, dtype=torch.bool), None, scale)
    assert torch.isfinite(direction).all()
    assert torch.allclose(direction[0, 1:].norm(dim=-1), torch.ones(3), atol=1e-3)

def test_direction_is_orthogonal_to_the_embedding():
    z, text = normal(3, 24, seed=4), directions(4, 8)
    direction = contrast_direction(z, text, torch.ones(3, 4, dtype=torch.bool), directions(2, 9), 100.0)
    assert (direction @ z[:, :, None]).abs().max() < 1e-4   # a cosine does not change along z

def test_only_the_last_block_is_run_again(clip, scene):
    ran = []
    handles = [b.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(clip.blocks)]
    grad_cam(clip, *scene)
    for handle in handles: handle.remove()
    assert ran == [2]

@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_maps_do_not_need_a_caller_with_gradients(clip, mode):
    text, present = directions(2, 3), torch.ones(1, 2, dtype=torch.bool)
    expected = grad_cam(clip, clip.encode(normal(1, 3, 32, 32)), text, present)
    with mode(): cam = grad_cam(clip, clip.encode(normal(1, 3, 32, 32), joint=False, last_input=True), text, present)
    assert torch.allclose(cam, expected, atol=1e-5) and not cam.requires_grad
    assert all(p.grad is None for p in clip.parameters())

def test_gradcam_mistakes_are_named(clip, scene):
    features, text, present, background = scene
    with pytest.raises(InputError, match="last_input=True"): grad_cam(clip, clip.encode(normal(1, 3, 32, 32), joint=False), text, present)
    with pytest.raises(InputError, match=r"bool \(3, 5\)"): grad_cam(clip, features, text, present[:, :2])
    with pytest.raises(InputError, match=r"bool \(3, 5\)"): grad_cam(clip, features, text, present.float())
    with pytest.raises(InputError, match="pool="): grad_cam(clip, *scene, pool="max")


# ---- patch-text similarity ------------------------------------------------------------------------------------------

def test_value_path_is_attention_replaced_by_the_identity(clip, scene):
    block, ln1 = clip.blocks[-1], scene[0].last_ln1
    attn = block.attn
    value = F.linear(ln1, attn.in_proj_weight[96:], attn.in_proj_bias[96:])
    visual = clip.model.visual
    expected = visual.ln_post(attn.out_proj(value)) @ visual.proj
    assert torch.allclose(value_path(clip, scene[0]).flatten(2).mT, expected[:, 1:], atol=1e-5)

def test_value_path_of_one_token_with_residual_is_the_block_itself(clip):
    x = normal(1, 1, 48)
    features = clip.encode(normal(1, 3, 8, 8))
    features.last_residual, features.last_ln1 = x.repeat(1, 2, 1), clip.blocks[-1].ln_1(x).repeat(1, 2, 1)
    expected = clip.project(clip.block(-1, x))[0, 0]
    assert torch.allclose(value_path(clip, features, residual=True)[0, :, 0, 0], expected, atol=1e-5)

def test_intra_attention_is_row_stochastic_and_prefers_like_with_like(clip, scene):
    attention = intra_attention(scene[0], -1)
    assert attention.shape == (3, 3, 25, 25) and torch.allclose(attention.sum(-1), torch.ones(3, 3, 25), atol=1e-5)
    assert attention.diagonal(dim1=-2, dim2=-1).mean() > attention.mean()

def test_intra_correlation_of_all_blocks_without_residual_sums_the_branches(clip, scene):
    features = scene[0]
    x = 0
    for i, block in enumerate(clip.blocks):
        weights = sum((p @ p.mT / 4).softmax(-1) for p in (features.queries[i], features.keys[i], features.values[i])) / 3
        x = x + block.attn.out_proj((weights @ features.values[i]).transpose(1, 2).flatten(2))
    expected = clip.project(x[:, 1:]).mT.unflatten(2, (4, 6))
    assert torch.allclose(intra_correlation(clip, features, blocks=9, residual=False), expected, atol=1e-5)

def test_intra_correlation_starts_from_the_tokens_before_its_blocks(clip, scene):
    features = scene[0]
    branch = intra_attention(features, 2) @ features.values[2]
    x = features.tokens[1].flatten(2).mT + clip.blocks[2].attn.out_proj(branch.transpose(1, 2).flatten(2))[:, 1:]
    assert torch.allclose(intra_correlation(clip, features, blocks=1).flatten(2).mT, clip.project(x), atol=1e-5)

@pytest.mark.parametrize("source", ["value", "intra", "final"])
@pytest.mark.parametrize("normalise", ["minmax", "softmax"])
def test_similarity_is_in_range_and_zero_where_absent(clip, scene, source, normalise):
    _, text, present, background = scene
    features = clip.encode(normal(3, 3, 32, 48), **similarity_request(clip, source, blocks=2))
    options = {"blocks": 2} if source == "intra" else {}
    cam = patch_text_similarity(clip, features, text, present, background, source, normalise, **options)
    assert cam.shape == (3, 5, 4, 6) and cam.min() >= 0 and cam.max() <= 1 and (cam[~present] == 0).all()
    assert torch.isfinite(cam).all() and (cam[present].amax((-2, -1)) > 0).all()

def test_softmax_similarity_sums_to_one_over_the_present_classes(clip, scene):
    features, text, present, background = scene
    alone = patch_text_similarity(clip, features, text, present, normalise="softmax")
    assert torch.allclose(alone.sum(1), torch.ones(3, 4, 6), atol=1e-5)
    assert (patch_text_similarity(clip, features, text, present, background, normalise="softmax").sum(1) < 1).all()

def test_cosines_ignore_the_length_of_patches():
    patches, text = normal(2, 24, 3, 4), directions(5, 1)
    assert torch.allclose(cosine_map(patches, text), cosine_map(patches * 7, text), atol=1e-6)
    assert cosine_map(patches, text).abs().max() <= 1 + 1e-6

def test_similarity_mistakes_are_named(clip, scene):
    lean = clip.encode(normal(1, 3, 32, 32), joint=False)
    with pytest.raises(InputError, match="joint=True"): patch_embeddings(clip, lean, "final")
    with pytest.raises(InputError, match="last_input"): patch_embeddings(clip, lean, "value")
    with pytest.raises(InputError, match="qkv="): patch_embeddings(clip, lean, "intra")
    with pytest.raises(InputError, match="source="): patch_embeddings(clip, lean, "attention")
    with pytest.raises(InputError, match="source="): similarity_request(clip, "attention")
    with pytest.raises(InputError, match="normalise="): patch_text_similarity(clip, scene[0], scene[1], normalise="max")


# ---- normalisation and pseudo-labels --------------------------------------------------------------------------------

maps = st.integers(0, 10_000).map(lambda seed: normal(2, 3, 4, 5, seed=seed))

@given(maps)
def test_normalised_maps_span_zero_to_one(evidence):
    cam = normalise_cam(evidence, positive=False)
    assert torch.allclose(cam.amin((-2, -1)), torch.zeros(2, 3)) and torch.allclose(cam.amax((-2, -1)), torch.ones(2, 3), atol=1e-5)

@given(maps, st.floats(0.1, 100))
def test_normalisation_ignores_positive_scale(evidence, factor):
    assert torch.allclose(normalise_cam(evidence), normalise_cam(evidence * factor), atol=1e-4)

def test_constant_maps_become_zero():
    assert (normalise_cam(torch.full((1, 2, 3, 3), 0.7)) == 0).all()

@given(maps)
def test_more_power_means_less_background(evidence):
    cam = normalise_cam(evidence)
    assert (background_score(cam, 3.0) <= background_score(cam, 1.0) + 1e-6).all()
    assert torch.allclose(background_score(cam)[:, 0], 1 - cam.amax(1))

def test_labels_follow_the_largest_score():
    cam = torch.tensor([[[[0.9, 0.2, 0.6]], [[0.1, 0.3, 0.7]]]])
    assert pseudo_labels(cam).tolist() == [[[1, 0, 2]]]
    assert pseudo_labels(cam, threshold=0.65).tolist() == [[[1, 0, 2]]]
    assert pseudo_labels(cam, threshold=0.25).tolist() == [[[1, 2, 2]]]
    assert pseudo_labels(cam, threshold=0.25, ignore=(0.25, 0.65)).tolist() == [[[1, 255, 2]]]
    assert pseudo_labels(cam, torch.tensor([[True, False]])).tolist() == [[[1, 0, 1]]]
    assert pseudo_labels(cam).dtype == torch.int64

@given(maps, st.integers(4, 17), st.integers(5, 19))
def test_labels_have_the_size_asked_and_only_present_classes(evidence, height, width):
    present = torch.tensor([[True, False, True], [False, False, False]])
    labels = pseudo_labels(normalise_cam(evidence), present, (height, width))
    assert labels.shape == (2, height, width) and set(labels[0].unique().tolist()) <= {0, 1, 3} and (labels[1] == 0).all()

def test_label_mistakes_are_named():
    with pytest.raises(InputError, match="low, high"): pseudo_labels(torch.rand(1, 2, 3, 3), ignore=(0.5, 0.2))
    assert torch.equal(background_score(torch.eye(3)[None]), background_score(torch.eye(3)[None, None]))
    with pytest.raises(InputError, match=r"bool \(1, 2\)"): pseudo_labels(torch.rand(1, 2, 3, 3), torch.ones(1, 3, dtype=torch.bool))


# ---- bands ----------------------------------------------------------------------------------------------------------

@settings(max_examples=15)
@given(edges=st.lists(st.floats(0.02, 0.48), min_size=1, max_size=4, unique=True).map(sorted), shape=st.sampled_from(["square", "disc"]))
def test_bands_sum_to_the_evidence(clip, scene, edges, shape):
    evidence = grad_cam_evidence(clip, *scene)
    bands = band_cams(evidence, edges, shape)
    assert len(bands) == len(edges) + 1
    assert torch.allclose(bands.sum(0), evidence, atol=1e-5 * float(evidence.abs().max()))

def test_filtering_the_features_first_gives_the_same_bands(clip, scene):
    weights, activations = grad_cam_weights(clip, *scene), patch_activations(scene[0])
    long_way = torch.einsum("bkd,nbdhw->nbkhw", weights, band_stack(activations, (0.1, 0.25)))
    bands = band_cams(grad_cam_evidence(clip, *scene), (0.1, 0.25))
    assert torch.allclose(long_way, bands, atol=1e-5 * float(bands.abs().max()) * 10)

@pytest.mark.parametrize("source", ["value", "final"])
def test_similarity_bands_sum_to_the_cosines(clip, scene, source):
    embeddings = patch_embeddings(clip, scene[0], source)
    numerator, length = similarity_evidence(embeddings, scene[1])
    assert torch.allclose(band_cams(numerator, length=length).sum(0), cosine_map(embeddings, scene[1]), atol=1e-5)

def test_a_constant_map_lives_in_the_lowest_band():
    bands = band_cams(torch.full((1, 1, 6, 6), 2.0))
    assert torch.allclose(bands[0], torch.full((1, 1, 6, 6), 2.0), atol=1e-5) and bands[1:].abs().max() < 1e-5


def test_the_best_class_is_the_first_of_the_highest() -> None:
    from freqseg.cam import best_class
    scores = torch.randint(0, 3, (2, 6, 40, 30)).float()
    assert (best_class(scores).numpy() == scores.numpy().argmax(1)).all() and (best_class(scores[0], 0).numpy() == scores[0].numpy().argmax(0)).all()


# ---- classes that are there, refinement, labels ----------------------------------------------------------------------

def test_classes_of_a_picture_can_be_named_in_several_ways():
    names, expected = ("cat", "dog", "cow"), torch.tensor([[True, False, True], [False, True, False]])
    ways = [expected, expected.numpy(), [[0, 2], [1]], [["cat", "cow"], ["dog"]], [[True, False, True], [False, True, False]]]
    assert all(torch.equal(as_present(way, (2, 3), names), expected) for way in ways)
    assert torch.equal(as_present([2, 0], (2, 3)), expected[:1].expand(2, 3)) and as_present(None, (2, 3)).all()
    for wrong in (torch.ones(2, 3), [5], [-1], torch.ones(3, 3, dtype=torch.bool), "cat", [["cat"], ["dog"]], 1.5, []):
        with pytest.raises(InputError, match="give None for all classes, bool"): as_present(wrong, (2, 3))
    with pytest.raises(InputError, match="Did you mean 'cow'"): as_present(["cowl"], (2, 3), names)

def test_grad_cam_of_all_classes_and_of_one(clip, scene):
    features, text, present, background = scene
    everything = grad_cam(clip, features, text, torch.ones_like(present), background)
    assert torch.equal(grad_cam(clip, features, text, background=background), everything)
    assert torch.equal(grad_cam(clip, features, text[0]), grad_cam(clip, features, text[:1]))

@pytest.mark.parametrize("box", [None, 0.4])
@pytest.mark.parametrize("walk_steps", [1, 3])
def test_refining_is_box_walk_and_scaling(box, walk_steps):
    cam, affinity = torch.rand(2, 3, 4, 5), torch.rand(2, 20, 20)
    expected = cam if box is None else cam * box_mask(cam, box)
    for _ in range(walk_steps): expected = torch.einsum("bij,bkj->bki", affinity, expected.flatten(2)).view_as(cam)
    low, high = expected.amin((2, 3), keepdim=True), expected.amax((2, 3), keepdim=True)
    assert torch.allclose(refine_cam(affinity, cam, walk_steps, box), (expected - low) / (high - low), atol=1e-5)
    assert torch.allclose(refine_cam(affinity[0], cam[0], walk_steps, box), refine_cam(affinity[:1], cam[:1], walk_steps, box))

def test_labels_know_a_background_map_and_a_refinement():
    cam, present = torch.rand(2, 4, 5, 6), torch.tensor([[True, False, True, False], [False, False, False, False]])
    background = torch.rand(2, 1, 5, 6)
    expected = torch.cat([background, cam * present[..., None, None]], 1).argmax(1)
    assert torch.equal(pseudo_labels(cam, present, background=background), expected)
    assert torch.equal(pseudo_labels(cam[0], [0, 2], background=background[:1]), expected[:1])
    turned = pseudo_labels(cam, present, (10, 12), refine=lambda scores: scores.flip(-1))
    assert torch.equal(turned, pseudo_labels(cam, present, (10, 12)).flip(-1))

def test_a_value_path_with_the_blocks_own_attention_is_the_tower(clip):
    full = clip.encode(normal(3, 3, 32, 48))
    query, key, _ = last_qkv(clip, full)
    assert torch.allclose(value_path(clip, full, residual=True, attention=attention_weights(query, key)), full.patch_embedding, atol=1e-5)

def test_a_side_path_is_the_sum_of_its_branches(clip):
    features = clip.encode(normal(2, 3, 32, 48), **similarity_request(clip, "intra", 2))
    own = lambda features, block: attention_weights(features.queries[block], features.keys[block])
    first = clip.depth - 2
    expected = features.tokens[first - 1].flatten(2).mT
    for block in (first, first + 1): expected = expected + merge_heads(clip.blocks[block], own(features, block) @ features.values[block])[:, 1:]
    assert torch.allclose(side_path(clip, features, own, 2), clip.project(expected).mT.unflatten(2, features.grid), atol=1e-5)
