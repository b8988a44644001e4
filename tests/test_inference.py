"""Segmenting: against a slow loop over pictures, the same for every batching, in order, constant in memory, honest about labels."""

import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings as limits
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score, confusion_matrix as sklearn_confusion
from torchmetrics.functional.classification import multiclass_jaccard_index

import freqseg.work.inference as room
from freqseg.work.corruptions import Corruption
from freqseg.crf import crf_image, crf_settings
from freqseg.data import SegmentationFolder, list_folder, open_folder, zero_shot_view
from freqseg.lists import write_labels, zero_shot_split
from freqseg.pictures import palette, read_mask, write_mask
from freqseg.files import InputError
from freqseg.metrics import boundary_iou, confusion_matrix, mean_iou, trimap_confusion, trimap_miou
from freqseg.conditions import software
from freqseg.work.evaluation import BIASES, FIGURES, SystemReport, evaluate_system
from freqseg.work.inference import (INFERENCE, MOST_NAMES, Bands, Inference, Job, Scoring, AugmentedView, class_scores,
                                    grouped, in_sequence, interpolation_matrix, label, merge_views, merged_labels,
                                    picture_indices, refined, scaled_pixels, segment, segment_picture, stream,
                                    window_boxes, write_masks)
from freqseg.spectra import split_bands

NAMES = ("disc", "box", "bar")
PATCH = 4
SIZES = ((24, 32), (32, 24), (24, 32), (21, 30), (24, 32), (32, 24), (24, 32))   # of the toy pictures
MEAN = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
QUIET = dict(progress=False, samples=20)


class Toy(torch.nn.Module):
    "A system with fixed random weights: patches of 4 pixels, tokens of width 8, one nonlinearity so that averages are not trivial."

    def __init__(self, names: tuple[str, ...] = NAMES, seed: int = 0) -> None:
        super().__init__()
        self.classes, self.num_classes = tuple(names), len(names) + 1
        generator = torch.Generator().manual_seed(seed)
        self.embed = torch.nn.Parameter(torch.randn(8, 3, PATCH, PATCH, generator=generator))
        self.head = torch.nn.Parameter(torch.randn(self.num_classes, 8, 1, 1, generator=generator))
        self.backbone = SimpleNamespace(patch_size=PATCH, device=torch.device("cpu"), normalise=lambda pixels: pixels - MEAN)
        self.config = {"seed": seed}
        self.asked: list[tuple[int, ...]] = []

    def predict(self, images: torch.Tensor, keep=None) -> torch.Tensor:
        assert not any(side % PATCH for side in images.shape[-2:]) and not self.training
        self.asked.append(tuple(images.shape))
        tokens = F.conv2d(images, self.embed, stride=PATCH)
        return F.conv2d(torch.tanh(tokens if keep is None else keep(tokens)), self.head)

    def cam(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        maps = self.predict(images)[:, 1:].sigmoid()
        return maps / maps.amax((2, 3), keepdim=True) * labels[..., None, None]

    def explain(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cams = self.cam(images, labels)
        large = F.interpolate(cams, images.shape[-2:], mode="bilinear")
        return cams, torch.cat([torch.full_like(large[:, :1], 0.7), large], 1).argmax(1)


def write_folder(folder: Path, sizes=SIZES, seed: int = 0, split: str = "val") -> Path:
    "Pictures of random squares with their masks, labels and list."
    generator = np.random.default_rng(seed)
    names = [f"{split}_{index}" for index in range(len(sizes))]
    present = np.zeros((len(sizes), len(NAMES)), bool)
    for row, (name, (height, width)) in enumerate(zip(names, sizes)):
        image = generator.integers(0, 90, (height, width, 3), np.uint8)
        mask = np.zeros((height, width), np.uint8)
        for value in generator.permutation(3)[:2] + 1:
            top, left = generator.integers(0, height - 9), generator.integers(0, width - 9)
            mask[top:top + 9, left:left + 9], image[top:top + 9, left:left + 9, value - 1] = value, 230
        mask[:2] = 255
        present[row, [value - 1 for value in np.unique(mask) if value not in (0, 255)]] = True
        (folder / "JPEGImages").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"JPEGImages/{name}.png")
        write_mask(folder / f"SegmentationClass/{name}.png", mask)
    lists = folder / "ImageSets/Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    earlier = dict(line.split(" ", 1) for line in (folder / "labels.txt").read_text().splitlines()) if (folder / "labels.txt").exists() else {}
    write_labels(folder / "labels.txt", names, present, NAMES)
    with open(folder / "labels.txt", "a") as file:
        file.writelines(f"{name} {rest}\n" for name, rest in earlier.items())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy") / "data"
    return write_folder(write_folder(root), SIZES[:4], seed=1, split="test")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> SegmentationFolder:
    return open_folder(folder, "val", masks=True)


@pytest.fixture
def system() -> Toy:
    return Toy().eval()


@pytest.fixture(scope="module")
def report(dataset: SegmentationFolder) -> SystemReport:
    return evaluate_system(Toy().eval(), dataset, scales=(1.0, 1.5), bands=0.2, threshold_split="test", examples=2, command="again", weights="none", **QUIET)


def by_hand(system: Toy, image: Image.Image, scales, flip: bool, average: str = "logits", keep=None) -> torch.Tensor:
    "Scores (C, H, W) of one picture, one view at a time: resize, pad with the mean, predict, enlarge, crop, mirror back, average."
    found = []
    for scale in scales:
        width, height = (max(1, round(side * scale)) for side in image.size)
        pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC))).permute(2, 0, 1).float() / 255 - MEAN
        for mirrored in (False, True)[:1 + flip]:
            shown = pixels.flip(-1) if mirrored else pixels
            logits = system.predict(F.pad(shown, (0, -width % PATCH, 0, -height % PATCH))[None], keep)
            # Pixel centres of the result, in tokens of the padded showing.
            y, x = ((torch.arange(n) + 0.5) * side / n / (PATCH * tokens) * 2 - 1
                    for n, side, tokens in zip((image.height, image.width), (height, width), logits.shape[-2:]))
            places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
            scores = F.grid_sample(logits, places, mode="bilinear", padding_mode="border", align_corners=False)[0]
            scores = scores.softmax(0) if average == "probabilities" else scores
            found.append(scores.flip(-1) if mirrored else scores)
    return torch.stack(found).mean(0)


