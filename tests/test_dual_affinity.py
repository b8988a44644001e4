"""The learned affinities: they begin untrained, stay symmetric and doubly stochastic, and their losses are what DFA prints."""
import json
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from freqseg import dual_affinity
from freqseg.affinity import SOURCES, combine_affinities, inverse_affinity, invert_relation, smoothed_affinity, symmetrise
from freqseg.clip import Backbone, Features, build_clip
from freqseg.dual_affinity import (ABLATIONS, INITS, AffinityPath, DualAffinity, DualAffinitySettings, QualityThreshold,
                                   alignment_loss, encode_entries, frequency_relations, inverse_softplus,
                                   prior_score, rectification_masks, relation_loss,
                                   scaled_relation, selective_mask, smoothed_stack, window_count)
from freqseg.files import InputError
from freqseg.losses import nearest_labels
from freqseg.spectra import complement, gaussian_transfer

CONFIG = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 4, "width": 48, "head_width": 16, "patch_size": 8},
          "text_cfg": {"context_length": 8, "vocab_size": 9, "width": 32, "heads": 2, "layers": 1}}
GRID, N = (4, 5), 20
seeds = st.integers(0, 10_000)
grids = st.tuples(st.integers(1, 5), st.integers(1, 5))

def generator(seed):
    return torch.Generator().manual_seed(seed)

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))

def attention(*shape, seed=0, sharpness=2.0):
    return (sharpness * normal(*shape, seed=seed)).softmax(-1)

def labels_of(*shape, seed=0, classes=3):
    "Labels 0..classes-1 and, about as often as one of them, 255."
    found = torch.randint(classes + 1, shape, generator=generator(seed))
    return torch.where(found == classes, 255, found)

def trained(path, seed=0):
    "A path whose network is somewhere, not at its start."
    with torch.no_grad():
        for i, weight in enumerate(path.parameters()): weight.copy_(0.5 * normal(*weight.shape, seed=seed + i))
    return path

@pytest.fixture(scope="module")
def backbone():
    return Backbone(build_clip(CONFIG), "tiny", None)

@pytest.fixture(scope="module")
def features(backbone):
    "Two images on a 4 x 5 grid, everything recorded in all four blocks, attention per head."
    return backbone.encode(normal(2, 3, 32, 40), tokens=range(4), attention=range(4), qkv=range(4), per_head=True)


# ---- stacks ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source", [name for name, source in SOURCES.items() if source.heads])
def test_heads_of_a_stack_average_to_its_layers(features, source):
    layers, heads = smoothed_stack(features, source, 3), smoothed_stack(features, source, 3, per_head=True)
    assert layers.shape == (2, 3, N, N) and heads.shape == (2, 9, N, N)
    assert torch.allclose(heads.unflatten(1, (3, 3)).mean(2), layers, atol=1e-6)

@pytest.mark.parametrize("source", SOURCES)
def test_a_stack_and_its_inverse_add_up_to_the_identity(features, source):
    stack, inverse = smoothed_stack(features, source), invert_relation(smoothed_stack(features, source), features.grid)
    assert torch.allclose(stack / stack.sum(-1, keepdim=True) + inverse, torch.eye(N).expand_as(inverse), atol=1e-6)
    assert inverse.sum(-1).abs().max() < 1e-5

def test_another_high_pass_keeps_rows_that_sum_to_zero(features):
    stack = smoothed_stack(features, "kk", per_head=True)
    filtered = invert_relation(stack, features.grid, complement(gaussian_transfer(0.2)))
    assert filtered.sum(-1).abs().max() < 1e-5 and (filtered - invert_relation(stack, features.grid)).abs().max() > 1e-3

def test_stack_mistakes_are_named(features):
    with pytest.raises(InputError, match="no heads"): smoothed_stack(features, "tokens", per_head=True)
    with pytest.raises(InputError, match="unknown source of affinities 'keys'"): smoothed_stack(features, "keys", per_head=True)
    lean = Features(GRID, 4, attention={i: a.mean(1) for i, a in features.attention.items()})
    with pytest.raises(InputError, match="per_head=True"): smoothed_stack(lean, per_head=True)
    with pytest.raises(InputError, match="to encode"): smoothed_stack(lean, "qq", per_head=True)

@settings(max_examples=25)
@given(st.integers(1, 9), st.sampled_from(["asinh", "linear"]))
def test_uniform_attention_is_encoded_alike_on_every_grid(side, encoding):
    uniform = torch.full((1, 2, 3, side**2), 1 / side**2)
    assert torch.allclose(encode_entries(uniform, encoding), torch.tensor(1.0 if encoding == "linear" else math.asinh(1)))


# ---- paths ----------------------------------------------------------------------------------------------------------

