"""freqseg.metrics against definitions written out slowly, scikit-learn, SciPy and torchmetrics."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage
from sklearn.metrics import average_precision_score, jaccard_score, precision_score, recall_score, roc_auc_score
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from freqseg import metrics
from freqseg.files import InputError
from freqseg.metrics import (
    ConfusionMeter,
    affinity_auc,
    average_precision,
    best_threshold,
    boundary_band,
    boundary_confusion,
    boundary_distance,
    boundary_iou,
    boundary_width,
    bootstrap_average_precision,
    bootstrap_interval,
    class_iou,
    confusion_matrix,
    gzss_scores,
    iou_scores,
    mean_average_precision,
    mean_iou,
    patch_labels,
    rank_auc,
    sweep_background,
    trimap_confusion,
    trimap_miou,
)

CLASSES = 4
few = settings(max_examples=25)


def blobs(seed, images=3, height=41, width=57, classes=CLASSES, void=0.05):
    "Label maps with regions of all sizes, and ignored pixels along some of their borders."
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.normal(size=(images, classes, height, width)), (0, 0, 3, 3))
    labels = fields.argmax(1).astype(np.uint8)
    edge = boundary_band(labels, 1).numpy() & (rng.random(labels.shape) < 10 * void)
    edge[:, [0, -1]] = edge[:, :, [0, -1]] = False
    return np.where(edge, 255, labels).astype(np.uint8)


def guess(seed, like, classes=CLASSES, wrong=0.15):
    "A prediction: mostly the labels, elsewhere anything."
    rng = np.random.default_rng(1000 + seed)
    noise = rng.integers(0, classes, like.shape)
    return np.where((rng.random(like.shape) < wrong) | (like == 255), noise, like)


label_pairs = st.integers(1, 3).flatmap(lambda images: st.tuples(
    hnp.arrays(np.int64, (images, 5, 7), elements=st.integers(0, CLASSES - 1)),
    hnp.arrays(np.uint8, (images, 5, 7), elements=st.sampled_from([*range(CLASSES), 255]))))


# confusion matrix and IoU


@few
@given(label_pairs)
def test_confusion_matrix_counts_pairs_of_labelled_pixels(pair):
    pred, target = pair
    slow = np.zeros((CLASSES, CLASSES), int)
    for t, p in zip(target.flat, pred.flat, strict=True):
        if t != 255: slow[t, p] += 1
    counts = confusion_matrix(pred, target, CLASSES)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts, slow)


@few
@given(label_pairs)
def test_matrices_of_parts_add_up_and_per_image_matrices_are_the_parts(pair):
    pred, target = pair
    parts = confusion_matrix(pred, target, CLASSES, per_image=True)
    assert parts.shape == (len(pred), CLASSES, CLASSES)
    for part, p, t in zip(parts, pred, target, strict=True): assert (part == confusion_matrix(p, t, CLASSES)).all()
    assert (parts.sum(0) == confusion_matrix(pred, target, CLASSES)).all()


@few
@given(label_pairs, st.permutations(range(CLASSES)))
def test_scores_follow_a_renaming_of_the_classes(pair, order):
    pred, target = pair
    rename = np.arange(256)
    rename[:CLASSES] = order
    before = iou_scores(confusion_matrix(pred, target, CLASSES))
    after = iou_scores(confusion_matrix(rename[pred], rename[target], CLASSES))
    np.testing.assert_allclose(after.iou[list(order)], before.iou)
    np.testing.assert_allclose(after.miou, before.miou)


def test_input_kind_does_not_matter():
    target = blobs(0)[0]
    pred = guess(0, target).astype(np.uint8)
    expected = confusion_matrix(pred, target, CLASSES)
    read_only = Image.fromarray(target)
    for kind in (np.int64, np.int32, np.uint16, np.int16):
        assert (confusion_matrix(pred.astype(kind), target.astype(kind), CLASSES) == expected).all()
    assert (confusion_matrix(torch.from_numpy(pred), read_only, CLASSES) == expected).all()
    assert (confusion_matrix(torch.from_numpy(pred).long(), target[..., ::1], CLASSES) == expected).all()


def test_matches_torchmetrics_on_a_set():
    masks = blobs(1, images=6, classes=21)
    pred = guess(1, masks, classes=21)
    tensors = torch.from_numpy(pred), torch.from_numpy(masks).long()
    counts = confusion_matrix(pred, masks, 21)
    assert (counts == MulticlassConfusionMatrix(21, ignore_index=255)(*tensors)).all()
    assert iou_scores(counts).miou == pytest.approx(MulticlassJaccardIndex(21, ignore_index=255)(*tensors).item(), abs=1e-6)


def test_matches_torchmetrics_when_classes_are_absent():
    "The average is over classes in the ground truth or the prediction."
    target = torch.tensor([[0, 0, 1, 1, 255]])
    pred = torch.tensor([[0, 2, 1, 1, 1]])
    reference = MulticlassJaccardIndex(5, ignore_index=255)(pred, target).item()
    assert mean_iou(confusion_matrix(pred, target, 5)).item() == pytest.approx(reference, abs=1e-6)
    assert reference == pytest.approx((0.5 + 1 + 0) / 3, abs=1e-6)


def test_matches_scikit_learn_per_class():
    masks = blobs(2)
    pred = guess(2, masks)
    scores = iou_scores(confusion_matrix(pred, masks, CLASSES))
    known = masks != 255
    for mine, reference in ((scores.iou, jaccard_score), (scores.precision, precision_score), (scores.recall, recall_score)):
        np.testing.assert_allclose(mine, reference(masks[known], pred[known], average=None, labels=range(CLASSES)))
    assert scores.pixel_accuracy == pytest.approx((masks == pred)[known].mean())


def test_absent_classes_are_nan_and_left_out():
    scores = iou_scores(torch.tensor([[8, 0, 0], [0, 2, 0], [0, 0, 0]]))
    assert scores.iou[2].isnan() and scores.precision[2].isnan() and scores.recall[2].isnan()
    assert scores.miou == 1
    assert math.isnan(iou_scores(torch.zeros(3, 3)).miou)


def test_averaged_classes_can_be_chosen():
    counts = torch.tensor([[90, 0, 10], [0, 5, 5], [0, 0, 10]])
    scores = iou_scores(counts, average=[1, 2])
    assert scores.miou == pytest.approx((5 / 10 + 10 / 25) / 2)
    assert scores.pixel_accuracy == pytest.approx(15 / 20)
    assert len(scores.iou) == 3


def test_scores_read_like_a_dictionary():
    scores = iou_scores(torch.eye(2) * 3)
    assert list(dict(scores)) == ["miou", "iou", "pixel_accuracy", "precision", "recall"]
    assert {**scores}["miou"] == scores["miou"] == 1
    assert scores.named(["sky", "sea"]) == {"sky": 1, "sea": 1}
    with pytest.raises(KeyError): scores["dice"]
    with pytest.raises(InputError, match="1 names for 2"): scores.named(["sky"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.int16])
def test_values_outside_the_classes_are_named_with_their_count(dtype):
    good = torch.zeros(2, 3, 3, dtype=dtype)
    bad = good.clone()
    bad[0, 0, :2] = 7
    bad[1, 2, 2] = 21 if dtype == torch.uint8 else -1
    with pytest.raises(InputError, match=r"prediction holds .*7 \(2 pixels\).*0\.\.3"): confusion_matrix(bad, good, CLASSES)
    with pytest.raises(InputError, match=r"target holds .*7 \(2 pixels\).*255 \(ignored\)"): confusion_matrix(good, bad, CLASSES)


def test_a_predicted_255_is_an_error_even_where_the_target_is_ignored():
    void = np.full((2, 2), 255, np.uint8)
    with pytest.raises(InputError, match=r"prediction holds 255 \(4 pixels\)"): confusion_matrix(void, void, CLASSES)


def test_signed_bytes_and_many_classes_do_not_wrap():
    labels = torch.full((2, 2), -1, dtype=torch.int8)
    with pytest.raises(InputError, match="-1"): confusion_matrix(labels, labels, 200)
    high = np.full((3, 3), 254, np.uint8)
    assert confusion_matrix(high, high, 255)[254, 254] == 9
    wide = np.full((3, 3), 256 + 1)
    with pytest.raises(InputError, match="257"): confusion_matrix(wide, np.ones((3, 3), int), 3)


@pytest.mark.parametrize("pred, target, classes, words", [
    (np.zeros((2, 2)), np.zeros((2, 2), int), 3, "float64"),
    (np.zeros((2, 2), bool), np.zeros((2, 2), int), 3, "bool"),
    (np.zeros(4, int), np.zeros(4, int), 3, r"\(4,\)"),
    (np.zeros((2, 2), int), np.zeros((2, 3), int), 3, "differ"),
    (np.zeros((2, 2), int), np.zeros((2, 2), int), 256, "256"),
    (np.zeros((2, 2), int), np.zeros((2, 2), int), 0, "classes is 0"),
])
def test_unusable_label_maps_are_refused(pred, target, classes, words):
    with pytest.raises(InputError, match=words): confusion_matrix(pred, target, classes)


def test_only_square_matrices_have_scores():
    with pytest.raises(InputError, match=r"\(3, 2\)"): iou_scores(torch.zeros(3, 2))


def test_an_empty_batch_counts_nothing():
    empty = torch.zeros(0, 4, 4, dtype=torch.uint8)
    assert confusion_matrix(empty, empty, 3).sum() == 0
    assert confusion_matrix(empty, empty, 3, per_image=True).shape == (0, 3, 3)


@pytest.mark.cuda
def test_cuda_counts_equal_cpu_counts():
    masks = blobs(3)
    pred = torch.from_numpy(guess(3, masks)).cuda()
    for count in (confusion_matrix, boundary_confusion, trimap_confusion):
        assert (count(pred, masks, CLASSES).cpu() == count(pred.cpu(), masks, CLASSES)).all()


# boundary IoU


def slow_boundary_counts(pred, target, classes, width):
    "Intersection and union of the rims per class, by the definition: mask minus its erosion."
    square = np.ones((2 * width + 1, 2 * width + 1))
    counts = np.zeros((2, classes))
    for p, t in zip(pred, target, strict=True):
        known = t != 255
        for c in range(classes):
            rims = [mask & ~ndimage.binary_erosion(mask, square) & known for mask in ((p == c) & known, t == c)]
            counts[:, c] += (rims[0] & rims[1]).sum(), (rims[0] | rims[1]).sum()
    return counts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.12])
def test_boundary_iou_matches_erosion_class_by_class(seed, fraction):
    masks = blobs(seed)
    pred = guess(seed, masks, wrong=0.02)
    inter, union = slow_boundary_counts(pred, masks, CLASSES, boundary_width(41, 57, fraction))
    np.testing.assert_allclose(boundary_iou(pred, masks, CLASSES, fraction).iou[:CLASSES], inter / union)


def test_boundary_iou_of_the_paper_on_one_square():
    "A 10x10 square shifted by one, rims of one pixel, counted by hand."
    target = np.zeros((40, 40), np.uint8)
    target[10:20, 10:20] = 1
    pred = np.roll(target, 1, axis=1)
    assert boundary_width(40, 40) == 1
    assert boundary_iou(pred, target, 2).iou[1] == pytest.approx(18 / (36 + 36 - 18))


def test_rim_width_is_two_percent_of_the_diagonal_and_at_least_one():
    assert [boundary_width(*size) for size in ((375, 500), (20, 20), (1000, 1000))] == [12, 1, 28]


@few
@given(label_pairs)
def test_the_perfect_prediction_has_boundary_iou_one_whatever_it_says_at_ignored_pixels(pair):
    noise, target = pair
    pred = np.where(target == 255, noise, target)
    scores = boundary_iou(pred, target, CLASSES)
    assert (target == 255).all() or scores.miou == 1


def test_boundary_matrices_accumulate_over_the_set():
    masks = blobs(5, images=4)
    pred = guess(5, masks, wrong=0.02)
    total = sum(boundary_confusion(p, t, CLASSES) for p, t in zip(pred, masks, strict=True))
    assert (total == boundary_confusion(pred, masks, CLASSES)).all()
    assert (total == boundary_confusion(pred, masks, CLASSES, per_image=True).sum(0)).all()
    assert total.sum() == (masks != 255).sum()


def test_a_picture_smaller_than_the_rim_is_all_rim():
    assert boundary_band(np.zeros((4, 9), np.uint8), 2).all()


def test_blunting_contours_costs_more_boundary_iou_than_iou():
    masks = blobs(6, void=0)
    votes = np.stack([ndimage.uniform_filter((masks == c).astype(float), (0, 7, 7)) for c in range(CLASSES)])
    pred = votes.argmax(0)
    assert boundary_iou(pred, masks, CLASSES).miou < iou_scores(confusion_matrix(pred, masks, CLASSES)).miou - 0.02


def test_boundary_matrix_needs_a_spare_id():
    with pytest.raises(InputError, match="255"): boundary_confusion(np.zeros((2, 2), int), np.zeros((2, 2), int), 255)


# trimap


def slow_distance(labels):
    "Distance to the nearest pixel with a 4-neighbour of another label."
    padded = np.pad(labels, 1, mode="edge").astype(int)
    shifted = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    touch = np.any([labels != other for other in shifted], axis=0)
    return ndimage.distance_transform_edt(~touch) if touch.any() else np.full(labels.shape, np.inf)


@few
@given(st.integers(0, 1000), st.integers(1, 30))
def test_boundary_distance_is_the_euclidean_distance_transform(seed, limit):
    labels = blobs(seed, images=2, void=0.02)
    slow = np.stack([np.minimum(slow_distance(picture), limit) for picture in labels])
    np.testing.assert_allclose(boundary_distance(labels, limit), slow, rtol=1e-6)


def test_distance_without_a_boundary_is_the_limit():
    assert (boundary_distance(np.ones((3, 8, 9), np.uint8), 5) == 5).all()


@pytest.mark.parametrize("seed", range(3))
def test_trimap_matches_one_mask_per_width(seed):
    masks = blobs(seed)
    pred = guess(seed, masks)
    distance = np.stack([slow_distance(mask) for mask in masks])
    curve = trimap_miou(pred, masks, CLASSES)
    for width in range(1, 21):
        band = np.where(distance < width, masks, 255)
        counts = confusion_matrix(pred, band, CLASSES)
        assert (trimap_confusion(pred, masks, CLASSES)[width - 1] == counts).all()
        assert curve[width - 1] == pytest.approx(mean_iou(counts).item())


def test_trimap_bands_grow_to_the_whole_picture():
    masks = blobs(7)
    pred = guess(7, masks)
    counts = trimap_confusion(pred, masks, CLASSES, widths=80)
    assert (counts.diff(dim=0) >= 0).all()
    assert (counts[-1] == confusion_matrix(pred, masks, CLASSES)).all()


def test_trimap_matrices_accumulate_over_the_set():
    masks = blobs(8, images=4)
    pred = guess(8, masks)
    per_image = trimap_confusion(pred, masks, CLASSES, per_image=True)
    assert per_image.shape == (4, 20, CLASSES, CLASSES)
    for counts, p, t in zip(per_image, pred, masks, strict=True): assert (counts == trimap_confusion(p, t, CLASSES)).all()
    assert (per_image.sum(0) == trimap_confusion(pred, masks, CLASSES)).all()


def test_trimap_needs_a_width():
    with pytest.raises(InputError, match="widths is 0"): trimap_confusion(np.zeros((2, 2), int), np.zeros((2, 2), int), 2, 0)


# seen and unseen classes


def test_gzss_figures_by_hand():
    counts = torch.tensor([[5, 9, 9], [0, 30, 10], [0, 10, 10]])
    scores = gzss_scores(counts, seen=[1], unseen=[2])
    s, u = 30 / (30 + 10 + 10 + 9), 10 / (10 + 10 + 10 + 9)
    assert scores.miou_seen == pytest.approx(s) and scores.miou_unseen == pytest.approx(u)
    assert scores.hiou == pytest.approx(2 * s * u / (s + u))
    assert scores.pixel_accuracy == pytest.approx(40 / 60)


def test_hiou_is_zero_when_every_unseen_class_fails_and_below_both_means():
    assert gzss_scores(torch.tensor([[10, 0], [10, 0]]), [0], [1]).hiou == 0
    assert gzss_scores(torch.tensor([[0, 10], [10, 0]]), [0], [1]).hiou == 0


@pytest.mark.parametrize("seen, unseen, words", [([], [1], "at least one"), ([0, 1], [1], r"\[1\] are both"), ([0], [7], r"\[7\]")])
def test_unusable_splits_are_refused(seen, unseen, words):
    with pytest.raises(InputError, match=words): gzss_scores(torch.eye(3), seen, unseen)


# threshold sweeps


def slow_sweep(cam, present, mask, values, variant):
    "One prediction and one confusion matrix per threshold."
    resized = F.interpolate(cam[None], mask.shape, mode="bilinear", align_corners=False)[0]
    resized[~present] = -1
    score, label = resized.max(0)
    result = []
    for value in values:
        background = value if variant == "threshold" else (1 - score.double().clamp(0, 1)) ** value
        result.append(confusion_matrix(torch.where(score < background, 0, label + 1), mask, len(cam) + 1))
    return torch.stack(result)


@pytest.mark.parametrize("variant, values", [("threshold", np.linspace(0, 1, 21)), ("power", [0.5, 1, 2, 4, 8, 16, 32])])
@pytest.mark.parametrize("seed", range(3))
def test_sweep_matches_one_confusion_matrix_per_threshold(variant, values, seed):
    rng = np.random.default_rng(seed)
    mask = blobs(seed, images=1)[0]
    cam = torch.from_numpy(rng.random((CLASSES - 1, 6, 8), np.float32)) ** 2
    present = torch.tensor([True, seed > 0, seed > 1])
    fast = sweep_background(cam, present, mask, values, variant)
    assert (fast == slow_sweep(cam, present, mask, values, variant)).all()


def test_sweep_of_a_batch_is_the_sum_over_pictures():
    masks = blobs(1)
    cam = torch.rand(3, CLASSES - 1, 41, 57)
    present = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    values = [0.2, 0.5, 0.8]
    single = sum(sweep_background(c, p, m, values) for c, p, m in zip(cam, present, masks, strict=True))
    assert (sweep_background(cam, present, masks, values) == single).all()


def test_thresholds_come_back_in_their_order_and_background_grows_with_them():
    cam, present, mask = torch.rand(3, 41, 57), torch.ones(3, dtype=torch.bool), blobs(0)[0]
    values = torch.linspace(0, 1.01, 12)
    counts = sweep_background(cam, present, mask, values)
    assert (sweep_background(cam, present, mask, values.flip(0)) == counts.flip(0)).all()
    background = counts[..., 0].sum(-1)
    assert background[0] == 0 and background[-1] == (mask != 255).sum() and (background.diff() >= 0).all()


def test_absent_classes_are_never_predicted():
    cam, mask = torch.rand(2, 3, 10, 10), np.zeros((2, 10, 10), np.uint8)
    counts = sweep_background(cam, torch.tensor([[False, True, False], [False, False, False]]), mask, [0.0])[0]
    assert counts[0].tolist() == [100, 0, 100, 0]


def test_extreme_scores_have_a_power():
    cam = torch.tensor([[[0.0, 1.0, 0.5, 0.25]]])
    counts = sweep_background(cam, torch.tensor([True]), np.ones((1, 4), np.uint8), [0.0, 1.0, 10.0], "power")
    assert counts[:, 1, 1].tolist() == [1, 2, 3]  # 0 is background for every power, 1 never is


def test_the_best_threshold_is_the_highest_mean_iou():
    counts = torch.tensor([[[5, 5], [0, 10]], [[10, 0], [0, 10]], [[10, 0], [5, 5]]])
    best = best_threshold(counts, [0.3, 0.4, 0.5])
    assert (best.threshold, best.miou) == (0.4, 1.0) and best.scores.pixel_accuracy == 1
    with pytest.raises(InputError, match="3 confusion matrices for 2"): best_threshold(counts, [0.3, 0.4])


@pytest.mark.parametrize("change, words", [
    (dict(cam=torch.full((2, 4, 4), math.nan)), "NaN in 32"),
    (dict(cam=torch.full((2, 4, 4), 1.5), variant="power"), "1.5"),
    (dict(present=torch.ones(3)), "do not match"),
    (dict(mask=np.full((4, 4), 9)), r"9 \(16 pixels\)"),
    (dict(variant="gamma"), "'gamma'"),
])
def test_unusable_sweeps_are_refused(change, words):
    usual = dict(cam=torch.rand(2, 4, 4), present=torch.ones(2), mask=np.zeros((4, 4), int), thresholds=[0.5])
    with pytest.raises(InputError, match=words): sweep_background(**{**usual, **change})


# meter and bootstrap


def test_meter_holds_what_was_added_in_whatever_batches():
    masks = blobs(3, images=6)
    pred = guess(3, masks)
    parts, whole, other = ConfusionMeter(CLASSES), ConfusionMeter(CLASSES), ConfusionMeter(CLASSES)
    for p, t in zip(pred[:4], masks[:4], strict=True): parts.update(p, t)
    other.update(pred[4:], masks[4:])
    parts.merge(other)
    whole.update(pred, masks)
    assert len(parts) == len(whole) == 6
    assert (parts.triples == whole.triples).all()
    assert (parts.total == confusion_matrix(pred, masks, CLASSES)).all()


def test_meter_is_small_with_many_classes_and_many_batches():
    meter = ConfusionMeter(81)
    counts = torch.zeros(1, 81, 81, dtype=torch.int64)
    counts[0, 0, 0], counts[0, 7, 7] = 1000, 10
    for _ in range(600): meter.add(counts)
    assert meter.triples.numel() * 4 == 600 * 2 * 12
    assert len(meter._cells) <= 257
    assert meter.total.sum() == 600 * 1010


def test_empty_meter_is_all_zero():
    assert ConfusionMeter(3, leading=(2,)).total.shape == (2, 3, 3)
    assert ConfusionMeter(3).triples.shape == (3, 0)


def test_meter_refuses_other_shapes():
    with pytest.raises(InputError, match=r"cannot add counts of shape \(1, 2, 2\)"): ConfusionMeter(3).add(torch.zeros(1, 2, 2))
    with pytest.raises(InputError, match="merge"): ConfusionMeter(3).merge(ConfusionMeter(4))


def test_bootstrap_matches_resampling_pictures_one_by_one():
    masks = blobs(4, images=12)
    counts = confusion_matrix(guess(4, masks), masks, CLASSES, per_image=True)
    fast = bootstrap_interval(counts, samples=300, seed=3)
    generator = torch.Generator().manual_seed(3)
    draws = torch.randint(12, (300, 12), generator=generator)
    slow = torch.stack([mean_iou(counts[draw].sum(0)) for draw in draws])
    assert fast.value == pytest.approx(mean_iou(counts.sum(0)).item())
    np.testing.assert_allclose(fast[1:], np.quantile(slow, [0.025, 0.975]))


def test_bootstrap_is_seeded_and_the_meter_gives_the_same():
    masks = blobs(4, images=8)
    pred = guess(4, masks, wrong=0.3)
    meter = ConfusionMeter(CLASSES)
    meter.update(pred, masks)
    first = bootstrap_interval(meter, samples=100, seed=1)
    assert first == bootstrap_interval(confusion_matrix(pred, masks, CLASSES, per_image=True), samples=100, seed=1)
    assert first != bootstrap_interval(meter, samples=100, seed=2)
    assert first.low < first.value < first.high


def test_equal_pictures_have_no_spread():
    counts = torch.tensor([[8, 2], [1, 9]]).repeat(5, 1, 1)
    low_high = bootstrap_interval(counts)[1:]
    assert low_high[0] == low_high[1] == pytest.approx(mean_iou(counts[0]).item())


def test_a_wider_level_contains_the_narrower():
    masks = blobs(9, images=10)
    counts = confusion_matrix(guess(9, masks), masks, CLASSES, per_image=True)
    wide, narrow = (bootstrap_interval(counts, level=level) for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_bootstrap_of_a_vector_statistic_is_an_interval_each():
    masks = blobs(2, images=6)
    bands = ConfusionMeter(CLASSES, leading=(20,))
    bands.add(trimap_confusion(guess(2, masks), masks, CLASSES, per_image=True))
    curve = bootstrap_interval(bands, samples=50)
    assert curve.low.shape == curve.value.shape == (20,) and (curve.low <= curve.high).all()
    per_class = bootstrap_interval(confusion_matrix(guess(2, masks), masks, CLASSES, per_image=True), class_iou, samples=50)
    assert per_class.value.shape == (CLASSES,)


def test_bootstrap_in_blocks_equals_bootstrap_at_once():
    "More cells than fit one block: the random draws must not depend on the blocks."
    counts = torch.zeros(4, 60, 60, dtype=torch.int64)
    counts[:, 0, 0], counts[:, 1, 0], counts[:, 1, 1] = torch.tensor([9, 3, 5, 1]), torch.tensor([1, 4, 1, 5]), 3
    assert 4_000_000 // 3600 < 1500
    assert bootstrap_interval(counts, samples=1500) == pytest.approx(bootstrap_interval(counts[:, :2, :2], samples=1500))


@pytest.mark.parametrize("counts, options, words", [
    (torch.zeros(0, 2, 2), {}, "no picture"),
    (torch.ones(2, 2, 2), dict(samples=0), "samples is 0"),
    (torch.ones(2, 2, 2), dict(level=1.0), "level is 1.0"),
    (torch.ones(2, 2), {}, r"\(n, C, C\)"),
])
def test_unusable_bootstraps_are_refused(counts, options, words):
    with pytest.raises(InputError, match=words): bootstrap_interval(counts, **options)


# ranking


@few
@given(st.integers(0, 1000), st.integers(0, 2))
def test_rank_auc_matches_scikit_learn_with_ties(seed, digits):
    rng = np.random.default_rng(seed)
    positive = np.concatenate([[True, False], rng.random(80) < 0.3])
    scores = np.round(rng.normal(size=82) + positive, digits)
    assert rank_auc(scores, positive).item() == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)


@few
@given(st.integers(0, 1000))
def test_rank_auc_sees_only_the_order(seed):
    rng = np.random.default_rng(seed)
    scores, positive = rng.normal(size=60), np.arange(60) % 3 == 0
    auc = rank_auc(scores, positive).item()
    assert rank_auc(np.arctan(3 * scores) + 5, positive).item() == pytest.approx(auc)
    assert rank_auc(-scores, positive).item() == pytest.approx(1 - auc)
    assert rank_auc(scores, ~positive).item() == pytest.approx(1 - auc)


def test_rank_auc_is_batched_and_skips_invalid_entries():
    scores = torch.randn(3, 4, 50)
    positive, valid = torch.rand(3, 4, 50) < 0.4, torch.rand(3, 4, 50) < 0.8
    scores[~valid] = math.nan
    batched = rank_auc(scores, positive, valid)
    assert batched.shape == (3, 4)
    assert batched[1, 2].item() == pytest.approx(roc_auc_score(positive[1, 2][valid[1, 2]], scores[1, 2][valid[1, 2]]))


def test_rank_auc_of_one_kind_only_is_nan_and_unordered_scores_are_refused():
    assert rank_auc(torch.rand(5), torch.ones(5)).isnan()
    with pytest.raises(InputError, match="NaN"): rank_auc(torch.tensor([0.1, math.nan]), torch.tensor([True, False]))


def test_constant_affinity_is_chance_and_the_ideal_one_is_perfect():
    labels = patch_labels(blobs(0), (6, 8))
    ideal = (labels[:, :, None] == labels[:, None, :]).float()
    assert (affinity_auc(ideal, labels) == 1).all()
    assert (affinity_auc(torch.ones_like(ideal), labels) == 0.5).all()
    assert (affinity_auc(-ideal, labels) == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_affinity_auc_matches_scikit_learn_over_pairs(seed):
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 255, 255, 0])
    affinity = torch.randn(10, 10, generator=torch.Generator().manual_seed(seed))
    known = [i for i in range(10) if labels[i] != 255]
    pairs = [(i, j) for i in known for j in known if i != j]
    expected = roc_auc_score([bool(labels[i] == labels[j]) for i, j in pairs], [affinity[i, j].item() for i, j in pairs])
    assert affinity_auc(affinity, labels).item() == pytest.approx(expected)
    rows = [roc_auc_score([bool(labels[i] == labels[j]) for j in known if j != i], [affinity[i, j].item() for j in known if j != i])
            for i in known]
    assert affinity_auc(affinity, labels, per="row").item() == pytest.approx(np.mean(rows))


def test_affinity_auc_ignores_the_diagonal_and_ignored_patches():
    labels = torch.tensor([[0, 0, 1, 1, 255]])
    affinity = torch.rand(1, 5, 5)
    changed = affinity.clone()
    changed[0].fill_diagonal_(99)
    changed[0, 4] = changed[0, :, 4] = -99
    assert affinity_auc(affinity, labels) == affinity_auc(changed, labels)


def test_row_scale_matters_only_to_the_matrix_variant():
    labels = patch_labels(blobs(1), (6, 8))
    affinity = torch.rand(3, 48, 48)
    scaled = affinity * torch.rand(3, 48, 1).add(0.1)
    torch.testing.assert_close(affinity_auc(affinity, labels, "row"), affinity_auc(scaled, labels, "row"))
    assert not torch.allclose(affinity_auc(affinity, labels), affinity_auc(scaled, labels))


def test_unusable_affinities_are_refused():
    with pytest.raises(InputError, match="do not match"): affinity_auc(torch.rand(4, 4), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(InputError, match="'column'"): affinity_auc(torch.rand(4, 4), torch.zeros(4, dtype=torch.int64), "column")


@pytest.mark.parametrize("grid", [(5, 7), (6, 8), (1, 1), (41, 57)])
def test_patch_labels_are_majorities(grid):
    masks = blobs(2, void=0.05)
    labels = patch_labels(masks, grid)
    assert labels.shape == (3, grid[0] * grid[1]) and labels.dtype == torch.int64
    rows, columns = np.arange(41) * grid[0] // 41, np.arange(57) * grid[1] // 57
    for y in range(grid[0]):
        for x in range(grid[1]):
            window = masks[1][np.ix_(rows == y, columns == x)]
            assert labels[1, y * grid[1] + x] == np.bincount(window.ravel()).argmax()
    assert (patch_labels(masks[1], grid) == labels[1]).all()


@few
@given(st.integers(0, 1000), st.integers(0, 2))
def test_map_matches_scikit_learn_with_ties(seed, digits):
    rng = np.random.default_rng(seed)
    labels = rng.random((60, 5)) < 0.2
    labels[0] = True
    scores = np.round(rng.normal(size=(60, 5)) + labels, digits)
    assert mean_average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)


def test_classes_without_a_positive_picture_are_left_out():
    labels = np.array([[1, 0], [0, 0], [1, 0]])
    scores = np.array([[0.9, 0.1], [0.8, 0.5], [0.7, 0.2]])
    assert average_precision(scores, labels)[1].isnan()
    assert mean_average_precision(scores, labels) == pytest.approx((1 + 2 / 3) / 2)


def test_weights_are_repetitions():
    rng = np.random.default_rng(0)
    labels, weights = rng.random((40, 3)) < 0.3, rng.integers(0, 4, (6, 40))
    scores = np.round(rng.normal(size=(40, 3)), 1)
    weighted = average_precision(scores, labels, weights)
    for row, weight in zip(weighted, weights, strict=True):
        np.testing.assert_allclose(row, average_precision(scores.repeat(weight, 0), labels.repeat(weight, 0)))


def test_map_interval_is_seeded_and_contains_the_value():
    rng = np.random.default_rng(1)
    labels = rng.random((200, 4)) < 0.3
    scores = rng.normal(size=(200, 4)) + labels
    interval = bootstrap_average_precision(scores, labels, samples=200)
    assert interval.low < interval.value < interval.high
    assert interval == bootstrap_average_precision(scores, labels, samples=200)
    assert interval.value == mean_average_precision(scores, labels)


def test_unusable_rankings_are_refused():
    with pytest.raises(InputError, match=r"\(n, C\)"): mean_average_precision(np.zeros((3, 2)), np.zeros((2, 3)))
    with pytest.raises(InputError, match="NaN"): mean_average_precision(np.full((3, 2), np.nan), np.ones((3, 2)))


# real pictures


def test_real_masks_score_perfectly_against_themselves(real_data):
    files = sorted((real_data / "voc12_mini" / "SegmentationClass").glob("*.png"))[:3]
    assert files
    for file in files:
        mask = np.asarray(Image.open(file))
        filled = np.where(mask == 255, 0, mask)
        assert boundary_iou(filled, mask, 21).miou == 1
        assert (trimap_miou(filled, mask, 21) == 1).all()
        np.testing.assert_allclose(boundary_distance(mask), np.minimum(slow_distance(mask), 20), rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_bias_sweep_equals_an_argmax_for_every_bias(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores, target = generator.random((5, 17, 13)), generator.choice([0, 1, 2, 3, 4, 255], (17, 13))
    seen, unseen, biases = [0, 3, 4], [1, 2], [-.2, 0., .1, .45]
    swept = metrics.sweep_bias(scores, target, seen, unseen, biases)
    for bias, counts in zip(biases, swept):
        held = scores.copy()
        held[seen] -= bias
        assert torch.equal(counts, metrics.confusion_matrix(held.argmax(0), target, 5))
    figures = metrics.gzss_figures(swept, seen, unseen)
    for row, counts in zip(figures, swept): assert tuple(row.tolist()) == pytest.approx(tuple(metrics.gzss_scores(counts, seen, unseen)))


def test_a_bias_sweep_that_cannot_be_is_explained() -> None:
    scores, target = np.zeros((3, 4, 4)), np.zeros((4, 4), int)
    with pytest.raises(InputError, match="every one"): metrics.sweep_bias(scores, target, [0], [1], [0.])
    with pytest.raises(InputError, match="rising"): metrics.sweep_bias(scores, target, [0, 2], [1], [.1, 0.])
    with pytest.raises(InputError, match="both seen and unseen"): metrics.sweep_bias(scores, target, [0, 1, 2], [1], [0.])