def scores_of(system: Toy, dataset: SegmentationFolder, inference: Inference) -> list[torch.Tensor]:
    "Scores (C, H, W) of every picture as the room computes them."
    return [merge_views(found.views["seg"], found.picture.size, Scoring(inference.average))
            for found in stream(Job(system, inference, progress=False), dataset, range(len(dataset)))]


# ---- one picture ----------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("scales, flip, average", [((1.0,), False, "logits"), ((1.0, 1.5), True, "logits"), ((0.75, 1.0, 1.3), True, "probabilities")])
def test_scores_equal_a_slow_loop_over_pictures_scales_and_mirrors(scales, flip, average, system, dataset) -> None:
    found = scores_of(system, dataset, Inference(scales, flip, average=average, batch=3))
    for scores, sample in zip(found, dataset, strict=True):
        torch.testing.assert_close(scores, by_hand(system, sample.image, scales, flip, average), atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("inference", [Inference((1.0, 1.3)), Inference((1.0,), window=16, stride=9)])
def test_a_mirrored_picture_gives_the_mirrored_scores(inference, system, dataset) -> None:
    image = dataset[3].image   # 21 x 30: no whole patches
    pictures = [room.Picture(0, "", np.array(one), scaled_pixels(one, inference.scales), None, None)
                for one in (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))]
    views = room.augmented_views(system.backbone, pictures, lambda images, _: system.predict(images), inference)
    straight, mirrored = (merge_views(one, (21, 30)) for one in views)
    if inference.window: straight, mirrored = straight[:, :, 9:-9], mirrored[:, :, 9:-9]   # windows are laid from the left
    torch.testing.assert_close(mirrored, straight.flip(-1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_one_window_as_large_as_the_picture_changes_nothing(system, dataset) -> None:
    plain, windowed = (scores_of(system, dataset, Inference((1.0,), True, window=window)) for window in (None, 64))
    for a, b in zip(plain, windowed): torch.testing.assert_close(a, b)


@torch.no_grad()
def test_windows_of_whole_patches_agree_with_a_local_system_away_from_their_edges(system, dataset) -> None:
    # The toy's answer depends on its patch alone, so a window that begins on a patch must repeat what the whole picture says.
    whole, windowed = (scores_of(system, dataset, Inference((1.0,), False, window=window, stride=stride))[0] for window, stride in ((None, None), (16, 8)))
    inner = windowed[:, 2:6, 2:6] - whole[:, 2:6, 2:6]
    assert inner.abs().max() < 1e-5 and (windowed.argmax(0) == whole.argmax(0)).float().mean() > 0.8


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.data())
def test_windows_cover_every_pixel_and_have_one_size(height, width, window, data) -> None:
    boxes = window_boxes((height, width), window, data.draw(st.integers(1, window)))
    seen = np.zeros((height, width), int)
    for top, left, bottom, right in boxes: seen[top:bottom, left:right] += 1
    assert seen.min() >= 1 and {(b - t, r - l) for t, l, b, r in boxes} == {(min(window, height), min(window, width))} and len(set(boxes)) == len(boxes)


def published_boxes(height: int, width: int, window: int, stride: int) -> list[tuple[int, int, int, int]]:
    "Windows in the order of mmsegmentation's `slide_inference`, one at a time."
    boxes = []
    for row in range(max(height - window + stride - 1, 0)//stride + 1):
        for column in range(max(width - window + stride - 1, 0)//stride + 1):
            bottom, right = min(row*stride + window, height), min(column*stride + window, width)
            boxes.append((max(bottom - window, 0), max(right - window, 0), bottom, right))
    return boxes


@given(st.integers(1, 2500), st.integers(1, 2500))
def test_zegclip_s_windows_are_the_published_ones(height, width) -> None:
    assert window_boxes((height, width), 512, 426) == published_boxes(height, width, 512, 426)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(4, 60), st.data())
def test_windows_of_any_size_are_the_published_ones(height, width, window, data) -> None:
    stride = data.draw(st.integers(2, window))
    assert window_boxes((height, width), window, stride) == published_boxes(height, width, window, stride)


@given(st.integers(1, 80), st.integers(1, 9))
def test_interpolation_over_whole_tokens_is_torch_s(length, tokens) -> None:
    values = torch.randn(1, 1, tokens)
    expected = F.interpolate(values, length, mode="linear", align_corners=False)[0, 0]
    torch.testing.assert_close(interpolation_matrix(length, tokens, tokens) @ values[0, 0], expected, atol=1e-5, rtol=1e-4)


@given(st.integers(2, 60), st.integers(1, 9), st.floats(0.1, 1), st.booleans(), st.floats(0, 0.45), st.floats(0.55, 1))
def test_rows_of_an_interpolation_add_up_to_one_inside_the_box_and_to_nothing_outside(length, tokens, part, flipped, start, stop) -> None:
    matrix = interpolation_matrix(length, tokens, max(0.5, part * tokens), (start, stop), flipped)
    place = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    inside = (place >= start) & (place < stop)
    torch.testing.assert_close(matrix.sum(1), (inside.flip(0) if flipped else inside).float())
    assert matrix.min() >= 0


def test_labels_made_in_strips_are_the_labels_made_at_once(monkeypatch) -> None:
    views = [AugmentedView(torch.randn(5, 4, 6), (3.5, 6), (0, 1), (0, 1), (0, mirrored)) for mirrored in (False, True)]
    expected = merge_views(views, (37, 41)).argmax(0)
    monkeypatch.setattr(room, "LARGEST", 5 * 41 * 3)
    assert np.array_equal(merged_labels(views, (37, 41)), expected.numpy())


def test_inference_of_the_papers() -> None:
    assert INFERENCE["weclip"] == Inference((1.0, 0.75), True, 512) and INFERENCE["dfa"].scales == (1.0, 1.2, 1.5)
    assert {tuple(pixels.shape) for pixels in scaled_pixels(Image.new("RGB", (500, 375)), (1.0, 0.75), Inference(side=512)).values()} == {(3, 384, 512), (3, 288, 384)}


# ---- many pictures --------------------------------------------------------------------------------------------------

@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 5), st.integers(1, 12))
def test_groups_hold_equal_keys_lose_nothing_and_let_nobody_wait(keys, size, window) -> None:
    read, groups = 0, []
    def counted():
        nonlocal read
        for number, key in enumerate(keys):
            read = number + 1
            yield number, key
    for group in grouped(counted(), lambda item: item[1], size, window):
        groups.append(group)
        if read < len(keys): assert all(read - 1 - position <= window for position, _ in group)
    assert all(len({item[1] for _, item in group}) == 1 and 1 <= len(group) <= size for group in groups)
    pairs = [pair for group in groups for pair in group]
    assert list(in_sequence(pairs)) == [(number, key) for number, key in enumerate(keys)]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 4, 9])