@given(st.floats(1e-6, 1e4))
def test_inverse_softplus_undoes_softplus(x):
    assert math.isclose(F.softplus(inverse_softplus(torch.tensor(x, dtype=torch.float64))).item(), x, rel_tol=1e-6)

@pytest.mark.parametrize("source", SOURCES)
def test_the_smoothed_path_begins_as_the_mean_of_the_layers(features, source):
    begin = AffinityPath(4)(smoothed_stack(features, source)).affinity
    assert torch.allclose(begin, smoothed_affinity(features, source), atol=2e-5)

@pytest.mark.parametrize("source,sharpness", [("kk", 1.0), ("tokens", 5.0), ("attention", 1.0)])
def test_the_inverse_path_begins_as_the_untrained_inverse(features, source, sharpness):
    begin = AffinityPath(4, init="signed", sharpness=sharpness)(invert_relation(smoothed_stack(features, source), features.grid)).affinity
    assert torch.allclose(begin, inverse_affinity(features, source, sharpness=sharpness), atol=1e-4)

@settings(max_examples=25)
@given(seeds)
def test_magnitude_of_the_inverse_leaves_half_of_each_row_at_home(seed):
    amount = F.softplus(prior_score(invert_relation(attention(1, 3, N, N, seed=seed), GRID), "magnitude"))
    assert torch.allclose(amount.diagonal(dim1=-2, dim2=-1) / amount.sum(-1), torch.tensor(0.5), atol=1e-4)

@pytest.mark.parametrize("init", ["magnitude", "signed"])
def test_an_unlearned_path_is_a_learned_one_at_its_start(init):
    stack, path = attention(2, 4, N, N), AffinityPath(4, init=init, learn=False)
    assert not list(path.parameters()) and torch.equal(path(stack).score, AffinityPath(4, init=init)(stack).score)

@settings(max_examples=30)
@given(seeds, st.sampled_from(INITS), st.sampled_from(["asinh", "linear"]), st.booleans())
def test_whatever_the_weights_affinities_are_symmetric_and_doubly_stochastic(seed, init, encoding, inverse):
    stack = attention(2, 3, N, N, seed=seed)
    found = trained(AffinityPath(3, init=init, encoding=encoding), seed)(invert_relation(stack, GRID) if inverse else stack)
    assert torch.equal(found.affinity, found.affinity.mT) and (found.positive >= 1e-6).all()
    assert (found.affinity.sum(-1) - 1).abs().max() < 2e-4

@pytest.mark.parametrize("normalise", ["weclip", "average"])
def test_other_normalisations_are_those_of_symmetrise(normalise):
    found = trained(AffinityPath(3, normalise=normalise))(attention(1, 3, N, N))
    assert torch.allclose(found.affinity, symmetrise(found.positive, normalise)) and torch.allclose(found.affinity, found.affinity.mT)

@settings(max_examples=25)
@given(seeds)
def test_a_path_commutes_with_a_permutation_of_patches(seed):
    stack, path, order = attention(1, 3, N, N, seed=seed), trained(AffinityPath(3), seed), torch.randperm(N, generator=generator(seed))
    permuted = path(stack[:, :, order][:, :, :, order]).affinity
    assert torch.allclose(permuted, path(stack).affinity[:, order][:, :, order], atol=1e-4)

def test_one_path_reads_grids_of_any_size():
    path = AffinityPath(2)
    assert [path(attention(1, 2, n, n)).affinity.shape[-1] for n in (4, 9, 30)] == [4, 9, 30]

@pytest.mark.parametrize("init", INITS)
def test_training_reaches_every_weight(init):
    path, stack, goal = AffinityPath(3, init=init), attention(2, 3, N, N), attention(2, N, N, seed=1)
    optimiser = torch.optim.Adam(path.parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        losses.append((path(stack).affinity - goal).square().sum())
        losses[-1].backward()
        optimiser.step()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in path.parameters())
    assert all(weight.grad.abs().max() > 0 for weight in list(path.parameters())[:3]) and losses[-1] < losses[0]

