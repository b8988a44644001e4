"""freqseg.work.evaluation: figures of any system, against independent counts."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.metrics import confusion_matrix as sklearn_confusion
from torchmetrics.functional.classification import multiclass_jaccard_index
from toy_inference import MEAN, NAMES, QUIET, SIZES, Toy, ZeroShotToy, by_hand, dataset, folder, system, write_folder  # noqa: F401 (fixtures)

from freqseg.conditions import software
from freqseg.data import SegmentationFolder, open_folder, zero_shot_view
from freqseg.files import InputError
from freqseg.lists import zero_shot_split
from freqseg.metrics import boundary_iou, confusion_matrix, mean_iou, trimap_confusion, trimap_miou
from freqseg.pictures import read_mask
from freqseg.spectra import split_bands
from freqseg.work.corruptions import Corruption
from freqseg.work.evaluation import BIASES, FIGURES, SystemReport, evaluate_system
from freqseg.work.inference import (
    Inference,
    Job,
    class_scores,
    picture_indices,
    segment,
    segment_picture,
    stream,
)



@pytest.fixture(scope="module")
def report(dataset: SegmentationFolder) -> SystemReport:
    return evaluate_system(Toy().eval(), dataset, scales=(1.0, 1.5), bands=0.2, threshold_split="test", examples=2, command="again", weights="none", **QUIET)


@torch.no_grad()
def test_seg_equals_independent_counts(report, dataset, system) -> None:
    labels = [by_hand(system, sample.image, (1.0, 1.5), True).argmax(0) for sample in dataset]
    truth = [torch.from_numpy(sample.mask).long() for sample in dataset]
    pred, target = (torch.cat([one.flatten() for one in side]) for side in (labels, truth))
    one = report["seg"]
    assert one.miou.value == pytest.approx(multiclass_jaccard_index(pred, target, 4, ignore_index=255).item(), abs=2e-3)
    kept = target != 255
    assert np.abs(sklearn_confusion(target[kept], pred[kept], labels=range(4)) - one.confusion.numpy()).sum() <= 4
    assert one.images == report.images == len(dataset) and one.miou.low <= one.miou.value <= one.miou.high
    expected = mean_iou(sum(trimap_confusion(guess, mask, 4) for guess, mask in zip(labels, truth)))
    assert one.trimap == pytest.approx(expected.tolist(), abs=2e-3)
    assert [ends.value for ends in one.trimap_ends.values()] == pytest.approx([one.trimap[width - 1] for width in one.trimap_ends])


@torch.no_grad()
def test_boundary_and_trimap_are_those_of_the_labels(folder, dataset, system) -> None:
    single = open_folder(folder, "val", masks=True, ids=[dataset.ids[0]])
    one = evaluate_system(system, single, figures=("seg",), flip=False, examples=1, **QUIET)["seg"]
    labels, truth = by_hand(system, single[0].image, (1.0,), False).argmax(0), torch.from_numpy(single[0].mask)
    assert one.boundary.value == pytest.approx(boundary_iou(labels, truth, 4).miou, abs=1e-9)
    assert one.trimap == pytest.approx(trimap_miou(labels, truth, 4).tolist(), nan_ok=True)
    assert {width: ends.value for width, ends in one.trimap_ends.items()} == pytest.approx({width: one.trimap[width - 1] for width in (1, 2, 5, 10, 20)})


@torch.no_grad()
def test_the_seed_is_the_activation_map_cut_at_the_best_threshold_of_the_other_split(report, folder, dataset, system) -> None:
    def miou(split: SegmentationFolder, threshold: float) -> float:
        total = 0
        for sample, present in zip(split, split.labels):
            height, width = sample.mask.shape
            shown = F.pad(torch.from_numpy(np.array(sample.image)).permute(2, 0, 1).float() / 255 - MEAN, (0, -width % 4, 0, -height % 4))
            cam = F.interpolate(system.cam(shown[None], present[None]).half().float(), shown.shape[1:], mode="bilinear")[0, :, :height, :width]
            labels = torch.cat([torch.full_like(cam[:1], threshold), cam.masked_fill(~present[:, None, None], -1)]).argmax(0)
            total = total + confusion_matrix(labels, sample.mask, 4)
        return mean_iou(total).item()
    seed = report["seed"]
    assert report.threshold_split == "test" and seed.miou.value == pytest.approx(miou(dataset, seed.threshold), abs=0.01)
    test = open_folder(folder, "test", masks=True)
    assert seed.tuned_miou == pytest.approx(miou(test, seed.threshold), abs=0.01)
    assert seed.tuned_miou >= max(miou(test, threshold) for threshold in (0.3, 0.5, 0.7, 0.9)) - 0.01


@torch.no_grad()
def test_bands_cost_no_second_look(dataset, system) -> None:
    evaluate_system(system, dataset, figures=("seg",), **QUIET)
    plain, system.asked = len(system.asked), []
    evaluate_system(system, dataset, figures=("seg",), bands=0.2, **QUIET)
    assert len(system.asked) == plain


@torch.no_grad()
def test_bands_filter_the_frozen_tokens_before_the_head(report, dataset, system) -> None:
    for place, band in enumerate(("low", "high")):
        found = evaluate_system(system, dataset, figures=("seg",), bands=0.2, flip=False, **QUIET)[f"seg_{band}"]
        labels = torch.cat([by_hand(system, sample.image, (1.0,), False, keep=lambda tokens: split_bands(tokens, 0.2)[place]).argmax(0).flatten() for sample in dataset])
        truth = torch.cat([torch.from_numpy(sample.mask).long().flatten() for sample in dataset])
        assert found.miou.value == pytest.approx(multiclass_jaccard_index(labels, truth, 4, ignore_index=255).item(), abs=2e-3)
    assert report["seg_low"].class_map is not None and report["mask"].class_map is None
    full = evaluate_system(system, dataset, figures=("seg",), bands=0.5, **QUIET)
    assert full["seg_low"].miou == full["seg"].miou


@torch.no_grad()
def test_class_scores_rank_pictures_as_sklearn_does(dataset, system) -> None:
    one = evaluate_system(system, dataset, figures=("seg",), flip=False, **QUIET)["seg"]
    found = stream(Job(system, Inference(flip=False), progress=False), dataset, range(len(dataset)))
    scores, truth = torch.stack([class_scores(item.views["seg"]) for item in found]).numpy(), dataset.labels.numpy()
    expected = [average_precision_score(truth[:, k], scores[:, k]) for k in range(3) if truth[:, k].any()]
    assert one.class_map.value == pytest.approx(np.mean(expected), abs=1e-6)


def test_figures_come_in_their_order_with_best_and_worst(report, dataset) -> None:
    assert list(report.figures) == ["seed", "mask", "seg", "seg_low", "seg_high"] and report.main.name == "seg"
    values = [one.miou for one in report.best] + [one.miou for one in report.worst][::-1]
    assert values == sorted(values, reverse=True) and len({one.id for one in report.best + report.worst}) == 4
    for one in report.best: assert one.image.shape[:2] == one.truth.shape == one.labels.shape == one.cam.shape


def test_the_report_survives_json_and_names_its_conditions(report) -> None:
    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert plain["figures"]["seg"]["confusion"] == report["seg"].confusion.tolist() and plain["command"] == "again"
    assert plain["settings"]["inference"]["scales"] == [1.0, 1.5] and plain["config"] == {"seed": 0} and plain["settings"]["band_cutoff"] == 0.2
    assert plain["software"]["torch"] and set(plain["figures"]) <= set(FIGURES) and software()["python"]


def test_a_seed_alone_is_evaluated_with_its_gallery(dataset, system) -> None:
    report = evaluate_system(system, dataset, figures=("seed",), variant="power", examples=1, **QUIET)
    assert report.main.name == "seed" and report.threshold_split == "val" and len(report.best) == len(report.worst) == 1


def test_saved_masks_are_those_of_the_main_figure(pydensecrf, tmp_path, dataset, system) -> None:
    report = evaluate_system(system, dataset, figures=("mask", "seg"), crf="weclip", crf_workers=1, save_masks=tmp_path, **QUIET)
    assert list(report.figures) == ["mask", "mask_crf", "seg", "seg_crf"]
    total = sum(confusion_matrix(read_mask(tmp_path / f"{sample.id}.png"), sample.mask, 4) for sample in dataset)
    assert torch.equal(total, report["seg_crf"].confusion)


def test_the_system_is_in_evaluation_mode_meanwhile_and_afterwards_as_it_was(dataset) -> None:
    system = Toy().train()   # its predict asserts that it is not training
    evaluate_system(system, dataset, figures=("seg",), limit=2, **QUIET)
    assert system.training


def test_a_damaged_picture_is_named_and_skipped_only_when_asked(tmp_path, system) -> None:
    broken = write_folder(tmp_path / "broken")
    (broken / "JPEGImages/val_2.png").write_bytes((broken / "JPEGImages/val_2.png").read_bytes()[:200])
    split = open_folder(broken, "val", masks=True)
    with pytest.raises(InputError, match="val_2.png.*--skip-bad"): evaluate_system(system, split, figures=("seg",), **QUIET)
    report = evaluate_system(system, split, figures=("seg",), skip_bad=True, **QUIET)
    assert report.images == len(SIZES) - 1 and len(report.skipped) == 1 and "val_2.png" in report.skipped[0]
    complaints: list[str] = []
    assert [name for name, _ in segment(system, split, skipped=complaints, progress=False)] == [name for name in split.ids if name != "val_2"]
    assert len(complaints) == 1


def test_a_split_of_damaged_pictures_only_has_no_figure(tmp_path, system) -> None:
    broken = write_folder(tmp_path / "broken", SIZES[:2])
    for path in (broken / "JPEGImages").iterdir(): path.write_bytes(b"")
    with pytest.raises(InputError, match="none of the 2 pictures"):
        evaluate_system(system, open_folder(broken, "val", masks=True), figures=("seg",), skip_bad=True, **QUIET)


def test_a_system_with_other_classes_is_refused(dataset) -> None:
    with pytest.raises(InputError, match="cone is in one of them only"): evaluate_system(Toy(("disc", "box", "cone")), dataset, **QUIET)
    with pytest.raises(InputError, match="another order"): next(segment(Toy(NAMES[::-1]), dataset, progress=False))


def test_answers_of_a_wrong_shape_or_with_nan_are_refused(dataset, system) -> None:
    system.num_classes = 3
    with pytest.raises(InputError, match="predicts 3 classes"): evaluate_system(system, dataset, **QUIET)
    wrong = Toy().eval()
    wrong.head = torch.nn.Parameter(wrong.head[:3])
    with pytest.raises(InputError, match=r"\(4, 3, 6, 8\) for 4 images and 4 classes"): evaluate_system(wrong, dataset, figures=("seg",), **QUIET)
    with torch.no_grad(): wrong.head = torch.nn.Parameter(Toy().head * torch.nan)
    with pytest.raises(InputError, match="NaN"): evaluate_system(wrong, dataset, figures=("seg",), **QUIET)
    system = Toy().eval()
    system.explain = lambda images, labels: (system.cam(images, labels), torch.zeros(len(images), 3, 3))
    with pytest.raises(InputError, match="pseudo-labels have shape"): evaluate_system(system, dataset, figures=("mask",), **QUIET)


def test_out_of_memory_says_which_knob_to_turn(dataset, system) -> None:
    def full(images, keep=None): raise torch.OutOfMemoryError("CUDA out of memory")
    system.predict = full
    with pytest.raises(InputError, match=r"4 images of 24 x 32.*lower batch \(now 4\).*--batch"): evaluate_system(system, dataset, figures=("seg",), **QUIET)
    with pytest.raises(InputError, match=r"1 image of .*lower scales or side, .*window \(on the command line --scales, --side, --window\)"):
        segment_picture(system, dataset[0].image, "single")


def test_an_empty_split_and_wrong_options_are_named(folder, dataset, system) -> None:
    with pytest.raises(InputError, match="holds no picture"): picture_indices(open_folder(folder, "val", ids=[]))
    for options, words in ((dict(limit=0), "limit=0"), (dict(figures=("segg",)), "segg"), (dict(figures=()), "no figure"), (dict(scales=()), "scales="),
                           (dict(scales=(1.0, 1.0)), "once"), (dict(crf="best"), "best"), (dict(inference="voc"), "voc"), (dict(side=0), "side=0"),
                           (dict(figures=("mask",), bands=0.2), "bands=0.2"), (dict(figures=("seed",), crf="weclip"), "nothing to refine"),
                           (dict(threshold_split="nowhere"), "nowhere"), (dict(variant="best"), "variant="), (dict(precision="fp8"), "fp8")):
        with pytest.raises(InputError, match=words): evaluate_system(system, dataset, **options, **QUIET)
    for options in (dict(window=8, stride=9), dict(stride=3), dict(average="votes"), dict(batch=0)):
        with pytest.raises(InputError): Inference(**options)


def test_masks_labels_and_bands_that_are_missing_are_named(tmp_path, folder, system) -> None:
    bare = write_folder(tmp_path / "bare", SIZES[:2])
    (bare / "labels.txt").unlink()
    with pytest.raises(InputError, match="labels.txt"): evaluate_system(system, open_folder(bare, "val", masks=True), **QUIET)
    assert evaluate_system(system, open_folder(bare, "val", masks=True), figures=("seg",), **QUIET)["seg"].class_map is None
    (bare / "SegmentationClass/val_1.png").unlink()
    with pytest.raises(InputError, match="val_1 has no mask"): evaluate_system(system, open_folder(bare, "val"), figures=("seg",), **QUIET)
    class Deaf(Toy):
        def predict(self, images): return super().predict(images)
    with pytest.raises(InputError, match="has no `keep`"): evaluate_system(Deaf(), open_folder(folder, "val", masks=True), bands=0.2, **QUIET)


@pytest.mark.parametrize("corruption", [Corruption("noise", 1), Corruption("blur", 3)], ids=str)
def test_a_corrupted_evaluation_is_that_of_corrupted_files_with_the_same_masks(corruption, tmp_path, system, dataset) -> None:
    worse = write_folder(tmp_path / "worse")
    for name in dataset.ids:
        path = worse / f"JPEGImages/{name}.png"
        corruption(Image.open(path), name).save(path)
    expected = evaluate_system(system, open_folder(worse, "val", masks=True), scales=(1.0, 1.5), **QUIET)
    found = evaluate_system(system, dataset, scales=(1.0, 1.5), corrupt=corruption, **QUIET)
    for name in found.figures:
        assert torch.equal(found[name].confusion, expected[name].confusion) and found[name].boundary == expected[name].boundary
    assert [np.array_equal(ours.image, theirs.image) for ours, theirs in zip(found.best, expected.best, strict=True)] == [True] * len(found.best)
    assert found.settings["corrupt"] == corruption.as_dict() and "corrupt" not in expected.settings
    assert not torch.equal(found["seg"].confusion, evaluate_system(system, dataset, figures=("seg",), scales=(1.0, 1.5), **QUIET)["seg"].confusion)


def test_strength_0_and_the_threshold_of_another_split_are_those_of_clean_pictures(system, dataset) -> None:
    clean, none, worse = (evaluate_system(system, dataset, figures=("seed",), corrupt=corrupt, threshold_split="test", **QUIET)["seed"]
                          for corrupt in (None, Corruption("noise", 0), Corruption("noise", 3)))
    assert torch.equal(clean.confusion, none.confusion) and not torch.equal(clean.confusion, worse.confusion)
    assert clean.threshold == worse.threshold and clean.tuned_miou == worse.tuned_miou


@pytest.mark.slow
def test_reading_in_other_processes_changes_nothing(dataset, system) -> None:
    here, there = (evaluate_system(system, dataset, workers=workers, **QUIET) for workers in (0, 2))
    assert all(here[name].miou == there[name].miou for name in here.figures)


@pytest.mark.cuda
def test_bf16_on_cuda_barely_moves_the_figures(dataset) -> None:
    class Moved(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.backbone.device = torch.device("cuda")
            self.backbone.normalise = lambda pixels: pixels - MEAN.to(pixels.device)
    figures = [evaluate_system(Moved().cuda().eval(), dataset, precision=precision, **QUIET)["seg"].miou.value for precision in ("fp32", "bf16")]
    assert figures[0] == pytest.approx(figures[1], abs=0.05)


@pytest.mark.slow
def test_photographs_of_many_sizes_are_evaluated(pydensecrf, real_data, tmp_path) -> None:
    from freqseg.data import open_voc
    from freqseg.lists import VOC_CLASSES
    split = open_voc(real_data / "voc12_mini", "val", masks=True)
    report = evaluate_system(Toy(VOC_CLASSES).eval(), split, scales=(1.0, 0.75), side=96, crf="weclip", limit=6, save_masks=tmp_path, **QUIET)
    assert report.dataset == "PASCAL VOC 2012" and report.images == 6 and len(list(tmp_path.iterdir())) == 6 and not report.caveat


@pytest.fixture
def zero_shot_dataset(dataset) -> SegmentationFolder:
    split = zero_shot_split(dataset.classes, unseen=dataset.classes[1:2])
    return SegmentationFolder(zero_shot_view(dataset.listing, split), masks=True)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_zero_shot_figures_equal_a_slow_count(average, zero_shot_dataset) -> None:
    system, split = ZeroShotToy(.1).eval(), zero_shot_dataset.listing.zero_shot
    found = evaluate_system(system, zero_shot_dataset, figures=("seg",), inference=Inference(flip=False, average=average), samples=20, progress=False)
    totals = {bias: np.zeros((3, 3), np.int64) for bias in (0., .25)}
    for sample in zero_shot_dataset:
        scores = by_hand(system, sample.image, (1.0,), False, "logits").sigmoid() - system.handicap[:, None, None]
        for bias, total in totals.items():
            labels = (scores - bias*torch.tensor([1., 0., 1.])[:, None, None]).argmax(0).numpy()
            kept = sample.mask != 255
            total += sklearn_confusion(sample.mask[kept], labels[kept], labels=range(3))
    told = found.zero_shot
    for bias, total in totals.items():
        iou = np.diag(total)/(total.sum(0) + total.sum(1) - np.diag(total))
        s, u = np.nanmean(iou[split.seen_index]), np.nanmean(iou[split.unseen_index])
        point = told.curve[BIASES.index(bias)]
        assert point == pytest.approx((bias, s, u, 2*s*u/(s + u)), abs=2e-3)
    total = totals[0.]
    assert told.pixel_accuracy.value == pytest.approx(np.trace(total)/total.sum(), abs=2e-3)
    assert (told.miou_seen.value, told.miou_unseen.value, told.hiou.value) == pytest.approx(told.curve[BIASES.index(0.)][1:], abs=1e-9)
    assert told.miou_seen.low <= told.miou_seen.value <= told.miou_seen.high and told.handicap == pytest.approx(.1)
    np.testing.assert_allclose(told.confused.sum(1).numpy(), 1)
    assert told.confused[1, 0].item() == pytest.approx(total[1, 1]/total[1].sum(), abs=2e-3)
    json.dumps(found.as_dict())


def test_a_zero_shot_system_is_refused_by_data_with_a_background(dataset) -> None:
    with pytest.raises(InputError, match="background"): evaluate_system(ZeroShotToy(.1), dataset, figures=("seg",), progress=False)