def test_batching_changes_neither_labels_nor_their_order(batch, system, dataset) -> None:
    expected = [by_hand(system, sample.image, (1.0,), True).argmax(0).numpy() for sample in dataset]
    found = list(segment(system, dataset, Inference(batch=batch), progress=False))
    assert [name for name, _ in found] == list(dataset.ids)
    for (_, labels), plain in zip(found, expected): assert (labels == plain).mean() > 0.999
    assert max(shape[0] for shape in system.asked[len(expected) * 2:]) <= batch


def test_few_pictures_are_alive_whatever_the_data_set(tmp_path, system, monkeypatch) -> None:
    monkeypatch.setattr(room, "OVERTAKING", 2)
    many = open_folder(write_folder(tmp_path / "many", [(12 + 4 * (i % 3), 16) for i in range(60)]), "val", masks=True)
    alive, most, read = weakref.WeakSet(), [0], room._Reader._read
    class Counted(room.Picture): __hash__ = object.__hash__
    def reading(self, index):
        picture = read(self, index)
        alive.add(one := Counted(**vars(picture)))
        most[0] = max(most[0], len(alive))
        return one
    monkeypatch.setattr(room._Reader, "_read", reading)
    for _ in segment(system, many, Inference(batch=4), progress=False): pass
    assert 0 < most[0] <= 12 and len(alive) <= 2