@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_chunks_change_neither_values_nor_gradients(chunk):
    stack, results = attention(2, 3, N, N), []
    for rows in (None, chunk):
        path = trained(AffinityPath(3, chunk=rows))
        found = path(stack)
        (found.score.square().sum() + found.affinity.square().sum()).backward()
        results.append([found.affinity, *(weight.grad for weight in path.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*results, strict=True))

def test_implicit_and_unrolled_gradients_agree():
    stack, results = attention(1, 3, N, N), []
    for gradient in ("implicit", "unroll"):
        path = trained(AffinityPath(3, gradient=gradient, tolerance=1e-6))
        path(stack).affinity.square().sum().backward()
        results.append(torch.cat([weight.grad.flatten() for weight in path.parameters()]))
    assert torch.allclose(*results, rtol=1e-2, atol=1e-4 * results[0].abs().max())

@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", ["identity", "uniform", "one column", "zero"])
def test_extreme_attention_gives_finite_affinities_and_gradients(kind, init):
    maps = {"identity": torch.eye(N), "uniform": torch.full((N, N), 1 / N), "one column": F.one_hot(torch.zeros(N).long(), N).float(),
            "zero": torch.zeros(N, N)}[kind]
    path = trained(AffinityPath(2, init=init))
    found = path(invert_relation(maps.expand(1, 2, N, N), GRID))
    found.affinity.square().sum().backward()
    assert found.affinity.isfinite().all() and all(weight.grad.isfinite().all() for weight in path.parameters())

def test_under_bf16_autocast_sinkhorn_keeps_its_tolerance():
    path = trained(AffinityPath(3))
    with torch.autocast("cpu", torch.bfloat16):
        found = path(attention(2, 3, N, N).bfloat16())
    assert all(part.dtype == torch.float32 for part in found) and (found.affinity.sum(-1) - 1).abs().max() < 2e-4
    full = path(attention(2, 3, N, N))
    assert (found.score - full.score).abs().max() < 0.03 * full.score.abs().max()

def test_path_mistakes_are_named():
    with pytest.raises(InputError, match=r"\(B, 3, N, N\)"): AffinityPath(3)(attention(1, 2, N, N))
    with pytest.raises(InputError, match="init='zero'"): AffinityPath(3, init="zero")
    with pytest.raises(InputError, match="normalise='softmax'"): AffinityPath(3, normalise="softmax")
    with pytest.raises(InputError, match="encoding='log'"): AffinityPath(3, encoding="log")
    with pytest.raises(InputError, match="entries=0"): AffinityPath(0)
    with pytest.raises(InputError, match="chunk=0"): AffinityPath(3, chunk=0)
    with pytest.raises(InputError, match="random"): AffinityPath(3, init="random", learn=False)


# ---- relations and quality ------------------------------------------------------------------------------------------

@settings(max_examples=25)
@given(seeds, st.floats(0, 0.5), st.sampled_from(["square", "disc"]))
def test_bands_of_the_decoder_add_up_and_relations_are_their_products(seed, mu, shape):
    x = normal(2, 6, *GRID, seed=seed)
    found = frequency_relations(x, mu, shape)
    assert torch.allclose(found.low_features + found.high_features, x, atol=1e-6)
    tokens = found.high_features.flatten(2)
    assert torch.allclose(found.high, torch.einsum("bdi,bdj->bij", tokens, tokens).sigmoid(), atol=1e-6)
    assert all(torch.allclose(s, s.mT, atol=1e-6) and (s >= 0).all() and (s <= 1).all() for s in found[:2])

def test_constant_features_and_the_full_band_have_no_high_relation():
    flat = normal(1, 6, 1, 1).expand(1, 6, *GRID)
    assert torch.allclose(frequency_relations(flat, 0.2).high, torch.tensor(0.5), atol=1e-6)
    assert torch.equal(frequency_relations(normal(1, 6, *GRID), mu=0.5).high, torch.full((1, N, N), 0.5))

@pytest.mark.parametrize("normalise", ["features", "bands"])
@settings(max_examples=25)
@given(scale=st.floats(1e-2, 1e3))
def test_normalised_relations_do_not_depend_on_length(normalise, scale):
    x = normal(1, 6, *GRID)
    one, other = (frequency_relations(k * x, 0.2, normalise=normalise) for k in (1, scale))
    assert torch.allclose(one.low, other.low, atol=1e-5) and torch.allclose(one.high, other.high, atol=1e-5)
    if normalise == "features": assert torch.equal(frequency_relations(x, 0.2, normalise=True).low, one.low)
    if normalise == "bands": assert torch.allclose(one.low.diagonal(dim1=-2, dim2=-1), torch.tensor(1.0).sigmoid())

def test_relations_are_fp32_under_autocast():
    x = normal(1, 6, *GRID)
    with torch.autocast("cpu", torch.bfloat16): found = frequency_relations(x)
    assert torch.equal(found.low, frequency_relations(x, normalise=False).low)
    with pytest.raises(InputError, match="normalise='l2'"): frequency_relations(x, normalise="l2")

@settings(max_examples=25)
@given(seeds, st.floats(0, 0.999), st.integers(1, 6))
def test_alpha_is_a_running_mean_that_begins_at_its_first_value(seed, momentum, steps):
    quality, expected = QualityThreshold(momentum), None
    for step in range(steps):
        s, a = normal(1, 6, 6, seed=seed + step).sigmoid(), attention(1, 6, 6, seed=seed + step)
        found = float((s - a).abs().mean())
        expected = found if expected is None else momentum * expected + (1 - momentum) * found
        assert math.isclose(float(quality(s, a)), expected, rel_tol=1e-4)

def test_alpha_moves_only_in_training_and_is_saved():
    quality, one, two = QualityThreshold(0.5), torch.full((1, 4, 4), 0.9), torch.full((1, 4, 4), 0.1)
    assert quality.eval()(one, two) == pytest.approx(0.8) and quality.updates == 0
    quality.train()(one, two)
    assert quality.eval()(one, one) == quality.alpha == pytest.approx(0.8)
    other = QualityThreshold(0.5)
    other.load_state_dict(quality.state_dict())
    assert other.train()(one, one) == pytest.approx(0.4) and not list(quality.parameters())

def test_alpha_has_no_gradient_and_survives_a_broken_batch():
    quality, s = QualityThreshold(), normal(1, 4, 4).sigmoid().requires_grad_()
    alpha = quality(s, attention(1, 4, 4))
    assert not alpha.requires_grad
    assert quality(s * torch.nan, attention(1, 4, 4)) == alpha and quality.updates == 1
    with pytest.raises(InputError, match="momentum=1"): QualityThreshold(1.0)

def test_alpha_is_averaged_over_processes_in_training_only():
    quality, calls = QualityThreshold(), []
    def reduce(value):   # another process that found 0.2 more
        calls.append(1)
        value += value + 0.2
    with mock.patch.multiple(dual_affinity.distributed, is_initialized=lambda: True, all_reduce=reduce, get_world_size=lambda: 2):
        assert quality(torch.full((1, 4, 4), 0.5), torch.zeros(1, 4, 4)) == pytest.approx(0.6)
        assert quality.eval()(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)) == pytest.approx(0.6)
    assert len(calls) == 1

