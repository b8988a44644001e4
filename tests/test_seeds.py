"""Seed tables: recomputed by other means, the same for every batching, thresholds chosen where the table says."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings as limits
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import confusion_matrix as sklearn_confusion
from torchmetrics.functional.classification import multiclass_jaccard_index

from freqseg.cam import value_path
from freqseg.clip import Backbone, build_clip, load_clip
from freqseg.data import Sample, SegmentationFolder, open_folder, open_voc
from freqseg.lists import write_labels
from freqseg.pictures import fitted_size, write_mask
from freqseg.work.inference import SeedMaps
from freqseg.work.seeds import SeedTable, evaluate_seeds, paired_gain
from freqseg.work.thresholds import THRESHOLDS, add_sweep, seed_labels
from freqseg.files import InputError
from freqseg.maps import METHODS, CamSettings, frequency_cams, register_map
from freqseg.metrics import ConfusionMeter, bootstrap_interval, boundary_iou, confusion_matrix, mean_iou, sweep_background
from freqseg.prompts import embed_wording, usual_wording
from freqseg.world.scenes import WORLD_CLASSES, write_world

FEW = ("gradcam", "high", "smoothed")
QUICK = dict(progress=False, samples=50)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_clip("world")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A world of 6 + 7 scenes of 64 pixels."
    folder = tmp_path_factory.mktemp("world") / "small"
    write_world(str(folder), train=0, val=6, test=7, size=64, workers=1)
    return folder


@pytest.fixture(scope="module")
def dataset(world: Path) -> SegmentationFolder:
    return open_folder(world, "test", masks=True)


@pytest.fixture(scope="module")
def table(dataset: SegmentationFolder, backbone: Backbone) -> SeedTable:
    return evaluate_seeds(dataset, backbone, FEW, batch=4, **QUICK)


@pytest.fixture(scope="module")
def mixed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> SegmentationFolder:
    "The same scenes cut to sizes that are no multiples of the patch, two of them with the same padded grid."
    folder, source = tmp_path_factory.mktemp("mixed"), open_folder(world, "test", masks=True)
    sizes = ((64, 64), (50, 61), (52, 63), (33, 64), (64, 41), (50, 61), (64, 64))
    for sub in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"): (folder / sub).mkdir(parents=True)
    for sample, (height, width) in zip(source, sizes):
        sample.image.crop((0, 0, width, height)).save(folder / f"JPEGImages/{sample.id}.png")
        write_mask(folder / f"SegmentationClass/{sample.id}.png", sample.mask[:height, :width])
    (folder / "classes.txt").write_text("\n".join(WORLD_CLASSES) + "\n")
    (folder / "ImageSets/Segmentation/test.txt").write_text("\n".join(source.ids) + "\n")
    write_labels(folder / "labels.txt", source.ids, source.labels.numpy(), WORLD_CLASSES)
    return open_folder(folder, "test", masks=True)


def by_hand(dataset: SegmentationFolder, backbone: Backbone, method: str, threshold: float) -> list[tuple[np.ndarray, np.ndarray]]:
    "Label map and mask of every picture, one at a time, the plain way: pad, map, enlarge all, crop, argmax with a constant background."
    text, background = embed_wording(backbone, usual_wording(backbone, dataset.classes))
    found = []
    for sample, present in zip(dataset, dataset.labels):
        height, width = sample.mask.shape
        images = F.pad(backbone.preprocess(sample.image, (height, width)), (0, -width % 8, 0, -height % 8))
        cam = frequency_cams(backbone, images, text, present[None], background, (method,))[method].half().float()
        cam = F.interpolate(cam, images.shape[-2:], mode="bilinear", align_corners=False)[0, :, :height, :width]
        cam[~present] = -1
        best, label = cam.max(0)
        found.append((torch.where(best >= threshold, label + 1, 0).numpy(), sample.mask))
    return found


@pytest.mark.parametrize("method", FEW)
def test_miou_equals_an_independent_count_at_the_same_threshold(method: str, mixed: SegmentationFolder, backbone: Backbone) -> None:
    row = evaluate_seeds(mixed, backbone, (method,), batch=1, **QUICK)[method]
    pairs = by_hand(mixed, backbone, method, row.threshold)
    pred, target = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    counts = sklearn_confusion(target[target != 255], pred[target != 255], labels=range(21))
    with np.errstate(invalid="ignore"): iou = np.diag(counts) / (counts.sum(0) + counts.sum(1) - np.diag(counts))
    # one step from patches to mask pixels and two steps through the padded picture round differently on single pixels
    assert row.miou.value == pytest.approx(np.nanmean(iou), abs=2e-3)
    occurring = torch.tensor(iou).isfinite()
    peer = multiclass_jaccard_index(torch.tensor(pred), torch.tensor(target.astype(np.int64)), 21, average=None, ignore_index=255)
    assert float(peer[occurring].mean()) == pytest.approx(row.miou.value, abs=2e-3)


def test_the_threshold_is_the_best_of_all_of_them_recounted_by_hand(dataset: SegmentationFolder, backbone: Backbone) -> None:
    levels = (0.1, 0.3, 0.5, 0.7)
    row = evaluate_seeds(dataset, backbone, ("gradcam",), thresholds=levels, **QUICK)["gradcam"]
    figures = []
    for level in levels:
        pairs = by_hand(dataset, backbone, "gradcam", level)
        figures.append(float(mean_iou(sum(confusion_matrix(pred, mask, 21) for pred, mask in pairs))))
    assert row.threshold == levels[int(np.argmax(figures))] and row.miou.value == pytest.approx(max(figures), abs=1e-3)


def test_boundary_iou_is_that_of_the_labels_at_the_threshold(dataset: SegmentationFolder, backbone: Backbone, table: SeedTable) -> None:
    pairs = by_hand(dataset, backbone, "smoothed", table["smoothed"].threshold)
    pred, mask = (torch.tensor(np.stack([pair[i] for pair in pairs]).astype(np.int64)) for i in (0, 1))
    assert table["smoothed"].boundary.value == pytest.approx(boundary_iou(pred, mask, 21).miou, abs=3e-3)


@pytest.mark.parametrize("variant", ["threshold", "power"])
def test_the_second_count_agrees_with_the_sweep(variant: str, mixed: SegmentationFolder, backbone: Backbone) -> None:
    for row in evaluate_seeds(mixed, backbone, FEW, batch=3, variant=variant, **QUICK).rows:
        assert row.miou.value == pytest.approx(row.tuned_miou, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_table_does_not_depend_on_the_batching(batch: int, mixed: SegmentationFolder, backbone: Backbone) -> None:
    apart = (0.2, 0.4, 0.6)   # neighbouring thresholds can tie, and rounding would choose between them
    reference, other = (evaluate_seeds(mixed, backbone, FEW, batch=size, thresholds=apart, **QUICK) for size in (3, batch))
    for name in FEW:
        assert other[name].threshold == reference[name].threshold
        assert tuple(other[name].miou) == pytest.approx(tuple(reference[name].miou), abs=5e-3)


def test_a_subset_of_methods_gives_the_same_rows(dataset: SegmentationFolder, backbone: Backbone, table: SeedTable) -> None:
    alone = evaluate_seeds(dataset, backbone, ("smoothed",), batch=4, **QUICK)
    assert alone["smoothed"].miou == pytest.approx(table["smoothed"].miou, abs=1e-6) and alone["smoothed"].gain is None


def test_thresholds_of_another_split_are_the_best_there(world: Path, dataset: SegmentationFolder, backbone: Backbone, table: SeedTable) -> None:
    val = open_folder(world, "val", masks=True)
    there, here = evaluate_seeds(val, backbone, FEW, **QUICK), evaluate_seeds(dataset, backbone, FEW, threshold_split="val", **QUICK)
    given_object = evaluate_seeds(dataset, backbone, FEW, threshold_split=val, **QUICK)
    for name in FEW:
        assert here[name].threshold == there[name].threshold == given_object[name].threshold
        assert here[name].tuned_miou == pytest.approx(there[name].miou.value, abs=1e-6)
        assert here[name].miou.value <= table[name].miou.value + 1e-6
    assert "on split val" in here.caption and "on this same split" in table.caption


def test_masks_never_change_a_map(dataset: SegmentationFolder, backbone: Backbone) -> None:
    "With masks replaced by background, the scores change and the labels that are scored do not."
    class Blank(SegmentationFolder):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return replace(sample, mask=np.zeros_like(sample.mask))
    blank = Blank(dataset.listing, masks=True)
    true, empty = (evaluate_seeds(data, backbone, ("gradcam",), thresholds=(0.4,), **QUICK) for data in (dataset, blank))
    # without ignored pixels more is counted, so compare what the unignored part was called
    assert empty.confusions.total[0, 1:].sum() == 0
    assert (empty.confusions.total[0].sum(0) >= true.confusions.total[0].sum(0)).all()


def test_only_labelled_classes_are_ever_predicted(dataset: SegmentationFolder, table: SeedTable) -> None:
    predicted = table.confusions.sparse().to_dense().T.view(len(dataset), len(FEW), 21, 21).sum(2)[..., 1:] > 0
    assert not (predicted & ~dataset.labels[:, None]).any() and predicted.any()


def test_a_limit_scores_the_first_pictures(dataset: SegmentationFolder, backbone: Backbone) -> None:
    short = evaluate_seeds(dataset, backbone, ("gradcam",), limit=3, thresholds=(0.4,), **QUICK)
    full = evaluate_seeds(dataset, backbone, ("gradcam",), thresholds=(0.4,), **QUICK)
    assert short.rows[0].images == 3
    assert torch.equal(short.confusions.sparse().to_dense(), full.confusions.sparse().to_dense()[:, :3])


def test_intervals_are_ordered_reproducible_and_hold_the_figure(dataset: SegmentationFolder, backbone: Backbone, table: SeedTable) -> None:
    again = evaluate_seeds(dataset, backbone, FEW, batch=4, **QUICK)
    for row in table.rows:
        for interval in (row.miou, row.boundary): assert 0 <= interval.low <= interval.high <= 1
        assert again[row.method].miou == row.miou and row.seconds > 0


def test_a_short_tower_type_barely_moves_the_figures(dataset: SegmentationFolder, backbone: Backbone, table: SeedTable) -> None:
    short = evaluate_seeds(dataset, backbone, FEW, batch=4, precision="bf16", **QUICK)
    for name in FEW: assert short[name].miou.value == pytest.approx(table[name].miou.value, abs=0.05)


# ---- the parts ------------------------------------------------------------------------------------------------------

@limits(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(3, 70), st.integers(3, 70), st.randoms(use_true_random=False))
def test_enlarging_a_covered_part_equals_enlarging_all_and_cropping(h: int, w: int, height: int, width: int, random) -> None:
    maps = torch.rand(2, 3, h, w)
    rows, columns = random.randint(1, height), random.randint(1, width)
    enlarged = lambda covered, size: SeedMaps(0, torch.arange(3), torch.ones(3, dtype=torch.bool), maps, covered).enlarged(size)
    whole, part = enlarged((h, w), (height, width)), enlarged((h * rows / height, w * columns / width), (rows, columns))
    torch.testing.assert_close(whole, F.interpolate(maps, (height, width), mode="bilinear"), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(part, whole[..., :rows, :columns], atol=1e-4, rtol=1e-4)


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 600))
def test_the_fitted_size_has_the_long_side_and_the_aspect_ratio(height: int, width: int, side: int) -> None:
    size = fitted_size((height, width), side)
    assert max(size) == side and min(size) >= 1
    assert min(size) == pytest.approx(side * min(height, width) / max(height, width), abs=1)


def maps_of(classes: int = 5, methods: int = 2) -> SeedMaps:
    return SeedMaps(0, torch.tensor([1, 3]), torch.tensor([True, True]), torch.rand(methods, 2, 4, 5).half(), (4, 5))


@limits(max_examples=12)
@given(st.integers(0, 10_000), st.sampled_from(["threshold", "power"]))
def test_the_compact_sweep_equals_the_full_one(seed: int, variant: str) -> None:
    torch.manual_seed(seed)
    maps, levels = maps_of(), (0.2, 0.5, 0.9)
    mask = torch.randint(0, 7, (17, 23)).to(torch.uint8)
    mask[mask == 6] = 255
    totals = torch.zeros(2, 3, 6, 6, dtype=torch.int64)
    add_sweep(totals, maps, mask, levels, variant)
    full = torch.zeros(2, 5, 17, 23)
    full[:, [1, 3]] = maps.enlarged((17, 23))
    for total, cam in zip(totals, full):
        assert torch.equal(total, sweep_background(cam, torch.tensor([False, True, False, True, False]), mask, levels, variant))
    for level, index in zip(levels, range(3)):
        labels = seed_labels(maps, (17, 23), (level, level), variant)
        assert torch.equal(confusion_matrix(labels, mask.expand(2, -1, -1), 6, per_image=True), totals[:, index])


def test_a_picture_without_classes_is_background() -> None:
    maps = SeedMaps(0, torch.tensor([0]), torch.tensor([False]), torch.zeros(1, 1, 2, 2).half(), (2, 2))
    totals = torch.zeros(1, 2, 3, 3, dtype=torch.int64)
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    add_sweep(totals, maps, mask, (0.1, 0.5))
    assert not seed_labels(maps, (8, 8), (0.1,)).any() and (totals[:, :, 0, 0] == 64).all() and totals.sum() == 128


def test_the_paired_gain_is_the_difference_and_flips_its_sign() -> None:
    counts = torch.randint(0, 50, (40, 2, 4, 4)) + 30 * torch.eye(4, dtype=torch.int64)
    gain, loss = paired_gain(counts, 1, 0), paired_gain(counts, 0, 1)
    total = counts.sum(0)
    assert gain.value == pytest.approx(float(mean_iou(total[1]) - mean_iou(total[0])))
    assert (gain.value, gain.low, gain.high) == pytest.approx((-loss.value, -loss.high, -loss.low))
    assert paired_gain(counts, 1, 1) == (0, 0, 0)


def test_pairing_narrows_the_interval_of_methods_that_fail_together(table: SeedTable) -> None:
    right = (torch.rand(80) * 900).long()
    first, second = (torch.stack([torch.stack([r, 1000 - r], 1), torch.stack([1000 - r, r], 1)], 1) for r in (right, right + 40))
    gain, alone = paired_gain(torch.stack([first, second], 1), 1, 0), bootstrap_interval(first)
    assert gain.low > 0 and gain.high - gain.low < 0.5 * (alone.high - alone.low)
    assert table.gain("smoothed", samples=50) == table["smoothed"].gain


# ---- the table ------------------------------------------------------------------------------------------------------

def test_the_three_files_hold_the_same_figures(table: SeedTable, tmp_path: Path) -> None:
    paths = table.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["seeds.json", "seeds.md", "seeds.png"]
    stored, text = json.loads(paths[1].read_text()), paths[0].read_text()
    for row, plain in zip(table.rows, stored["rows"]):
        assert plain["miou"]["value"] == row.miou.value and plain["threshold"] == row.threshold
        assert f"| {row.method} | {100 * row.miou.value:.1f} [" in text
        assert set(plain["iou"]) == {"background", *WORLD_CLASSES} and None in plain["iou"].values()
    assert Image.open(paths[2]).size[0] > 300
    assert "NaN" not in paths[1].read_text() and str(tmp_path) not in text + paths[1].read_text()


def test_the_caption_tells_data_model_and_command(dataset: SegmentationFolder, backbone: Backbone, table: SeedTable) -> None:
    assert "embedded world" in table.caption and "say nothing about photographs" in table.caption and "7 pictures" in table.caption
    assert "Times on CPU" in table.caption and backbone.name in table.caption and "random weights" not in table.caption
    told = evaluate_seeds(dataset, backbone, ("gradcam",), limit=1, command="freqseg seeds small", **QUICK)
    assert "`freqseg seeds small`" in told.caption


def test_random_weights_are_called_random(dataset: SegmentationFolder) -> None:
    config = dict(embed_dim=24, vision_cfg=dict(layers=2, width=32, head_width=16, patch_size=16, image_size=64),
                  text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1), quick_gelu=True)
    import open_clip
    backbone = Backbone(build_clip(config), "tiny", open_clip.get_tokenizer("ViT-B-16"))
    table = evaluate_seeds(dataset, backbone, ("gradcam", "transport"), limit=2, pretrained=None, **QUICK)
    assert "tiny with random weights" in table.caption


def test_another_wording_is_used_and_must_name_the_classes(dataset: SegmentationFolder, backbone: Backbone) -> None:
    alone = usual_wording(backbone, dataset.classes, ())
    table = evaluate_seeds(dataset, backbone, ("gradcam",), wording=alone, **QUICK)
    assert table.background == () and "0 background prompts" in table.caption
    with pytest.raises(InputError, match="wording is for 2 classes, fish, key"):
        evaluate_seeds(dataset, backbone, ("gradcam",), wording=usual_wording(backbone, ("fish", "key")), **QUICK)


@pytest.mark.parametrize("options, named", [
    (dict(methods=("cam",)), "cam"), (dict(limit=0), "limit=0"), (dict(batch=0), "batch=0"), (dict(variant="best"), "variant='best'"),
    (dict(thresholds=(0.5, 1.5)), "thresholds="), (dict(size=0), "size=0"),
    (dict(precision="fp8"), "precision='fp8'"), (dict(threshold_split="nowhere"), "nowhere")])
def test_wrong_options_are_named(options: dict, named: str, dataset: SegmentationFolder, backbone: Backbone) -> None:
    with pytest.raises(InputError, match=named): evaluate_seeds(dataset, backbone, **{"methods": ("gradcam",), **options, **QUICK})


def test_a_picture_without_a_mask_is_named(world: Path, backbone: Backbone) -> None:
    with pytest.raises(InputError, match="has no mask"):
        evaluate_seeds(open_folder(world, "test", masks=False), backbone, ("gradcam",), **QUICK)


def test_an_unknown_row_is_named(table: SeedTable) -> None:
    with pytest.raises(InputError, match="no row 'transport'"): table["transport"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_readings_and_maps_of_ones_own_are_scored_like_any_other(precision: str, monkeypatch: pytest.MonkeyPatch, dataset: SegmentationFolder, backbone: Backbone) -> None:
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    register_map("own", "patch and text again", tower={"last_input": True}, kind="cosine")(lambda parts: parts.cosines(value_path(parts.backbone, parts.features)))
    methods = ("patch_text", "own", "sclip", "clearclip", "naclip", "clip_surgery")
    table = evaluate_seeds(dataset, backbone, methods, batch=4, limit=4, precision=precision, **QUICK)
    assert [row.method for row in table.rows] == list(methods) and all(0 < row.miou.value < 1 and row.seconds > 0 for row in table.rows)
    assert table["own"].miou.value == pytest.approx(table["patch_text"].miou.value, abs=1e-6 if precision == "fp32" else 5e-3)
    with pytest.warns(FutureWarning, match="'dual'"): assert evaluate_seeds(dataset, backbone, ("inverse",), limit=1, **QUICK).rows[0].method == "dual"


# ---- photographs ----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_photographs_of_many_sizes_score_with_a_random_tower(real_data: Path) -> None:
    split = open_voc(real_data / "voc12_mini", "val", masks=True)
    backbone = load_clip("ViT-B-32", pretrained=None)
    table = evaluate_seeds(split, backbone, tuple(METHODS), size=160, limit=5, batch=2, pretrained=None, **QUICK)
    assert "PASCAL VOC 2012" in table.caption and "random weights" in table.caption and len(table.background) == 25
    assert all(row.images == 5 and math.isfinite(row.miou.value) for row in table.rows)
    assert table["gradcam"].threshold in THRESHOLDS


@pytest.mark.slow
def test_reading_in_other_processes_changes_nothing(dataset: SegmentationFolder, backbone: Backbone, table: SeedTable) -> None:
    other = evaluate_seeds(dataset, backbone, FEW, batch=4, workers=2, **QUICK)
    assert [row.miou for row in other.rows] == [row.miou for row in table.rows]