def test_the_crf_reads_only_a_little_ahead_of_its_results(pydensecrf, dataset, system) -> None:
    taken = [0]
    def items():
        for found in stream(job, dataset, range(len(dataset)), masks=True):
            taken[0] += 1
            yield label(job, found)
    job = Job(system, Inference(), ("mask", "seg"), crf=crf_settings("weclip"), progress=False)
    for given_back, item in enumerate(refined(items(), job.crf, workers=1), 1):
        assert taken[0] <= given_back + 1 and not item.unary and list(item.labels) == ["seg", "mask", "seg_crf", "mask_crf"]
    assert given_back == len(dataset)


@torch.no_grad()
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_labels_after_the_crf_are_the_crf_of_the_probabilities(pydensecrf, workers, dataset, system) -> None:
    found = dict(segment(system, dataset, "single", crf="weclip", crf_workers=workers, indices=[2, 3], progress=False))
    for index in (2, 3):
        sample = dataset[index]
        probs = by_hand(system, sample.image, (1.0,), False).softmax(0).numpy()
        assert (found[sample.id] == crf_image(np.array(sample.image), probs, labels=True)).mean() > 0.995


@torch.no_grad()
def test_only_classes_below_the_floor_of_the_crf_are_kept_from_it(dataset, system) -> None:
    system.head = torch.nn.Parameter(system.head * torch.tensor([1.0, 1.0, 1.0, 0.0]).view(-1, 1, 1, 1))
    ask = system.predict
    for offset, missing in ((-4.0, False), (-20.0, True)):
        system.predict = lambda images, offset=offset: ask(images) + offset * torch.tensor([0.0, 0.0, 0.0, 1.0]).view(-1, 1, 1)
        job = Job(system, Inference(flip=False), crf=crf_settings("weclip"), progress=False)
        classes, probs = label(job, next(stream(job, dataset, [0]))).unary["seg_crf"]
        assert (3 not in classes) == missing and probs.shape == (len(classes), 24, 32) and probs.sum(0) == pytest.approx(1, abs=1e-4)