def process(rank, folder):
    "One of two processes, each with its own batch."
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    alpha = QualityThreshold()(torch.full((1, 4, 4), 0.2 + 0.4 * rank), torch.zeros(1, 4, 4))
    torch.save(alpha, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()

@pytest.mark.slow
def test_two_real_processes_agree_on_alpha(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    assert [float(torch.load(tmp_path / f"{rank}.pt")) for rank in (0, 1)] == pytest.approx([0.4, 0.4])

@given(seeds, st.floats(0, 1))
def test_the_mask_selects_what_lies_above_alpha(seed, alpha):
    s = normal(1, 5, 5, seed=seed).sigmoid()
    assert torch.equal(selective_mask(s, alpha), (s - alpha) > 0) and not selective_mask(s, 1.0).any()


# ---- alignment ------------------------------------------------------------------------------------------------------

@settings(max_examples=25)
@given(seeds, st.floats(-5, 5), st.sampled_from(["row", "mask"]), st.sampled_from(["pairs", "rows"]))
def test_alignment_is_zero_where_teacher_and_affinity_agree(seed, constant, within, reduction):
    s = normal(2, 8, 8, seed=seed).sigmoid()
    assert alignment_loss(s, s + constant, s > 0.5, within, reduction).abs() < 1e-6

@pytest.mark.parametrize("within", ["row", "mask"])
@pytest.mark.parametrize("reduction", ["pairs", "rows"])
def test_an_empty_mask_gives_zero_loss_and_zero_gradient(within, reduction):
    a, nothing = attention(2, 6, 6).requires_grad_(), torch.zeros(2, 6, 6, dtype=torch.bool)
    loss = alignment_loss(normal(2, 6, 6).sigmoid(), a, nothing, within, reduction)
    loss.backward()
    assert loss == 0 and torch.equal(a.grad, torch.zeros_like(a))

@settings(max_examples=25)
@given(seeds)
def test_alignment_over_full_rows_is_torchs_divergence(seed):
    s, a, full = normal(1, 7, 7, seed=seed).sigmoid(), attention(1, 7, 7, seed=seed), torch.ones(1, 7, 7, dtype=torch.bool)
    expected = F.kl_div(a.log_softmax(-1), s.log_softmax(-1), reduction="sum", log_target=True)
    for within in ("row", "mask"):
        assert torch.allclose(alignment_loss(s, a, full, within), expected / 49, atol=1e-7)
        assert torch.allclose(alignment_loss(s, a, full, within, "rows"), expected / 7, atol=1e-6)

@settings(max_examples=25)
@given(seeds)
def test_alignment_equals_a_loop_over_pairs(seed):
    s, a = normal(1, 5, 5, seed=seed).sigmoid(), attention(1, 5, 5, seed=seed + 1)
    mask, total = s > s.median(), 0.0
    for i, j in mask[0].nonzero().tolist():
        teacher, student = s[0, i].exp() / s[0, i].exp().sum(), a[0, i].exp() / a[0, i].exp().sum()
        total += float(teacher[j] * (teacher[j] / student[j]).log())
    assert math.isclose(float(alignment_loss(s, a, mask)), total / int(mask.sum()), rel_tol=1e-3, abs_tol=1e-7)

@settings(max_examples=25)
@given(seeds)
def test_within_the_mask_alignment_is_never_negative(seed):
    s, a = normal(2, 6, 6, seed=seed).sigmoid(), 3 * normal(2, 6, 6, seed=seed + 1)
    assert alignment_loss(s, a, s > 0.6, "mask") >= -1e-7

def test_the_teacher_is_not_taught_and_images_count_alike():
    s, a = normal(3, 6, 6).sigmoid().requires_grad_(), attention(3, 6, 6).requires_grad_()
    mask = (s > 0.5).detach()
    loss = alignment_loss(s, a, mask)
    loss.backward()
    assert s.grad is None and a.grad.abs().max() > 0
    each = [alignment_loss(s[i:i + 1], a[i:i + 1], mask[i:i + 1]) for i in range(3)]
    assert torch.allclose(loss, sum(each) / 3)
    with pytest.raises(InputError, match="within='column'"): alignment_loss(s, a, mask, "column")
    with pytest.raises(InputError, match="reduction='sum'"): alignment_loss(s, a, mask, reduction="sum")


# ---- rectification --------------------------------------------------------------------------------------------------

def moved(grid, patch, dy, dx):
    "The patch that lies (dy, dx) from another, or None beyond the grid."
    y, x = patch // grid[1] + dy, patch % grid[1] + dx
    return y * grid[1] + x if 0 <= y < grid[0] and 0 <= x < grid[1] else None

def offsets(window):
    return [(dy, dx) for dy in range(-(window // 2), window // 2 + 1) for dx in range(-(window // 2), window // 2 + 1)]

def slow_masks(relation, labels, grid, window, border, agreement):
    "The definition, pair by pair and offset by offset, for one image."
    n, mean = len(labels), relation.mean()
    known = [[labels[i] != 255 and labels[j] != 255 for j in range(n)] for i in range(n)]
    first = [[bool(known[i][j] and relation[i, j] > mean and labels[i] == labels[j]) for j in range(n)] for i in range(n)]
    negative = [[bool(known[i][j] and relation[i, j] <= mean and labels[i] != labels[j]) for j in range(n)] for i in range(n)]
    final = [row.copy() for row in first]
    for i in range(n):
        for j in range(n):
            if not known[i][j] or first[i][j] or negative[i][j] or (agreement and labels[i] != labels[j]): continue
            met = [(moved(grid, i, *by), moved(grid, j, *by)) for by in offsets(window)]
            met = [(p, q) for p, q in met if p is not None and q is not None and known[p][q]]
            ballots = len(met) if border == "valid" else window**2
            final[i][j] = 2 * sum(first[p][q] for p, q in met) > ballots
    return torch.tensor(final), torch.tensor(negative)

@settings(max_examples=25)
@given(seeds, grids, st.sampled_from([1, 3, 5, 9]))
def test_the_window_count_equals_a_loop_over_offsets(seed, grid, window):
    n = grid[0] * grid[1]
    pairs = torch.rand(1, n, n, generator=generator(seed)) < 0.5
    found = window_count(pairs, grid, window)[0]
    for i in range(n):
        for j in range(n):
            met = [(moved(grid, i, *by), moved(grid, j, *by)) for by in offsets(window)]
            assert found[i, j] == sum(bool(pairs[0, p, q]) for p, q in met if p is not None and q is not None)

@settings(max_examples=25)
@given(seeds, grids, st.sampled_from([1, 3, 5]), st.sampled_from(["valid", "zero"]), st.booleans())
def test_masks_equal_the_definition_pair_by_pair(seed, grid, window, border, agreement):
    n = grid[0] * grid[1]
    relation = 0.5 + torch.randint(0, 9, (1, n, n), generator=generator(seed)) / 16   # exact in fp32: no ties by rounding
    labels = labels_of(1, n, seed=seed, classes=2)
    found = rectification_masks(relation, labels, grid, window, border=border, agreement=agreement)
    positive, negative = slow_masks(relation[0].double(), labels[0].tolist(), grid, window, border, agreement)
    assert torch.equal(found.positive[0], positive) and torch.equal(found.negative[0], negative)

@settings(max_examples=25)
@given(seeds, st.sampled_from([None, 3, 9]), st.sampled_from(["valid", "zero"]), st.booleans())
def test_no_pair_is_positive_and_negative_and_ignored_patches_are_neither(seed, window, border, agreement):
    relation, labels = normal(2, N, N, seed=seed).sigmoid(), labels_of(2, N, seed=seed)
    found = rectification_masks(relation, labels, GRID, window, border=border, agreement=agreement)
    assert not (found.positive & found.negative).any()
    ignored = labels == 255
    for mask in found: assert not mask[ignored].any() and not mask.mT[ignored].any()
    if agreement: assert not (found.positive & (labels[:, :, None] != labels[:, None])).any()

@settings(max_examples=25)
@given(seeds, st.sampled_from([3, 9]))
def test_the_vote_only_adds_positive_pairs_and_keeps_symmetry(seed, window):
    relation, labels = normal(2, N, N, seed=seed), labels_of(2, N, seed=seed)
    relation = (relation + relation.mT).sigmoid()
    before, after = (rectification_masks(relation, labels, GRID, w) for w in (None, window))
    assert (after.positive >= before.positive).all() and torch.equal(after.negative, before.negative)
    assert torch.equal(after.positive, after.positive.mT) and torch.equal(after.negative, after.negative.mT)

def test_a_weak_pair_amid_strong_ones_is_promoted_and_a_strong_one_amid_weak_ones_is_not_needed():
    relation, labels = torch.full((1, 25, 25), 0.9), torch.zeros(1, 25, dtype=torch.long)
    relation[0, 12, 11] = 0.1
    before, after = (rectification_masks(relation, labels, (5, 5), w) for w in (None, 3))
    assert not before.positive[0, 12, 11] and after.positive[0, 12, 11] and after.positive.all()

def test_labels_overrule_the_vote_unless_told_otherwise():
    relation, labels = torch.full((1, 25, 25), 0.9), torch.zeros(1, 25, dtype=torch.long)
    relation[0, 0, 24], labels[0, 12] = 0.1, 1
    strict, free = (rectification_masks(relation, labels, (5, 5), 3, agreement=a) for a in (True, False))
    assert not strict.positive[0, 12, 11] and free.positive[0, 12, 11] and not strict.negative[0, 12, 11]

def test_the_vote_builds_nothing_larger_than_all_pairs():
    class Largest(TorchDispatchMode):
        elements = 0
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor): self.elements = max(self.elements, x.numel())
            return result
    with Largest() as seen:
        rectification_masks(normal(2, 64, 64).sigmoid(), labels_of(2, 64), (8, 8))
    assert seen.elements == 2 * 64 * 64

def test_mask_mistakes_are_named():
    relation = normal(1, N, N).sigmoid()
    with pytest.raises(InputError, match="window=4"): rectification_masks(relation, labels_of(1, N), GRID, 4)
    with pytest.raises(InputError, match="nearest_labels"): rectification_masks(relation, labels_of(1, 4, 5), GRID)
    with pytest.raises(InputError, match=r"expected \(25, 25\)"): rectification_masks(relation, labels_of(1, N), (5, 5))
    with pytest.raises(InputError, match="border='wrap'"): rectification_masks(relation, labels_of(1, N), GRID, border="wrap")

def test_nearest_labels_take_the_pixel_that_nearest_reduction_takes():
    labels = labels_of(2, 32, 40)
    assert torch.equal(nearest_labels(labels, GRID), labels[:, ::8, ::8].flatten(1))
    assert torch.equal(nearest_labels(labels.to(torch.uint8), GRID), nearest_labels(labels, GRID))

@settings(max_examples=25)
@given(seeds, st.integers(0, 399))
def test_relation_loss_is_zero_exactly_when_masks_are_met(seed, where):
    positive, negative = rectification_masks(normal(1, N, N, seed=seed).sigmoid(), labels_of(1, N, seed=seed), GRID)
    free = torch.rand(1, N, N, generator=generator(seed))
    affinity = torch.where(positive, 1.0, torch.where(negative, 0.0, free))
    assert relation_loss(affinity, positive, negative, "sinkhorn") == 0
    spoiled = affinity.clone()
    spoiled.view(-1)[where] = 0.5
    counts = bool((positive | negative).view(-1)[where])
    assert (relation_loss(spoiled, positive, negative, "sinkhorn") > 0) == counts

@settings(max_examples=25)
@given(seeds, st.sampled_from(["score", "max", "sinkhorn"]))
def test_relation_loss_equals_the_printed_sums_and_stays_in_range(seed, scale):
    values = normal(1, N, N, seed=seed) if scale == "score" else symmetrise(attention(1, N, N, seed=seed))
    positive, negative = rectification_masks(normal(1, N, N, seed=seed).sigmoid(), labels_of(1, N, seed=seed), GRID)
    a = {"score": values.sigmoid(), "max": values / values.amax(-1, keepdim=True), "sinkhorn": values}[scale]
    expected = (1 - a)[positive].sum() / max(1, int(positive.sum())) + a[negative].sum() / max(1, int(negative.sum()))
    loss = relation_loss(values, positive, negative, scale)
    assert torch.allclose(loss, expected, atol=1e-5) and 0 <= loss <= 2

@pytest.mark.parametrize("scale", ["score", "max", "sinkhorn"])
def test_empty_relations_give_zero_and_images_count_alike(scale):
    nothing, values = torch.zeros(2, N, N, dtype=torch.bool), attention(2, N, N).requires_grad_()
    loss = relation_loss(values, nothing, nothing, scale)
    loss.backward()
    assert loss == 0 and values.grad.abs().max() == 0
    masks = rectification_masks(normal(2, N, N).sigmoid(), labels_of(2, N), GRID)
    each = [relation_loss(values[i:i + 1], *(m[i:i + 1] for m in masks), scale) for i in range(2)]
    assert torch.allclose(relation_loss(values, *masks, scale), sum(each) / 2)

def test_relation_loss_pulls_positive_pairs_up_and_negative_ones_down():
    score, masks = torch.zeros(1, N, N, requires_grad=True), rectification_masks(normal(1, N, N).sigmoid(), labels_of(1, N), GRID)
    relation_loss(score, *masks).backward()
    assert (score.grad[masks.positive] < 0).all() and (score.grad[masks.negative] > 0).all()
    assert (score.grad[~(masks.positive | masks.negative)] == 0).all()
    with pytest.raises(InputError, match="scale='sigmoid'"): scaled_relation(score, "sigmoid")


# ---- both together --------------------------------------------------------------------------------------------------

def teaching(seed=0):
    "Decoder features and patch labels for the two images."
    return normal(2, 6, *GRID, seed=seed), labels_of(2, N, seed=seed)

def weights(module):
    return sum(weight.numel() for weight in module.parameters())

@pytest.mark.parametrize("row,learned,losses", [("A_s", 0, set()), ("A_s + A_inv", 0, set()), ("A_la", 1, {"alignment"}),
                                                ("A_la + A_ha", 2, {"alignment", "rectification"})])
def test_switches_give_the_rows_of_the_ablation(features, row, learned, losses):
    module = DualAffinity(4, DualAffinitySettings(**ABLATIONS[row]))
    found = module(features, *teaching())
    assert weights(module) == learned * weights(AffinityPath(4)) and set(found.losses) == losses
    assert (found.inverse is None) == (not ABLATIONS[row]["inverse"])
    assert torch.allclose(found.smoothed, smoothed_affinity(features), atol=2e-5)
    if found.inverse is not None: assert torch.allclose(found.inverse, inverse_affinity(features), atol=1e-4)

@pytest.mark.parametrize("source", SOURCES)
def test_the_module_works_for_every_source_and_asks_for_what_it_needs(backbone, source):
    module = DualAffinity.for_backbone(backbone, DualAffinitySettings(source=source, layers=3))
    found = module(backbone.encode(normal(2, 3, 32, 40), joint=False, **module.request(backbone.depth)), *teaching())
    assert found.smoothed.shape == found.inverse.shape == (2, N, N) and all(loss.isfinite() for loss in found.losses.values())

def test_a_tower_proposes_its_source_and_heads_multiply_maps(backbone):
    assert DualAffinity.for_backbone(backbone).request(4) == {"attention": (0, 1, 2, 3), "per_head": False}
    proposing = mock.Mock(depth=4, heads=3, metadata={"default_attention_source": "tokens"})
    assert DualAffinity.for_backbone(proposing).request(4) == {"tokens": (0, 1, 2, 3)}
    heads = DualAffinity.for_backbone(backbone, DualAffinitySettings(per_head=True, layers=(1, -1), inversion="gaussian"))
    found = heads(backbone.encode(normal(2, 3, 32, 40), joint=False, **heads.request(4)), *teaching())
    assert heads.low.entries == 6 and found.losses["rectification"].isfinite()
    with pytest.raises(InputError, match="no heads"): DualAffinity.for_backbone(proposing, DualAffinitySettings(per_head=True))

@pytest.mark.parametrize("scale", ["score", "max", "sinkhorn"])
def test_gradients_reach_the_paths_and_nothing_else(backbone, scale):
    images = normal(2, 3, 32, 40).requires_grad_()
    features = backbone.encode(images, attention=range(4), joint=False)
    decoded, labels = teaching()
    decoded.requires_grad_()
    module = DualAffinity(4, DualAffinitySettings(align_scale=scale, relation_scale=scale))
    sum(module(features, decoded, labels).losses.values()).backward()
    assert decoded.grad is None and images.grad is None and all(p.grad is None for p in backbone.parameters())
    for path in (module.low, module.high): assert path.network[2].weight.grad.abs().max() > 0

def test_each_loss_trains_its_own_path(features):
    for name, mine, other in (("alignment", "low", "high"), ("rectification", "high", "low")):
        module = DualAffinity(4)
        module(features, *teaching()).losses[name].backward()
        assert all(p.grad is None for p in getattr(module, other).parameters())
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in getattr(module, mine).parameters())

def test_training_lowers_both_losses(features):
    module, (decoded, labels) = DualAffinity(4, DualAffinitySettings(align_reduction="rows")), teaching()
    optimiser, history = torch.optim.Adam(module.parameters(), lr=0.03), []
    for _ in range(25):
        losses = module(features, decoded, labels).losses
        history.append({name: float(loss.detach()) for name, loss in losses.items()})
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
    assert all(history[-1][name] < history[0][name] for name in ("alignment", "rectification"))

def test_losses_come_only_with_something_to_learn_from(features):
    module, (decoded, labels) = DualAffinity(4), teaching()
    assert module(features).losses == {} and set(module(features, decoded).losses) == {"alignment"}
    nothing = module(features, decoded, torch.full_like(labels, 255))
    assert nothing.losses["rectification"] == 0 and nothing.statistics["positive"] == 0
    module.eval()
    alpha, updates = module.threshold.alpha.clone(), int(module.threshold.updates)
    assert module(features, 3 * decoded, labels).statistics["alpha"] == alpha and module.threshold.updates == updates == 2

def test_state_is_saved_and_settings_survive_json(features):
    one = DualAffinity(4, DualAffinitySettings(layers=(0, 1, 2, 3), vote_window=None, inversion="butterworth"))
    trained(one.high)
    one(features, *teaching())
    other = DualAffinity(4, DualAffinitySettings(**json.loads(json.dumps(one.settings.named()))))
    other.load_state_dict(one.state_dict())
    a, b = one.eval()(features, *teaching(1)), other.eval()(features, *teaching(1))
    assert torch.equal(a.inverse, b.inverse) and a.losses.keys() == b.losses.keys() and a.statistics["alpha"] == b.statistics["alpha"]

def test_bf16_autocast_changes_losses_only_a_little(features):
    module, (decoded, labels) = DualAffinity(4, DualAffinitySettings(normalise_features="bands")), teaching()
    trained(module.high)
    full = module.eval()(features, decoded, labels)
    with torch.autocast("cpu", torch.bfloat16):
        short = module(features, decoded, labels)
        sum(short.losses.values()).backward()
    assert short.smoothed.dtype == torch.float32 and (short.inverse.sum(-1) - 1).abs().max() < 2e-4
    for name, loss in full.losses.items(): assert torch.allclose(short.losses[name], loss, rtol=0.02, atol=1e-5)

@settings(max_examples=25)
@given(seeds)
def test_combined_affinities_keep_rows_that_sum_to_one(seed):
    low, high = (symmetrise(attention(1, 8, 8, seed=s, sharpness=1.0)) for s in (seed, seed + 1))
    for how in ("sum", "product"):
        assert torch.allclose(combine_affinities(low, high, how).sum(-1), torch.ones(1, 8), atol=2e-4)
    assert combine_affinities(low, None) is low and torch.allclose(combine_affinities(low, high), (low + high) / 2)

@pytest.mark.parametrize("options", [{"source": "keys"}, {"layers": 0}, {"layers": ()}, {"mu": 0.7}, {"vote_window": 8},
                                     {"relation_scale": "sigmoid"}, {"align_scale": "x"}, {"align_within": "x"}, {"inverse": False},
                                     {"align_reduction": "sum"}, {"inversion": "wavelet"}, {"normalise_features": True}, {"hidden": 0}, {"per_head": True, "source": "tokens"}])
def test_settings_that_cannot_be_are_named(options):
    name = "rectify" if "inverse" in options else next(iter(options))
    with pytest.raises(InputError, match=f"{name}="): DualAffinitySettings(**options)

def test_features_that_do_not_fit_are_named(features):
    with pytest.raises(InputError, match=r"do not fit affinities of 2 images"): DualAffinity(4)(features, normal(2, 6, 5, 5))
    with pytest.raises(InputError, match=r"\(B, 8, N, N\)"): DualAffinity(8)(features)
    with pytest.raises(InputError, match="how='max'"): combine_affinities(torch.eye(4)[None], torch.eye(4)[None], "max")
