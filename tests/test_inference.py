"""freqseg.work.inference: whole pictures through any system, against slow loops."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toy_inference import MEAN, NAMES, PATCH, SIZES, Toy, ZeroShotToy, by_hand, dataset, folder, system, write_folder  # noqa: F401 (fixtures)

import freqseg.work.inference as room
from freqseg.crf import crf_image, crf_settings
from freqseg.data import SegmentationFolder, list_folder, open_folder
from freqseg.files import InputError
from freqseg.pictures import palette, read_mask, write_mask
from freqseg.work.inference import (
    INFERENCE,
    MOST_NAMES,
    AugmentedView,
    Inference,
    Job,
    Scoring,
    grouped,
    in_sequence,
    interpolation_matrix,
    label,
    merge_views,
    merged_labels,
    refined,
    scaled_pixels,
    segment,
    segment_picture,
    stream,
    window_boxes,
    write_masks,
)


def scores_of(system: Toy, dataset: SegmentationFolder, inference: Inference) -> list[torch.Tensor]:
    "Scores (C, H, W) of every picture as the room computes them."
    return [merge_views(found.views["seg"], found.picture.size, Scoring(inference.average))
            for found in stream(Job(system, inference, progress=False), dataset, range(len(dataset)))]


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


def test_grey_pictures_are_segmented_like_their_copies_in_colour(tmp_path, system) -> None:
    grey, colour = (write_folder(tmp_path / name, SIZES[:2]) for name in ("grey", "colour"))
    for name in ("val_0", "val_1"):
        picture = Image.open(grey / f"JPEGImages/{name}.png").convert("L")
        picture.save(grey / f"JPEGImages/{name}.png"); picture.convert("RGB").save(colour / f"JPEGImages/{name}.png")
    found = [list(segment(system, open_folder(root, "val"), progress=False)) for root in (grey, colour)]
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(*found))


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


def test_the_short_side_sets_the_scale() -> None:
    assert Inference(short=512).fitted((375, 500)) == (512, 683) and Inference(short=512).fitted((500, 375)) == (683, 512)
    assert Inference(short=512).fitted((10, 2000)) == (10, 2048) and Inference(short=512).fitted((500, 2000)) == (512, 2048)   # no picture becomes endless
    with pytest.raises(InputError, match="one of them"): Inference(short=512, side=512)