def test_leaving_early_stops_everything(pydensecrf, dataset, system) -> None:
    system.train()
    labels = segment(system, dataset, "single", crf="weclip", crf_workers=1, progress=False)
    next(labels)
    assert not system.training
    labels.close()
    del labels
    assert system.training


# ---- masks on disk --------------------------------------------------------------------------------------------------

def test_masks_are_palette_pictures_in_voc_colours_named_by_id(tmp_path, dataset, system) -> None:
    assert write_masks(system, dataset, tmp_path / "out", progress=False) == len(dataset)
    expected = dict(segment(system, dataset, progress=False))
    for name in dataset.ids:
        with Image.open(tmp_path / f"out/{name}.png") as image:
            assert image.mode == "P" and np.array_equal(np.reshape(image.getpalette()[:63], (-1, 3)), palette()[:21])
        assert np.array_equal(read_mask(tmp_path / f"out/{name}.png", 4), expected[name])


def test_only_missing_masks_are_made_when_asked(tmp_path, dataset, system) -> None:
    write_masks(system, dataset, tmp_path, limit=3, progress=False)
    (tmp_path / f"{dataset.ids[1]}.png").unlink()
    kept = {name: (tmp_path / f"{name}.png").stat().st_mtime_ns for name in (dataset.ids[0], dataset.ids[2])}
    assert write_masks(system, dataset, tmp_path, skip_existing=True, limit=4, progress=False) == 2
    assert kept == {name: (tmp_path / f"{name}.png").stat().st_mtime_ns for name in kept}


# ---- figures --------------------------------------------------------------------------------------------------------

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
def test_several_cam_scales_average_and_reach_one(dataset, system) -> None:
    job = Job(system, Inference(flip=False), ("seed",), cams=Inference((1.0, 1.5), flip=False), progress=False)
    for found in stream(job, dataset, range(3)):
        peaks = found.cams.cams.float().amax((0, 2, 3))
        torch.testing.assert_close(peaks, found.cams.present.float(), atol=1e-3, rtol=0)
        assert found.cams.cams.shape[-2:] == tuple(found.cams.covered)


@torch.no_grad()
def test_the_mask_is_the_pseudo_label_without_its_padding(dataset, system) -> None:
    found = next(stream(Job(system, Inference(), ("mask",), progress=False), dataset, [3]))
    shown = F.pad(torch.from_numpy(np.array(dataset[3].image)).permute(2, 0, 1).float() / 255 - MEAN, (0, 2, 0, 3))
    assert np.array_equal(found.pseudo, system.explain(shown[None], dataset.labels[3:4])[1][0, :21, :30].numpy())
    system.explain = lambda images, labels: (system.cam(images, labels), torch.full((len(images), *images.shape[-2:]), 255))
    assert not next(stream(Job(system, Inference(), ("mask",), progress=False), dataset, [3])).pseudo.any()


@torch.no_grad()
def test_seeds_and_masks_come_from_one_look_and_are_what_two_would_give(dataset, system, monkeypatch) -> None:
    alone = {name: next(stream(Job(system, Inference(), (name,), progress=False), dataset, [3])) for name in ("seed", "mask")}
    looks = system.asked[:]
    system.asked.clear()
    together = next(stream(Job(system, Inference(), ("seed", "mask"), progress=False), dataset, [3]))
    assert len(system.asked) == 1 and len(looks) == 2
    assert torch.equal(together.cams.cams, alone["seed"].cams.cams) and together.cams.covered == alone["seed"].cams.covered
    assert np.array_equal(together.pseudo, alone["mask"].pseudo) and alone["mask"].cams is None
    system.asked.clear()
    scaled = next(stream(Job(system, Inference(), ("seed", "mask"), Inference((1.0, 2.0), flip=False), progress=False), dataset, [3]))
    assert len(system.asked) == 3 and not torch.equal(scaled.cams.cams, together.cams.cams) and np.array_equal(scaled.pseudo, together.pseudo)


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


# ---- what masks may be used for -------------------------------------------------------------------------------------

