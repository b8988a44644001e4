"""The loss room: every loss equals its equation written as loops; empty sides and ignored pixels count nothing."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity as skimage_ssim
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

import freqseg.losses as loss_room
from freqseg.files import InputError
from freqseg.losses import (
    MaskTargets, affinity_loss, balanced_cross_entropy, class_targets, dense_energy_loss, dice_loss, focal_loss, mask_losses, nearest_labels,
    neighbour_window, pair_labels, ssim_loss, structural_similarity,
)

seeds = st.integers(0, 10_000)


def random_labels(seed: int, batch: int, height: int, width: int, choices: tuple[int, ...] = (0, 0, 1, 2, 255)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(choices)[torch.randint(len(choices), (batch, height, width), generator=generator)]


def random_normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- balanced cross-entropy -----------------------------------------------------------------------------------------

def looped_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    "Pixel by pixel."
    sides: dict[bool, list[float]] = {True: [], False: []}
    for b, i, j in itertools.product(*map(range, labels.shape)):
        label = int(labels[b, i, j])
        if label != 255:
            scores = logits[b, :, i, j].numpy()
            sides[label == 0].append(float(np.log(np.exp(scores).sum()) - scores[label]))
    return sum(sum(side) / len(side) for side in sides.values() if side) / 2


@settings(max_examples=40)
@given(seed=seeds, batch=st.integers(1, 3), height=st.integers(1, 5), width=st.integers(1, 5),
       choices=st.sampled_from([(0, 0, 1, 2, 255), (0,), (1, 2), (255,), (0, 255), (2, 255)]))
def test_cross_entropy_in_halves_equals_the_loop_empty_sides_included(seed, batch, height, width, choices) -> None:
    logits, labels = random_normal(seed, batch, 3, height, width), random_labels(seed, batch, height, width, choices)
    assert math.isclose(balanced_cross_entropy(logits, labels).item(), looped_cross_entropy(logits, labels), abs_tol=1e-9)


def test_cross_entropy_has_right_gradients_and_none_at_ignored_pixels() -> None:
    logits, labels = random_normal(1, 2, 3, 4, 3).requires_grad_(), random_labels(3, 2, 4, 3)
    assert torch.autograd.gradcheck(lambda x: balanced_cross_entropy(x, labels), logits)
    (gradient,) = torch.autograd.grad(balanced_cross_entropy(logits, labels), logits)
    ignored = labels == 255
    assert ignored.any() and not gradient.movedim(1, -1)[ignored].any() and gradient.movedim(1, -1)[~ignored].any(-1).all()


def test_without_any_label_loss_and_gradient_are_zero() -> None:
    logits = random_normal(0, 1, 3, 4, 4).requires_grad_()
    loss = balanced_cross_entropy(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


@given(copies=st.integers(1, 30))
def test_more_background_of_the_same_kind_does_not_change_the_loss(copies: int) -> None:
    logits, labels = random_normal(2, 1, 3, 1, 2), torch.tensor([[[0, 2]]])
    repeated = torch.cat([logits[..., :1].expand(-1, -1, -1, copies), logits[..., 1:]], -1)
    wide = torch.tensor([[[0] * copies + [2]]])
    torch.testing.assert_close(balanced_cross_entropy(repeated, wide), balanced_cross_entropy(logits, labels))


def test_other_values_may_mean_background_and_ignore() -> None:
    logits, labels = random_normal(5, 2, 3, 4, 4), random_labels(5, 2, 4, 4)
    swapped = torch.where(labels == 255, -1, (labels + 1) % 3)
    torch.testing.assert_close(balanced_cross_entropy(logits.roll(1, 1), swapped, background=1, ignore=-1),
                               balanced_cross_entropy(logits, labels))


def test_coarse_logits_are_resized_to_the_labels() -> None:
    logits, labels = random_normal(0, 2, 3, 4, 5), random_labels(0, 2, 16, 20)
    fine = F.interpolate(logits, (16, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(balanced_cross_entropy(logits, labels), balanced_cross_entropy(fine, labels))
    with pytest.raises(InputError, match="one per picture"):
        balanced_cross_entropy(logits, labels[:1])


# ---- pairs ----------------------------------------------------------------------------------------------------------

@settings(max_examples=60)
@given(height=st.integers(1, 70), width=st.integers(1, 70), h=st.integers(1, 12), w=st.integers(1, 12), centre=st.booleans())
def test_patch_labels_equal_those_of_torchs_nearest_interpolation(height, width, h, w, centre) -> None:
    labels = torch.arange(height * width).view(1, height, width)
    mode = "nearest-exact" if centre else "nearest"
    expected = F.interpolate(labels[:, None].double(), (h, w), mode=mode)[:, 0].flatten(1).long()
    assert torch.equal(nearest_labels(labels, (h, w), centre), expected)


def looped_pairs(labels: Tensor, grid: tuple[int, int], radius: int) -> tuple[np.ndarray, np.ndarray]:
    "Pair by pair."
    (h, w), n = grid, grid[0] * grid[1]
    positive, negative = np.zeros((2, len(labels), n, n), bool)
    for b, i, j in itertools.product(range(len(labels)), range(n), range(n)):
        (row_i, column_i), (row_j, column_j) = divmod(i, w), divmod(j, w)
        y_i = labels[b, row_i * labels.shape[1] // h, column_i * labels.shape[2] // w]
        y_j = labels[b, row_j * labels.shape[1] // h, column_j * labels.shape[2] // w]
        if max(abs(row_i - row_j), abs(column_i - column_j)) <= radius and y_i != 255 and y_j != 255:
            (positive if y_i == y_j else negative)[b, i, j] = True
    return positive, negative


@settings(max_examples=15)
@given(seed=seeds, h=st.integers(1, 5), w=st.integers(1, 5), stride=st.integers(1, 3), radius=st.integers(0, 5))
def test_pairs_equal_the_loop(seed, h, w, stride, radius) -> None:
    labels = random_labels(seed, 2, h * stride, w * stride)
    positive, negative = pair_labels(labels, (h, w), radius)
    expected = looped_pairs(labels, (h, w), radius)
    np.testing.assert_array_equal(positive, expected[0])
    np.testing.assert_array_equal(negative, expected[1])


@given(seed=seeds, radius=st.integers(0, 9))
def test_pairs_are_symmetric_exclusive_and_grow_with_the_radius(seed: int, radius: int) -> None:
    labels = random_labels(seed, 2, 12, 10)
    positive, negative = pair_labels(labels, (6, 5), radius)
    wider = pair_labels(labels, (6, 5), radius + 1)
    assert torch.equal(positive, positive.mT) and torch.equal(negative, negative.mT) and not (positive & negative).any()
    assert not (positive & ~wider[0]).any() and not (negative & ~wider[1]).any()


def test_radius_zero_is_each_known_patch_with_itself_and_ignored_patches_have_no_pairs() -> None:
    labels = random_labels(0, 1, 5, 5)
    positive, negative = pair_labels(labels, (5, 5), radius=0)
    assert torch.equal(positive[0], torch.diag(labels.flatten() != 255)) and not negative.any()
    assert not any(pairs.any() for pairs in pair_labels(torch.full((2, 8, 8), 255), (4, 4)))
    with pytest.raises(InputError, match="radius=-1"):
        pair_labels(labels, (5, 5), radius=-1)


def test_the_published_window_covers_seventeen_patches_each_way() -> None:
    labels = torch.zeros(1, 320, 320, dtype=torch.int64)
    positive, _ = pair_labels(labels, (20, 20))
    assert positive[0, 10 * 20 + 10].sum() == 17 * 17 and positive[0, 0].sum() == 9 * 9


def test_the_window_is_made_once_even_when_first_asked_for_in_inference_mode() -> None:
    neighbour_window.cache_clear()
    with torch.inference_mode():
        first = neighbour_window((6, 7), 2)
    assert neighbour_window((6, 7), 2) is first and not first.is_inference()
    affinity = torch.rand(1, 42, 42, requires_grad=True)
    affinity_loss(affinity, *pair_labels(random_labels(0, 1, 6, 7), (6, 7), 2)).backward()
    assert affinity.grad.any()


# ---- affinity loss --------------------------------------------------------------------------------------------------

@settings(max_examples=25)
@given(seed=seeds, batch=st.integers(1, 3), n=st.integers(1, 6),
       choices=st.sampled_from([(0, 1, 2), (0,), (1,), (2,), (0, 1), (1, 2)]))
def test_the_affinity_loss_equals_the_loop_empty_masks_included(seed, batch, n, choices) -> None:
    kind = random_labels(seed, batch, n, n, choices)  # 0 = neither, 1 = positive, 2 = negative
    affinity = random_normal(seed, batch, n, n).sigmoid()
    sums, counts = {1: 0.0, 2: 0.0}, {1: 1, 2: 1}
    for b, i, j in itertools.product(range(batch), range(n), range(n)):
        which = int(kind[b, i, j])
        if which:
            sums[which] += float(1 - affinity[b, i, j] if which == 1 else affinity[b, i, j])
            counts[which] += 1
    expected = (sums[1] / counts[1] + sums[2] / counts[2]) / 2
    assert math.isclose(affinity_loss(affinity, kind == 1, kind == 2).item(), expected, abs_tol=1e-12)


def test_the_affinity_loss_is_zero_exactly_for_ideal_affinities_and_for_no_pairs() -> None:
    positive, negative = pair_labels(random_labels(1, 2, 5, 5), (5, 5))
    assert affinity_loss(positive.float(), positive, negative) == 0
    assert affinity_loss((~negative).float(), positive, negative) == 0  # whatever the uncounted pairs say
    none = torch.zeros_like(positive)
    affinity = torch.rand(2, 25, 25, requires_grad=True)
    loss = affinity_loss(affinity, none, none)
    loss.backward()
    assert loss == 0 and not affinity.grad.any()


def test_the_affinity_loss_pulls_positives_up_pushes_negatives_down_and_leaves_the_rest() -> None:
    positive, negative = pair_labels(random_labels(2, 2, 4, 4), (4, 4), radius=2)
    affinity = random_normal(0, 2, 16, 16).sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: affinity_loss(a, positive, negative), affinity)
    affinity_loss(affinity, positive, negative).backward()
    expected = -1.0 * positive / (2 * (positive.sum() + 1)) + negative / (2 * (negative.sum() + 1))
    torch.testing.assert_close(affinity.grad, expected.double(), rtol=1e-5, atol=0)


def test_the_affinity_loss_adds_up_bfloat16_in_float32_and_refuses_shapes_that_differ() -> None:
    labels = torch.zeros(1, 64, 64, dtype=torch.int64)
    positive, negative = pair_labels(labels, (16, 16))
    loss = affinity_loss(torch.full((1, 256, 256), 0.75, dtype=torch.bfloat16), positive, negative)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor(0.125), rtol=1e-3, atol=0)
    with pytest.raises(InputError, match="must agree"):
        affinity_loss(torch.zeros(1, 9, 9), positive, negative)


# ---- dense energy ---------------------------------------------------------------------------------------------------

def random_picture(seed: int, batch: int, height: int, width: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    return random_normal(seed, batch, 3, height, width).sigmoid(), (2 * random_normal(seed + 1, batch, classes, height, width)).softmax(1)


def looped_energy(image: Tensor, probs: Tensor, labels: Tensor, region: Tensor, sigma_rgb: float, sigma_xy: float) -> tuple[float, float]:
    "Both forms, pixel pair by pixel pair."
    means, sums = [], []
    for b in range(len(image)):
        pixels = [(i, j) for i, j in itertools.product(*map(range, image.shape[-2:])) if region[b, i, j]]
        energy = mass = agreement = 0.0
        for (i, j), (k, m) in itertools.product(pixels, pixels):
            colour = 255 * (image[b, :, i, j] - image[b, :, k, m])
            kernel = math.exp(-((i - k) ** 2 + (j - m) ** 2) / (2 * sigma_xy**2) - float(colour @ colour) / (2 * sigma_rgb**2))
            s, t = probs[b, :, i, j], probs[b, :, k, m]
            gate = 1.0 if labels[b, i, j] == 255 else 1 - float(s.max())
            energy, agreement, mass = energy + gate * kernel * (1 - float(s @ t)), agreement + gate * kernel * float(s @ t), mass + kernel
        means.append(energy / mass if mass else 0.0)
        sums.append(-1e-7 * agreement)
    return sum(means) / len(means), sum(sums) / len(sums)


@settings(max_examples=6)
@given(seed=seeds, height=st.integers(1, 4), width=st.integers(1, 5), one_sided=st.booleans(), empty=st.booleans())
def test_dense_energy_equals_the_loop_in_both_forms(seed, height, width, one_sided, empty) -> None:
    image, probs = random_picture(seed, 2, height, width)
    labels, region = random_labels(seed, 2, height, width, (0, 1, 255)), random_labels(seed, 2, height, width, (0, 1, 1)).bool()
    if empty: region[0] = False
    expected = looped_energy(image, probs, labels, region, 60.0, 2.0)
    options = dict(labels=labels, region=region, sigma_rgb=60.0, sigma_xy=2.0, scale=1.0, one_sided=one_sided)
    for form, value in zip(("mean", "sum"), expected, strict=True):
        torch.testing.assert_close(dense_energy_loss(image, probs, form=form, **options).item(), value, rtol=1e-6, atol=1e-15)


def test_the_two_sided_gradient_is_that_of_the_value_with_the_gate_held() -> None:
    image, probs = random_picture(3, 2, 4, 3)
    valid, gate = torch.ones(2, 12, dtype=torch.float64), random_normal(5, 2, 12).sigmoid()
    features = loss_room._place_and_colour(image, 2.0, 60.0)
    for form in ("mean", "sum"):
        scale = 1 if form == "mean" else 1e7
        energy = lambda p: scale * loss_room._energy(p, features, valid, gate, form, False)  # noqa: B023, E731
        assert torch.autograd.gradcheck(energy, probs.flatten(2).requires_grad_())


def test_the_kernel_sum_is_its_own_adjoint_twice() -> None:
    features = random_normal(0, 2, 6, 5)
    run = lambda x: loss_room._BilateralSum.apply(x, features)  # noqa: E731
    x = random_normal(1, 2, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(run, x) and torch.autograd.gradgradcheck(run, x)


def test_the_one_sided_gradient_is_the_published_one() -> None:
    image, probs = random_picture(4, 2, 4, 5)
    labels = random_labels(4, 2, 4, 5, (0, 1, 255))
    probs.requires_grad_()
    loss = dense_energy_loss(image, probs, labels, sigma_rgb=60.0, sigma_xy=2.0, scale=1.0, form="sum")
    (gradient,) = torch.autograd.grad(1e7 * loss, probs)
    features = loss_room._place_and_colour(image, 2.0, 60.0)
    kernel = torch.exp(-0.5 * (features[:, :, None] - features[:, None]).square().sum(-1))
    gate = torch.where(labels == 255, 1, 1 - probs.amax(1)).flatten(1)
    expected = -2 * gate[:, None] * (probs.flatten(2) @ kernel) / 2  # two pictures
    torch.testing.assert_close(gradient.flatten(2), expected)


def test_pixels_that_have_made_up_their_minds_are_left_in_peace_unless_unlabelled() -> None:
    image, probs = random_picture(6, 1, 4, 4)
    probs[0, :, 0] = torch.tensor([1.0, 0, 0])[:, None]
    probs.requires_grad_()
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    labels[0, 0, 3] = 255
    dense_energy_loss(image, probs, labels, scale=1.0).backward()
    still = ~probs.grad.abs().sum(1)[0].bool()
    assert still[0].tolist() == [True, True, True, False] and not still[1:].any()


@pytest.mark.parametrize("one_sided", [True, False])
def test_pieces_of_the_kernel_add_up_to_the_whole(monkeypatch, one_sided: bool) -> None:
    image, probs = random_picture(7, 2, 6, 5)
    probs.requires_grad_()
    run = lambda: torch.autograd.grad(dense_energy_loss(image, probs, scale=1.0, one_sided=one_sided), probs)[0]  # noqa: E731
    whole = run()
    monkeypatch.setattr(loss_room, "PIECE", 2 * 30 * 7)
    torch.testing.assert_close(run(), whole)


def test_a_batch_is_the_mean_of_its_pictures_and_padding_takes_no_part() -> None:
    image, probs = random_picture(8, 3, 5, 6)
    alone = [dense_energy_loss(image[i:i + 1], probs[i:i + 1], scale=1.0) for i in range(3)]
    torch.testing.assert_close(dense_energy_loss(image, probs, scale=1.0), torch.stack(alone).mean())
    region = torch.ones(1, 9, 8, dtype=torch.bool)
    region[:, 5:], region[:, :, 6:] = False, False
    padded_image, padded_probs = F.pad(image[:1], (0, 2, 0, 4), value=0.5), F.pad(probs[:1], (0, 2, 0, 4), value=1 / 3)
    torch.testing.assert_close(dense_energy_loss(padded_image, padded_probs, region=region, scale=1.0), alone[0])


def test_equal_certain_maps_cost_nothing_and_no_valid_pixel_gives_zero_not_nan() -> None:
    image, probs = random_picture(9, 1, 8, 8)
    certain = F.one_hot(torch.ones(1, 8, 8, dtype=torch.int64), 3).permute(0, 3, 1, 2).double()
    assert dense_energy_loss(image, certain, torch.full((1, 8, 8), 255), scale=1.0).abs() < 1e-12
    probs.requires_grad_()
    loss = dense_energy_loss(image, probs, region=torch.zeros(1, 8, 8, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not probs.grad.any()


@given(classes=st.integers(2, 6), side=st.integers(1, 12))
def test_a_flat_picture_with_no_idea_costs_the_same_at_every_size(classes: int, side: int) -> None:
    flat, uniform = torch.full((1, 3, side, side), 0.3), torch.full((1, classes, side, side), 1 / classes)
    torch.testing.assert_close(dense_energy_loss(flat, uniform, scale=1.0).item(), (1 - 1 / classes) ** 2, rtol=1e-5, atol=0)


def test_a_mask_along_the_outline_is_cheaper_than_one_beside_it() -> None:
    image = torch.full((1, 3, 32, 32), 0.2)
    image[..., 12:] = 0.8
    unlabelled = torch.full((1, 32, 32), 255)
    edges = {at: F.one_hot((torch.arange(32) >= at).long(), 2).T.expand(32, 2, 32).transpose(0, 1)[None].float() for at in (8, 12, 16)}
    cost = {at: dense_energy_loss(image, probs, unlabelled, scale=0.5).item() for at, probs in edges.items()}
    assert cost[12] < 0.1 * min(cost[8], cost[16])


def test_coarse_bfloat16_probabilities_work_and_autocast_changes_nothing() -> None:
    image, probs = (x.float() for x in random_picture(10, 2, 32, 48))
    coarse = F.avg_pool2d(probs, 4)
    loss = dense_energy_loss(image, coarse)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(dense_energy_loss(image, coarse), loss)
    low = dense_energy_loss(image, coarse.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss, rtol=0.01, atol=0)


@pytest.mark.parametrize(("options", "message"), [({"scale": 0.0}, "scale=0"), ({"scale": 2.0}, "scale=2"), ({"form": "median"}, "median")])
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    image, probs = random_picture(0, 1, 4, 4)
    with pytest.raises(InputError, match=message):
        dense_energy_loss(image, probs, **options)


def test_pictures_and_maps_must_be_as_many() -> None:
    image, probs = random_picture(0, 2, 4, 4)
    with pytest.raises(InputError, match="one map per picture"):
        dense_energy_loss(image, probs[:1])


@pytest.mark.cuda
def test_losses_on_a_device_equal_those_on_the_cpu() -> None:
    image, probs = (x.float() for x in random_picture(11, 2, 24, 24))
    labels = random_labels(11, 2, 24, 24)
    torch.testing.assert_close(dense_energy_loss(image.cuda(), probs.cuda(), labels.cuda()).cpu(), dense_energy_loss(image, probs, labels))
    pairs = pair_labels(labels.cuda(), (6, 6))
    affinity = torch.rand(2, 36, 36)
    torch.testing.assert_close(affinity_loss(affinity.cuda(), *pairs).cpu(), affinity_loss(affinity, *(p.cpu() for p in pairs)))


# ---- targets of masks by name ---------------------------------------------------------------------------------------

CHOICES = (0, 1, 2, 7, 254, 255)  # background, classes, a class nobody asks for, unlabelled, ignored
MASK_LOSSES = {"focal": focal_loss, "dice": dice_loss, "ssim": ssim_loss, "ssim of all": lambda x, t: ssim_loss(x, t, "all")}
mask_loss = pytest.mark.parametrize("loss", MASK_LOSSES.values(), ids=MASK_LOSSES)
both_ways = pytest.mark.parametrize("negative", [True, False], ids=["ignored as negative", "ignored left out"])


@settings(max_examples=20)
@given(seed=seeds, classes=st.lists(st.sampled_from([0, 1, 2, 3, 9]), min_size=1, unique=True), negative=st.booleans(), as_tensor=st.booleans())
def test_targets_are_one_mask_per_class_in_the_order_asked_for(seed, classes, negative, as_tensor) -> None:
    labels = random_labels(seed, 2, 4, 5, CHOICES)
    targets = class_targets(labels, torch.tensor(classes) if as_tensor else classes, negative)
    for b, (c, value) in itertools.product(range(2), enumerate(classes)):
        assert torch.equal(targets.masks[b, c], labels[b] == value) and targets.present[b, c] == (labels[b] == value).any()
    if negative: assert targets.counted is None
    else: assert torch.equal(targets.counted, torch.isin(labels, torch.tensor(classes)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_type_give_the_same_targets(dtype: torch.dtype) -> None:
    labels = random_labels(0, 2, 4, 5, CHOICES)
    assert torch.equal(class_targets(labels.to(dtype), [2, 1]).masks, class_targets(labels, [2, 1]).masks)


@pytest.mark.parametrize("classes", [[], [1, 2, 1], torch.tensor([3, 3])])
def test_no_classes_and_doubled_classes_are_refused(classes) -> None:
    with pytest.raises(InputError, match="each once"): class_targets(torch.zeros(1, 2, 2, dtype=torch.int64), classes)


# ---- focal, dice and SSIM against loops -----------------------------------------------------------------------------

def looped_similarity(x: np.ndarray, y: np.ndarray, counted: np.ndarray) -> np.ndarray:
    "SSIM pixel by pixel: a window of 11 x 11 cut off at the border and at pixels that do not count."
    height, width = x.shape
    found = np.zeros_like(x)
    for i, j in itertools.product(range(height), range(width)):
        places = [(k, m) for k in range(i - 5, i + 6) for m in range(j - 5, j + 6) if 0 <= k < height and 0 <= m < width and counted[k, m]]
        if not places: continue
        weight = np.array([math.exp(-((k - i) ** 2 + (m - j) ** 2) / 4.5) for k, m in places])
        weight /= weight.sum()
        a, b = (np.array([image[place] for place in places]) for image in (x, y))
        mean_a, mean_b = weight @ a, weight @ b
        var_a, var_b, cov = weight @ (a - mean_a) ** 2, weight @ (b - mean_b) ** 2, weight @ ((a - mean_a) * (b - mean_b))
        found[i, j] = (2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4) / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
    return found


def looped_criterion(logits: Tensor, labels: Tensor, classes: list[int], negative: bool) -> dict[str, float]:
    "The criterion picture by picture and class by class, as published: pixels of no class are negatives or left out."
    sums, pairs, masks = dict.fromkeys(MASK_LOSSES, 0.0), 0, logits.shape[0] * logits.shape[1]
    for picture, label in zip(logits, labels.numpy(), strict=True):
        counted = np.ones(label.shape, bool) if negative else np.isin(label, classes)
        for score, value in zip(picture.numpy(), classes, strict=True):
            mask = label == value
            p = 1 / (1 + np.exp(-score))
            right = np.where(mask, p, 1 - p)
            focal = np.where(mask, 0.25, 0.75) * (1 - right) ** 2 * -np.log(right)
            if counted.any():
                sums["focal"] += focal[counted].mean()
                unlike = (1 - looped_similarity(p, mask.astype(float), counted))[counted].mean()
                sums["ssim of all"] += unlike / masks
            if mask.any():
                pairs += 1
                sums["dice"] += 1 - (2 * p[mask].sum() + 1) / (p[counted].sum() + mask.sum() + 1)
                sums["ssim"] += unlike
    return {name: total if name == "ssim of all" else total / max(pairs, 1) for name, total in sums.items()}


@settings(max_examples=12)
@given(seed=seeds, height=st.integers(1, 9), width=st.integers(1, 13), negative=st.booleans(),
       choices=st.sampled_from([CHOICES, (0, 1), (7, 254), (255,), (2, 255)]))
def test_losses_of_masks_equal_the_criterion_in_loops_nothing_present_included(seed, height, width, negative, choices) -> None:
    labels, logits, classes = random_labels(seed, 2, height, width, choices), 2 * random_normal(seed, 2, 3, height, width), [2, 0, 1]
    targets, expected = class_targets(labels, classes, negative), looped_criterion(logits, labels, classes, negative)
    for name, loss in MASK_LOSSES.items():
        assert math.isclose(loss(logits, targets).item(), expected[name], rel_tol=1e-8, abs_tol=1e-12), name


@pytest.mark.parametrize("shape", [(40, 37), (11, 12), (64, 16)])
def test_ssim_equals_scikit_image_and_torchmetrics_away_from_the_border(shape: tuple[int, int]) -> None:
    x, y = random_normal(0, 2, *shape).sigmoid(), (random_normal(1, 2, *shape) > 0.3).double()
    ours = structural_similarity(x, y)
    for p, q, found in zip(x.numpy(), y.numpy(), ours.numpy(), strict=True):
        _, full = skimage_ssim(p, q, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True)
        np.testing.assert_allclose(found[5:-5, 5:-5], full[5:-5, 5:-5], atol=1e-12)
    options = dict(data_range=1.0, gaussian_kernel=True, sigma=1.5, kernel_size=11, reduction="none", return_full_image=True)
    _, full = structural_similarity_index_measure(x[:, None], y[:, None], **options)
    torch.testing.assert_close(ours[:, 5:-5, 5:-5], full[:, 0, 5:-5, 5:-5], rtol=0, atol=1e-6)


def test_ssim_is_one_for_equal_maps_symmetric_and_within_bounds() -> None:
    x, y, counted = random_normal(2, 3, 15, 9).sigmoid(), random_normal(3, 3, 15, 9).sigmoid(), random_normal(4, 3, 15, 9) > 0
    for some in (None, counted):
        torch.testing.assert_close(structural_similarity(x, x, some), torch.ones_like(x))
        torch.testing.assert_close(structural_similarity(x, y, some), structural_similarity(y, x, some))
        assert structural_similarity(x, y, some).abs().max() <= 1 + 1e-9
    assert structural_similarity(x[:, :1, :1], y[:, :1, :1]).shape == (3, 1, 1) and structural_similarity(x[:0], y[:0]).shape == (0, 15, 9)


def test_flat_maps_are_compared_by_their_level_alone() -> None:
    p = torch.tensor([0.0, 0.01, 0.5])[:, None, None].expand(3, 20, 20)
    torch.testing.assert_close(structural_similarity(p, torch.zeros(3, 20, 20)).mean((1, 2)), torch.tensor([1, 0.5, 1e-4 / 0.2501]), rtol=1e-3, atol=1e-6)


# ---- pixels that are left out ---------------------------------------------------------------------------------------

@mask_loss
def test_what_is_left_out_has_neither_value_nor_gradient(loss) -> None:
    labels, logits = random_labels(5, 2, 14, 12, CHOICES), random_normal(5, 2, 2, 14, 12).requires_grad_()
    targets = class_targets(labels, [1, 2], ignored_as_negative=False)
    loss(logits, targets).backward()
    outside = ~targets.counted[:, None].expand_as(logits)
    assert outside.any() and not logits.grad[outside].any() and logits.grad[~outside].any()
    other = torch.where(outside, -3 * logits, logits)
    torch.testing.assert_close(loss(other, targets), loss(logits, targets))


@mask_loss
def test_a_border_that_is_left_out_is_as_if_it_were_not_there(loss) -> None:
    labels, logits = random_labels(6, 2, 9, 8, (1, 2)), random_normal(6, 2, 2, 9, 8)
    padded = class_targets(F.pad(labels, (2, 3, 4, 0), value=255), [1, 2], ignored_as_negative=False)
    torch.testing.assert_close(loss(F.pad(logits, (2, 3, 4, 0), value=5.0), padded), loss(logits, class_targets(labels, [1, 2])))


@mask_loss
@both_ways
@pytest.mark.parametrize("value", [255, 254, 7])
def test_without_any_class_nothing_is_nan_and_only_negatives_are_taught(loss, negative: bool, value: int) -> None:
    logits = random_normal(7, 2, 3, 6, 5).requires_grad_()
    result = loss(logits, class_targets(torch.full((2, 6, 5), value), [0, 1, 2], negative))
    result.backward()
    teaches = negative and loss in (focal_loss, MASK_LOSSES["ssim of all"])
    assert (result > 0) == teaches and logits.grad.isfinite().all()
    assert (logits.grad > 0).all() if teaches and loss is focal_loss else logits.grad.any() == teaches


# ---- gradients, vocabulary, precision, size -------------------------------------------------------------------------

@mask_loss
@both_ways
def test_losses_of_masks_have_right_gradients(loss, negative: bool) -> None:
    targets = class_targets(random_labels(8, 2, 5, 4, CHOICES), [1, 0], negative)
    assert targets.present.any()
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), random_normal(8, 2, 2, 3, 4).requires_grad_())


def test_dice_and_ssim_of_present_masks_do_not_depend_on_what_else_is_asked_for() -> None:
    labels, logits = random_labels(9, 2, 7, 7, (1, 2, 255)), random_normal(9, 2, 5, 7, 7)
    few, many = class_targets(labels, [1, 2]), class_targets(labels, [1, 2, 3, 4, 5])
    for loss in (dice_loss, ssim_loss): torch.testing.assert_close(loss(logits, many), loss(logits[:, :2], few))
    assert focal_loss(logits, many) > focal_loss(logits[:, :2], few)  # false alarms of the others


@mask_loss
def test_the_order_of_classes_and_pictures_does_not_matter(loss) -> None:
    labels, logits, order = random_labels(10, 3, 6, 6, CHOICES), random_normal(10, 3, 3, 6, 6), [2, 0, 1]
    expected = loss(logits, class_targets(labels, [0, 1, 2]))
    torch.testing.assert_close(loss(logits[:, order], class_targets(labels, order)), expected)
    torch.testing.assert_close(loss(logits[order], class_targets(labels[order], [0, 1, 2])), expected)


@mask_loss
def test_masks_are_judged_in_float32_whatever_autocast_and_bfloat16_say(loss) -> None:
    targets = class_targets(random_labels(11, 2, 24, 20, CHOICES), [0, 1, 2])
    coarse = random_normal(11, 2, 3, 6, 5).float()
    expected = loss(coarse, targets)
    with torch.autocast("cpu", torch.bfloat16): torch.testing.assert_close(loss(coarse, targets), expected, rtol=0, atol=0)
    low = loss(coarse.bfloat16(), targets)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(loss(F.interpolate(coarse, (24, 20), mode="bilinear", align_corners=False), targets), expected)


@mask_loss
def test_right_and_sure_masks_cost_nothing_and_extreme_ones_are_finite(loss) -> None:
    targets = class_targets(random_labels(12, 2, 12, 12, (0, 1, 2)), [0, 1, 2])
    sure = 2 * targets.masks.float() - 1
    assert loss(30 * sure, targets) < 1e-3
    for logits in (-1e4 * sure, 1e4 * sure):
        logits.requires_grad_()
        loss(logits, targets).backward()
        assert logits.grad.isfinite().all()


def test_all_terms_are_weighted_named_and_share_one_enlargement(monkeypatch) -> None:
    labels, logits, classes = random_labels(13, 2, 16, 12, CHOICES), random_normal(13, 2, 3, 4, 3).float(), [0, 1, 2]
    sizes, plain = [], F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, size, **o: sizes.append(tuple(size)) or plain(x, size, **o))
    terms = mask_losses(logits, labels, classes, focal=20, dice=2, ssim=3, over="all")
    assert sizes == [(16, 12)] and list(terms) == ["focal", "dice", "ssim"]
    targets = class_targets(labels, classes)
    for name, weight, value in (("focal", 20, focal_loss(logits, targets)), ("dice", 2, dice_loss(logits, targets)), ("ssim", 3, ssim_loss(logits, targets, "all"))):
        torch.testing.assert_close(terms[name], weight * value)
    usual = mask_losses(logits, labels, classes)
    torch.testing.assert_close(usual, {"focal": 5 * terms["focal"], "dice": terms["dice"] / 2})
    left_out = mask_losses(logits, labels, classes, ssim=1, ignored_as_negative=False)
    torch.testing.assert_close(left_out["ssim"], ssim_loss(logits, class_targets(labels, classes, False)))


@pytest.mark.parametrize(("options", "message"), [
    ({"focal": 0, "dice": 0}, "above 0"), ({"ssim": -1}, "negative"), ({"ssim": 1, "over": "some"}, "over='some'"), ({"classes": [1, 2]}, "2 classes"),
])
def test_losses_of_masks_refuse_what_makes_no_sense(options: dict, message: str) -> None:
    labels, logits = random_labels(0, 2, 4, 4), random_normal(0, 2, 3, 4, 4)
    with pytest.raises(InputError, match=message): mask_losses(logits, labels, **{"classes": [0, 1, 2], **options})
    with pytest.raises(InputError, match="1 label maps"): mask_losses(logits, labels[:1], [0, 1, 2])


@pytest.mark.cuda
@both_ways
def test_losses_of_masks_on_a_device_equal_those_on_the_cpu(negative: bool) -> None:
    labels, logits = random_labels(14, 2, 40, 36, CHOICES), random_normal(14, 2, 3, 10, 9).float()
    options = dict(ssim=1.0, ignored_as_negative=negative)
    expected = mask_losses(logits, labels, [0, 1, 2], **options)
    for classes in ([0, 1, 2], torch.tensor([0, 1, 2]).cuda()):
        found = mask_losses(logits.cuda(), labels.cuda(), classes, **options)
        torch.testing.assert_close({name: value.cpu() for name, value in found.items()}, expected, rtol=1e-4, atol=1e-5)


def test_targets_name_their_parts() -> None:
    assert MaskTargets._fields == ("masks", "present", "counted")