def test_maps_and_pseudo_labels_know_the_label_table_and_not_the_masks(tmp_path, dataset, system) -> None:
    def found(split: SegmentationFolder) -> list:
        return list(stream(Job(system, Inference(), ("seed", "mask"), progress=False), split, range(3), masks=True))
    other = write_folder(tmp_path / "other")
    for name in dataset.ids:   # other masks altogether, the same label table
        write_mask(other / f"SegmentationClass/{name}.png", np.full(read_mask(other / f"SegmentationClass/{name}.png").shape, 3, np.uint8))
    for a, b in zip(found(dataset), found(open_folder(other, "val", masks=True))):
        assert torch.equal(a.cams.cams, b.cams.cams) and torch.equal(a.cams.classes, b.cams.classes) and np.array_equal(a.pseudo, b.pseudo)


def test_nothing_opens_a_mask_unless_it_is_scored(tmp_path, system) -> None:
    blind = write_folder(tmp_path / "blind")
    for path in (blind / "SegmentationClass").iterdir(): path.write_bytes(b"no picture at all")
    split = SegmentationFolder(list_folder(blind, "val"))
    job = Job(system, Inference(), ("seed", "mask", "seg"), progress=False)
    assert len(list(stream(job, split, range(len(split))))) == len(split)
    assert write_masks(system, split, tmp_path / "out", limit=2, progress=False) == 2


# ---- what goes wrong ------------------------------------------------------------------------------------------------

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


def test_grey_pictures_are_segmented_like_their_copies_in_colour(tmp_path, system) -> None:
    grey, colour = (write_folder(tmp_path / name, SIZES[:2]) for name in ("grey", "colour"))
    for name in ("val_0", "val_1"):
        picture = Image.open(grey / f"JPEGImages/{name}.png").convert("L")
        picture.save(grey / f"JPEGImages/{name}.png"); picture.convert("RGB").save(colour / f"JPEGImages/{name}.png")
    found = [list(segment(system, open_folder(root, "val"), progress=False)) for root in (grey, colour)]
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(*found))


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


# ---- pictures made worse --------------------------------------------------------------------------------------------

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


# ---- processes and photographs --------------------------------------------------------------------------------------

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


# ---- zero-shot figures ----------------------------------------------------------------------------------------------

class ZeroShotToy(Toy):
    "Every class by itself, seen ones held back."
    activation = "sigmoid"

    def __init__(self, handicap: float) -> None:
        super().__init__(seed=3)
        self.num_classes, self.handicap = len(self.classes), handicap*torch.tensor([1., 0., 1.])

    def predict(self, images, keep=None): return super().predict(images, keep)[:, 1:]


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


def windows_by_hand(system: Toy, image: Image.Image, window: int, stride: int) -> torch.Tensor:
    "Scores (C, H, W): of every window enlarged, made probabilities, added up where windows lie, divided by how many there are."
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - MEAN
    total, count = torch.zeros(system.num_classes, *pixels.shape[1:]), torch.zeros(pixels.shape[1:])
    for top, left, bottom, right in published_boxes(*pixels.shape[1:], window, stride):
        crop = pixels[:, top:bottom, left:right]
        logits = system.predict(F.pad(crop, (0, -crop.shape[2] % PATCH, 0, -crop.shape[1] % PATCH))[None])
        total[:, top:bottom, left:right] += F.interpolate(logits, scale_factor=PATCH, mode="bilinear")[0, :, :crop.shape[1], :crop.shape[2]].sigmoid()
        count[top:bottom, left:right] += 1
    return total / count


def agree(labels: np.ndarray, ranked: torch.Tensor, scores: torch.Tensor, floor: float | None = None) -> None:
    "Labels are the best of `ranked` (C, H, W), and open exactly where its own score is below the floor. Ties within rounding are left out."
    best, margins = ranked.argmax(0), ranked.topk(2, 0).values.diff(dim=0)[0].abs()
    own, clear = scores.gather(0, best[None])[0], margins > 1e-4
    if floor is not None: best, clear = best.masked_fill(own < floor, 255), clear & ((own - floor).abs() > 1e-5)
    assert clear.float().mean() > .98 and np.array_equal(labels[clear], best[clear])


@torch.no_grad()
@pytest.mark.parametrize("window, stride", [(12, 8), (16, 5), (13, 13), (40, 40)])
def test_handicapped_windows_equal_a_slow_loop(window, stride, dataset) -> None:
    system = ZeroShotToy(.15).eval()
    job = Job(system, Inference(flip=False, window=window, stride=stride, average="probabilities"), progress=False)
    for found, sample in zip(stream(job, dataset, range(len(dataset))), dataset, strict=True):
        scores = windows_by_hand(system, sample.image, window, stride)
        merged = merge_views(found.views["seg"], found.picture.size, job.scoring)
        torch.testing.assert_close(merged, scores, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(job.scoring.ranked(merged), scores - system.handicap[:, None, None], atol=2e-5, rtol=1e-4)
        agree(segment_picture(system, sample.image, job.inference), scores - system.handicap[:, None, None], scores)


@torch.no_grad()
@pytest.mark.parametrize("handicap", [0., .1, .6])
@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_a_pixel_is_open_where_the_winner_s_own_score_is_below_the_floor(average, handicap, dataset) -> None:
    system, image = ZeroShotToy(handicap).eval(), dataset[3].image
    scores = by_hand(system, image, (1.0,), False).sigmoid()
    ranked = scores - system.handicap[:, None, None]
    floor = scores.gather(0, ranked.argmax(0)[None]).median().item() + 1e-4
    labels = segment_picture(system, image, Inference(flip=False, average=average), floor)
    agree(labels, ranked, scores, floor)
    assert .3 < (labels == 255).mean() < .7
    agree(segment_picture(system, image, Inference(flip=False, average=average)), ranked, scores)
    assert (segment_picture(system, image, floor=1.) == 255).all()


@torch.no_grad()
@pytest.mark.parametrize("names", [("bar", "disc"), ("box",), NAMES[::-1], NAMES])
def test_only_chosen_classes_and_the_background_answer_in_the_order_asked_for(names, system, dataset) -> None:
    image, shown = dataset[3].image, [0, *(NAMES.index(name) + 1 for name in names)]
    scores = by_hand(system, image, (1.0,), True).softmax(0)[shown]
    for floor in (None, .35): agree(segment_picture(system, image, floor=floor, classes=names), scores, scores, floor)
    everything = segment_picture(system, image)
    if len(names) == len(NAMES): assert np.array_equal(np.array(shown)[segment_picture(system, image, classes=names)], everything)
    zero_shot, own = ZeroShotToy(.1).eval(), [NAMES.index(name) for name in names]
    own_scores = by_hand(zero_shot, image, (1.0,), False).sigmoid()[own]
    if len(names) > 1: agree(segment_picture(zero_shot, image, classes=names), own_scores - zero_shot.handicap[own, None, None], own_scores)
    else: assert not segment_picture(zero_shot, image, classes=names).any()


def test_classes_that_cannot_answer_are_named(system, dataset) -> None:
    image = dataset[0].image
    for names, told in ((["disk"], "'disk'. Did you mean 'disc'"), ([], "at least one"), (["box", "box"], "each once"), ("box", "list of names")):
        with pytest.raises(InputError, match=told): segment_picture(system, image, classes=names)
    many = tuple(f"thing {number}" for number in range(MOST_NAMES + 1))
    with pytest.raises(InputError, match="255 names.*254"): segment_picture(Toy(many).eval(), image)
    assert segment_picture(Toy(many).eval(), image, classes=many[1:]).max() <= MOST_NAMES
    assert segment_picture(Toy(many[1:]).eval(), image, floor=1.).min() == 255


def test_a_zero_shot_system_is_refused_by_data_with_a_background(dataset) -> None:
    with pytest.raises(InputError, match="background"): evaluate_system(ZeroShotToy(.1), dataset, figures=("seg",), progress=False)


def test_the_short_side_sets_the_scale() -> None:
    assert Inference(short=512).fitted((375, 500)) == (512, 683) and Inference(short=512).fitted((500, 375)) == (683, 512)
    assert Inference(short=512).fitted((10, 2000)) == (10, 2048) and Inference(short=512).fitted((500, 2000)) == (512, 2048)   # no picture becomes endless
    with pytest.raises(InputError, match="one of them"): Inference(short=512, side=512)
