"""The explorer without widgets: views against the rooms behind them, one analysis, masks and scores, pictures of all kinds, saved views."""

import errno
import io
import json
import os
import xml.etree.ElementTree as xml
from dataclasses import asdict, fields, replace
from pathlib import Path

import matplotlib
import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import freqseg.faces.explorer as room
import freqseg.files
import freqseg.maps as cams_room
from freqseg.affinity import affinity_request, box_mask, propagate
from freqseg.cam import normalise_cam
from freqseg.systems.segmenter import system_named
from freqseg.work.checkpoints import load_system, save_system
from freqseg.clip import Backbone, load_clip, merge_requests
from freqseg.lists import COCOSTUFF_CLASSES, IGNORE
from freqseg.pictures import write_mask
from freqseg.faces.explorer import (CELL_SIDE, LONGEST_SIDE, Analysis, Subject, View, dataset_picture, explore, jpeg, mask_cells, open_model, patch_cells,
                              photograph, save_view, scene, spectrum_svg, uploaded, usual_side, view_cells, view_code, view_figure)
from freqseg.files import InputError
from freqseg.maps import CamParts, CamSettings, cam_parts, frequency_cams
from freqseg.faces.plots import cam_panel, overlay, overlays, paint_mask, png_bytes
from freqseg.prompts import embed_wording, usual_wording
from freqseg.world.scenes import WORLD_CLASSES, World

SMALL = 96   # longest side, pixels, where the size does not matter: 12 x 12 patches of the world's CLIP
plain = pytest.mark.usefixtures("plain_figures")
USUAL = View()
VARIED = View(maps="transport", affinity="both", lambda_h=.3, epsilon=.05, band="stack", bands=3, colour_scale="shared", opacity=.7, cmap="viridis")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_clip("world")


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return explore(scene(48), model="world")


@pytest.fixture(scope="module")
def small(backbone: Backbone) -> Analysis:
    return explore(scene(48), ["wheel", "star"], backbone, SMALL)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    "A list that grows by one with every pass through a tower."
    passes: list[int] = []
    encode = Backbone.encode

    def counted(self: Backbone, *args, **options):
        passes.append(1)
        return encode(self, *args, **options)

    monkeypatch.setattr(Backbone, "encode", counted)
    return passes


def picture(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    "Smooth random colours, (height, width, 3) uint8."
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded_as(image: Image.Image, kind: str, **options) -> bytes:
    "A picture file in memory."
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def plain_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    "Figures of one white inch, for tests that look at the other files of a saved view."
    monkeypatch.setattr(room, "view_figure", lambda analysis, view: matplotlib.figure.Figure(figsize=(1, 1)))


def subject(pixels: np.ndarray, **about) -> Subject:
    "A picture made here."
    return Subject(pixels, "a picture", "picture()", **about)


def assert_drawable(analysis: Analysis, view: View = USUAL) -> None:
    "Everything that the screen shows of a view can be made."
    shown = analysis.shown(view)
    height, width = analysis.subject.image.shape[:2]
    scale = CELL_SIDE / max(height, width)
    expected = tuple(max(1, round(side * scale)) for side in (width, height))
    table = view_cells(analysis, shown, view)
    assert len(table) == len(analysis.names) and all(len(row) == len(shown.columns) for row in table)
    for cell in [*(cell for row in table for cell in row), *mask_cells(analysis, shown), *patch_cells(analysis, (0, 0), view)]:
        size = Image.open(io.BytesIO(cell.picture)).size
        assert max(size) == CELL_SIDE and max(abs(a - b) for a, b in zip(size, expected, strict=True)) <= 1 and cell.alt
    for maps in shown.columns.values():
        assert maps.shape == (len(analysis.names), *analysis.grid) and maps.isfinite().all() and maps.min() >= 0 and maps.max() <= 1
    assert shown.labels.shape == (height, width) and shown.labels.dtype == np.uint8 and shown.labels.max() <= len(analysis.names)
    assert xml.fromstring(spectrum_svg(shown, view.mu)) is not None


# ---- views against the rooms behind them ----------------------------------------------------------------------------

SAME = [
    (View(), "GradCAM", "gradcam", {}),
    (View(), "over the smoothed affinity", "smoothed", {}),
    (View(layers=2), "over the smoothed affinity", "smoothed", dict(layers=2)),
    (View(layers=12), "over the smoothed affinity", "smoothed", dict(layers=6)),
    (View(layers=2, skip=3), "over the smoothed affinity", "smoothed", dict(layers=(1, 2))),
    (View(layers=12, skip=12), "over the smoothed affinity", "smoothed", dict(layers=(0,))),
    (View(boxes=False), "over the smoothed affinity", "smoothed", dict(box=None)),
    (View(), "low", "low", dict(mu=.14)),
    (View(), "high", "high", dict(mu=.14)),
    (View(mu=.3, shape="disc"), "low", "low", dict(mu=.3, shape="disc")),
    (View(mu=.3, shape="disc"), "high", "high", dict(mu=.3, shape="disc")),
    (View(affinity="both", lambda_h=1.), "over both affinities", "dual", {}),
    (View(affinity="both", lambda_l=.5, lambda_h=.5), "over both affinities", "dual", {}),   # only their ratio counts
    (View(maps="patch_text", affinity="none"), "patch and text", "patch_text", {}),
    (View(maps="transport", affinity="both"), "transport", "transport", {}),
    (View(maps="transport", affinity="both", lambda_l=.4, lambda_h=.7, epsilon=.05, layers=3), "transport", "transport",
     dict(lambda_l=.4, lambda_h=.7, epsilon=.05, layers=3)),
]


@pytest.mark.parametrize("view, title, method, changed", SAME, ids=lambda value: value if isinstance(value, str) else "")
def test_columns_are_the_maps_of_frequency_cams(view: View, title: str, method: str, changed: dict, analysis: Analysis, backbone: Backbone) -> None:
    images = backbone.preprocess([analysis.subject.image], 224)
    prompts = embed_wording(backbone, usual_wording(backbone, analysis.names))
    settings = replace(CamSettings(mu=.14, layers=6), **changed)
    expected = frequency_cams(backbone, images, prompts.text, torch.ones(1, len(analysis.names), dtype=torch.bool), prompts.background, (method,), settings)
    torch.testing.assert_close(analysis.shown(view).columns[title], expected[method][0], atol=2e-5, rtol=1e-4)


def test_registered_maps_are_choices_of_the_view(monkeypatch: pytest.MonkeyPatch, analysis: Analysis) -> None:
    monkeypatch.setattr(cams_room.METHODS, "_entries", dict(cams_room.METHODS._entries))
    assert list(room.MAPS) == ["gradcam", "patch_text", "intra_correlation", "transport", "sclip", "clearclip", "naclip", "clip_surgery", "trained"]
    with pytest.raises(InputError, match="squared"): View(maps="squared")
    cams_room.register_map("squared", "GradCAM evidence, squared", needs=("evidence",))(lambda parts: parts.evidence * parts.evidence.abs())
    assert "squared" in room.MAPS and room.MAPS["squared"] == "GradCAM evidence, squared" and len(room.MAPS) == 10
    shown = analysis.shown(View(maps="squared", affinity="none"))
    torch.testing.assert_close(shown.final, normalise_cam(analysis.parts.evidence.relu().square())[0], atol=1e-5, rtol=1e-4)
    for name in ("naclip", "clip_surgery"):
        shown = analysis.shown(View(maps=name, affinity="none"))
        torch.testing.assert_close(shown.columns[cams_room.METHODS[name].title], cams_room.cam_of(analysis.parts, name)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bands", [2, 4, 6])
@pytest.mark.parametrize("shape", ["square", "disc"])
def test_a_stack_is_cut_where_its_titles_say_and_sums_to_the_whole(bands: int, shape: str, analysis: Analysis) -> None:
    view, evidence = View(band="stack", bands=bands, shape=shape), analysis.parts.evidence[0].double().numpy()
    stack = room._bands(analysis.parts.evidence, view)
    torch.testing.assert_close(sum(stack.values()), analysis.parts.evidence, atol=1e-5, rtol=1e-5)
    rows, columns = np.meshgrid(*map(np.fft.fftfreq, analysis.grid), indexing="ij")
    distance = np.hypot(rows, columns) if shape == "disc" else np.maximum(abs(rows), abs(columns))
    edges = [0, *(.5 * k / bands for k in range(1, bands)), 1]
    spectrum = np.fft.fft2(evidence)
    for place, (title, found) in enumerate(stack.items()):
        inside = (distance <= edges[place + 1] + 1e-6) & ((distance > edges[place] + 1e-6) | (place == 0))
        expected = np.fft.ifft2(spectrum * inside).real
        np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5 * np.abs(evidence).max(), err_msg=title)
    shown = analysis.shown(view).columns
    assert list(shown) == ["GradCAM", *stack, "over the smoothed affinity"]
    assert [f"{edge:.2g}" in title for edge, title in zip(edges[1:-1], list(stack)[:-1], strict=True)] == [True] * (bands - 1)


def test_on_the_shared_scale_bands_add_up(analysis: Analysis) -> None:
    shown = analysis.shown(View(colour_scale="shared")).columns
    top = analysis.parts.evidence.relu().amax((2, 3))[0][:, None, None]
    for title, band in zip(("low", "high"), analysis.parts.bands, strict=True):
        torch.testing.assert_close(shown[title], (band[0] / top).clamp(0, 1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shown["GradCAM"], (sum(analysis.parts.bands)[0] / top).clamp(0, 1), atol=1e-5, rtol=1e-5)
    own = analysis.shown(View()).columns
    assert own["high"].amax((1, 2)).min() > .99 > shown["high"].amax((1, 2)).min()


@pytest.mark.parametrize("band", ["low", "high"])
@pytest.mark.parametrize("affinity", ["smoothed", "inverse", "none"])
def test_the_band_that_is_kept_goes_on_to_affinity_and_labels(band: str, affinity: str, analysis: Analysis) -> None:
    view = View(band=band, affinity=affinity, mu=.2, threshold=.3)
    shown = analysis.shown(view)
    going = normalise_cam(analysis.parts.bands[band == "high"])
    matrix = {"smoothed": analysis.parts.smooth, "inverse": analysis.parts.invert}.get(affinity)
    expected = going if matrix is None else normalise_cam(propagate(matrix, going, 2, box_mask(going, .4)))
    torch.testing.assert_close(shown.final, expected[0], atol=1e-5, rtol=1e-4)
    if matrix is not None: torch.testing.assert_close(shown.columns[f"over the {affinity} affinity"], normalise_cam(expected)[0], atol=1e-5, rtol=1e-4)
    large = F.interpolate(expected, analysis.subject.image.shape[:2], mode="bilinear", align_corners=False)[0].numpy()
    assert (shown.labels == np.where(large.max(0) > .3, large.argmax(0) + 1, 0)).mean() > .9999


def test_the_ends_of_the_sliders_are_fine(analysis: Analysis) -> None:
    nothing_high, nothing_low = analysis.shown(View(mu=.5)).columns, analysis.shown(View(mu=0.)).columns
    assert not nothing_high["high"].any()
    torch.testing.assert_close(nothing_high["low"], nothing_high["GradCAM"])
    assert nothing_low["low"].isfinite().all()   # the constant alone
    assert (analysis.shown(View(threshold=1.)).labels == 0).all() and (analysis.shown(View(threshold=0.)).labels > 0).any()
    weak, strong = (analysis.shown(View(affinity="both", lambda_l=a, lambda_h=b)).columns["over both affinities"] for a, b in ((0., .5), (2., 0.)))
    torch.testing.assert_close(weak, analysis.shown(View(affinity="inverse")).columns["over the inverse affinity"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(strong, analysis.shown(View()).columns["over the smoothed affinity"], atol=1e-6, rtol=1e-5)
    for epsilon in (.01, 1.): assert analysis.shown(View(maps="transport", epsilon=epsilon)).columns["transport"].isfinite().all()


@pytest.mark.parametrize("maps", ["gradcam", "transport"])
def test_affinities_without_any_weight_are_refused(maps: str, analysis: Analysis) -> None:
    with pytest.raises(InputError, match="lambda_l and lambda_h"): analysis.shown(View(maps=maps, affinity="both", lambda_l=0., lambda_h=0.))


def test_transport_over_one_affinity_is_that_over_both_with_the_other_weight_zero(analysis: Analysis) -> None:
    for alone, weights in (("smoothed", (1., 0.)), ("inverse", (0., 1.))):
        both = analysis.shown(View(maps="transport", affinity="both", lambda_l=weights[0], lambda_h=weights[1]))
        torch.testing.assert_close(analysis.shown(View(maps="transport", affinity=alone)).columns["transport"], both.columns["transport"], atol=1e-4, rtol=1e-3)
    assert "over the smoothed affinity" not in analysis.shown(View(maps="transport", affinity="smoothed")).columns


def test_what_a_view_shows_does_not_depend_on_the_views_before(analysis: Analysis) -> None:
    rng, fresh = np.random.default_rng(0), explore(scene(48), model="world")
    for _ in range(40):
        analysis.shown(View(maps=rng.choice(["gradcam", "patch_text", "transport"]), layers=int(rng.integers(1, 7)), mu=float(rng.uniform(0, .5)),
                        shape=rng.choice(["square", "disc"]), band=rng.choice(list(room.BANDS)), affinity=rng.choice(list(room.AFFINITIES)), boxes=bool(rng.integers(2))))
    for view in (View(), VARIED):
        before, after = fresh.shown(view), analysis.shown(view)
        assert before.columns.keys() == after.columns.keys() and (before.labels == after.labels).all()
        assert all(torch.equal(before.columns[title], after.columns[title]) for title in before.columns)


def test_spectra_are_shares_of_the_energy_by_radius(analysis: Analysis) -> None:
    shown = analysis.shown(View())
    evidence = analysis.parts.evidence[0].double().clamp_min(0).numpy()
    energy = np.abs(np.fft.fft2(evidence / evidence.max((1, 2), keepdims=True))) ** 2
    radius = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, analysis.grid), indexing="ij"))
    energy[:, radius == 0] = 0
    rings = np.concatenate([[0], shown.frequencies.numpy()])
    ring = np.abs(radius[..., None] - rings).argmin(-1)
    expected = np.array([energy.mean(0)[ring == k].sum() for k in range(1, len(rings))])
    np.testing.assert_allclose(shown.spectra["map"].numpy(), expected / expected.sum(), atol=1e-5)
    assert all(float(share.sum()) == pytest.approx(1, abs=1e-4) for share in shown.spectra.values())
    assert list(shown.spectra) == ["map", "after the affinity"]
    for stays in (View(affinity="none"), View(maps="transport")): assert list(analysis.shown(stays).spectra) == ["map"]   # nothing travels, nothing changes


# ---- parts that are kept, passes that are saved ---------------------------------------------------------------------

DROPPED = {"mu": (.3, {"bands"}), "shape": ("disc", {"bands"}), "layers": (2, {"relation", "smooth", "invert"}), "source": ("attention", {"relation", "smooth", "invert"}),
           "sharpness": (2., {"invert"}), "similarity": ("intra", {"similarity"}), "contrast": ("prompts", {"similarity"}),
           "walk_steps": (1, set()), "box": (None, set()), "lambda_l": (.5, set()), "lambda_h": (.5, set()), "epsilon": (.2, set())}
PARTS = ("evidence", "bands", "raw", "value_cosines", "intra_cosines", "relation", "smooth", "invert", "similarity")


@pytest.fixture(scope="module")
def parts(backbone: Backbone) -> CamParts:
    "All parts of one small scene, with features that hold two sources of affinities."
    shown = World(0, "test", size=96)[3]
    prompts = embed_wording(backbone, usual_wording(backbone, shown.classes))
    also = merge_requests(*(affinity_request(backbone.depth, source, backbone.depth) for source in ("tokens", "attention")))
    found = cam_parts(backbone, backbone.preprocess([shown.image], SMALL), prompts.text, torch.ones(1, len(shown.classes), dtype=torch.bool), prompts.background,
                      settings=CamSettings(layers=6, source="tokens"), also=also)
    for name in PARTS: getattr(found, name)
    return found


def test_every_option_and_every_part_is_named_here() -> None:
    assert set(DROPPED) == {field.name for field in fields(CamSettings)}
    assert set(PARTS) == set(cams_room.PARTS)


@pytest.mark.parametrize("option", DROPPED)
def test_other_settings_drop_the_parts_that_depend_on_them_and_keep_the_rest(option: str, parts: CamParts) -> None:
    value, dropped = DROPPED[option]
    settings = replace(parts.settings, **{option: value})
    other = parts.with_settings(settings)
    assert {name for name in PARTS if name not in vars(other)} == dropped
    assert all(vars(other)[name] is vars(parts)[name] for name in PARTS if name not in dropped)
    assert set(PARTS) <= vars(parts).keys() and parts.settings == CamSettings(layers=6, source="tokens") and other.settings == settings
    fresh = CamParts(parts.backbone, parts.features, parts.text, parts.present, parts.background, settings)
    torch.testing.assert_close({name: getattr(other, name) for name in PARTS}, {name: getattr(fresh, name) for name in PARTS}, atol=1e-6, rtol=1e-5)


def test_parts_that_were_never_made_are_not_made_for_keeping(parts: CamParts) -> None:
    bare = CamParts(parts.backbone, parts.features, parts.text, parts.present, parts.background, parts.settings)
    other = bare.with_settings(replace(parts.settings, mu=.2))
    assert not vars(bare).keys() & set(PARTS) and not vars(other).keys() & set(PARTS)


def test_the_tower_runs_once_however_many_views_there_are(encoded: list[int]) -> None:
    analysis = explore(scene(48), model="world", longest=SMALL)
    assert len(encoded) == 1
    for view in (View(), VARIED, View(layers=3), View(mu=.3, band="low"), View(maps="patch_text", affinity="inverse"), View(affinity="both", lambda_h=.7)):
        shown = analysis.shown(view)
        view_cells(analysis, shown, view); mask_cells(analysis, shown); patch_cells(analysis, (1, 2), view); spectrum_svg(shown, view.mu)
    assert len(encoded) == 1


def test_moving_the_cut_off_makes_no_affinity_and_no_evidence_again(small: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("grad_cam_evidence", "mean_relation", "symmetrise", "inverse_of", "prompt_cosines"):
        function = getattr(cams_room, name)
        monkeypatch.setattr(cams_room, name, lambda *args, name=name, function=function, **options: calls.append(name) or function(*args, **options))
    small.shown(View(affinity="both")); small.shown(View(maps="transport", affinity="both"))
    calls.clear()
    for changed in (dict(mu=.3), dict(shape="disc"), dict(lambda_h=.6), dict(boxes=False), dict(threshold=.2), dict(epsilon=.3), dict(band="stack")):
        for maps in ("gradcam", "transport"): small.shown(View(maps=maps, affinity="both", **changed))
    assert calls == []
    small.related.clear()
    small.shown(View(affinity="both", layers=2))
    assert calls == ["mean_relation", "symmetrise", "inverse_of"]
    first = small.shown(View(affinity="both", layers=3))
    small.shown(View(affinity="both", layers=2))
    again = small.shown(View(affinity="both", layers=3))
    assert len(calls) == 6 and torch.equal(first.final, again.final)   # blocks shown before cost nothing


def test_an_analysis_keeps_a_bounded_number_of_affinities(small: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    import freqseg.faces.explorer as room
    small.related.clear()
    size = small.grid[0]*small.grid[1]
    for kept in (0, 10 * 4 * size**2):
        monkeypatch.setattr(room, "KEPT", kept)
        for layers in (1, 2, 3, 4, 5, 6, 1): small.shown(View(affinity="both", layers=layers))
        held = sum(made.nbytes for parts in small.related.values() for made in parts.values())
        assert held <= kept and bool(held) == bool(kept)


# ---- masks and scores -----------------------------------------------------------------------------------------------

def numpy_iou(found: np.ndarray, truth: np.ndarray, classes: int) -> list[float]:
    "IoU of every class by counting pixels; ignored ones do not count."
    counted = truth != IGNORE
    with np.errstate(invalid="ignore"):
        return [np.float64((found == k)[counted & (truth == k)].sum()) / ((found == k) | (truth == k))[counted].sum() for k in range(classes + 1)]


def test_truth_is_told_in_the_order_of_the_names() -> None:
    mask = np.array([[0, 1, 2], [3, 9, 255]], np.uint8)
    known = subject(picture(2, 3), mask=mask, known=("a", "b", "c"))
    assert known.truth(["c", "x", "a"]).tolist() == [[0, 3, 0], [1, 0, 255]]
    assert known.truth(["b"]).tolist() == [[0, 0, 1], [0, 0, 255]]
    assert known.truth(["C", "x", "A"]).tolist() == [[0, 3, 0], [1, 0, 255]]   # as the tokenizers read it
    assert known.truth(["x"]) is None and known.truth([]) is None and subject(picture()).truth(["a"]) is None


@pytest.mark.parametrize("names", [("star", "wheel"), ("wheel", "star"), ("wheel",), ("moon", "star", "key")])
def test_scores_are_those_of_counting_pixels(names: tuple[str, ...], backbone: Backbone) -> None:
    drawn = scene(48)
    mask = drawn.mask.copy()
    mask[:20] = IGNORE
    analysis = explore(replace(drawn, mask=mask), names, backbone, SMALL)
    shown = analysis.shown(View(threshold=.3))
    truth = np.select([mask == IGNORE, *(mask == WORLD_CLASSES.index(name) + 1 for name in names)], [IGNORE, *range(1, len(names) + 1)], 0)
    assert (analysis.truth == truth).all()
    expected = numpy_iou(shown.labels, truth, len(names))
    assert list(shown.scores) == ["pseudo-label"] and list(shown.scores["pseudo-label"]) == ["background", *names, "mean"]
    np.testing.assert_allclose(list(shown.scores["pseudo-label"].values()), [*expected, np.nanmean(expected)])


def test_without_a_mask_there_are_no_scores(backbone: Backbone) -> None:
    analysis = explore(subject(picture()), ["star"], backbone, SMALL)
    shown = analysis.shown()
    assert analysis.truth is None and shown.scores == {} and [cell.title for cell in mask_cells(analysis, shown)] == ["picture", "pseudo-label"]


def test_a_scene_brings_its_names_and_its_mask(analysis: Analysis) -> None:
    drawn = World(0, "test")[48]
    assert analysis.names == tuple(drawn.classes) and (analysis.subject.image == drawn.image).all() and (analysis.subject.mask == drawn.mask).all()
    assert (scene(3, "val", 1).image == World(1, "val")[3].image).all()
    with pytest.raises(InputError, match="-1"): scene(-1)
    with pytest.raises(InputError, match="nowhere"): scene(0, "nowhere")


# ---- data sets ------------------------------------------------------------------------------------------------------

def voc_folder(root: Path) -> Path:
    "Two pictures in VOC layout with names of their own; the second has no mask."
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "classes.txt").write_text("ant\nfire bee\ncrab\n")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("one\ntwo\n")
    for seed, name in enumerate(("one", "two")): Image.fromarray(picture(seed=seed)).save(root / "JPEGImages" / f"{name}.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[5:15, 5:25], mask[20:35, 30:50], mask[:2] = 1, 3, IGNORE
    write_mask(root / "SegmentationClass" / "one.png", mask)
    return root


def test_a_picture_of_a_folder_has_its_mask_and_the_names_in_it(tmp_path: Path) -> None:
    found = dataset_picture(voc_folder(tmp_path / "zoo"), "one")
    assert (found.image == picture()).all() and found.title == "one" and found.notes == ()
    assert found.names == ("ant", "crab") and found.known == ("ant", "fire bee", "crab")
    truth = found.truth(["crab", "ant"])
    assert truth[25, 40] == 1 and truth[10, 10] == 2 and truth[0, 0] == IGNORE and truth[39, 0] == 0
    without = dataset_picture(tmp_path / "zoo", "two")
    assert without.mask is None and without.names == () and without.truth(["ant"]) is None


def test_a_data_set_without_background_is_numbered_from_one(tmp_path: Path) -> None:
    "COCO-Stuff: value 0 of a mask is its first class."
    root, name = tmp_path / "stuff", "000000000139"
    (root / "images" / "val2017").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text(name + "\n")
    Image.fromarray(picture()).save(root / "images" / "val2017" / f"{name}.jpg")
    values = np.full((40, 60), COCOSTUFF_CLASSES.index("wood"), np.uint8)   # 170, the last one
    values[:20], values[30:], values[:, :5] = 0, COCOSTUFF_CLASSES.index("grass"), IGNORE
    (root / "annotations" / "val2017").mkdir(parents=True)
    Image.fromarray(values).save(root / "annotations" / "val2017" / f"{name}_labelTrainIds.png")
    found = dataset_picture(root, name)
    assert found.names == ("person", "grass", "wood") and found.known == COCOSTUFF_CLASSES
    truth = found.truth(["grass", "wood", "person"])
    assert (truth[35, 10], truth[25, 10], truth[10, 10], truth[0, 0]) == (1, 2, 3, IGNORE)
    assert not (found.truth(["grass"]) == 1)[:30].any()


def test_large_pictures_of_a_data_set_are_made_smaller_with_their_masks(tmp_path: Path) -> None:
    root = voc_folder(tmp_path / "zoo")
    Image.fromarray(picture(1500, 2000)).save(root / "JPEGImages" / "one.png")
    mask = np.zeros((1500, 2000), np.uint8)
    mask[:750], mask[750:800] = 2, IGNORE
    write_mask(root / "SegmentationClass" / "one.png", mask)
    found = dataset_picture(root, "one")
    assert found.image.shape == (768, 1024, 3) and found.mask.shape == (768, 1024) and set(np.unique(found.mask)) == {0, 2, IGNORE}
    assert (found.mask[:380] == 2).all() and (found.mask[420:] == 0).all() and "2000 x 1500" in found.notes[0]


def test_what_is_not_in_a_data_set_is_said(tmp_path: Path) -> None:
    root = voc_folder(tmp_path / "zoo")
    with pytest.raises(InputError, match="'oen'.*'one'"): dataset_picture(root, "oen")
    with pytest.raises(InputError, match="test"): dataset_picture(root, "one", "test")
    with pytest.raises(InputError, match="nowhere"): dataset_picture(tmp_path / "nowhere", "one")
    with pytest.raises(InputError, match="voq"): dataset_picture(root, "one", dataset="voq")
    (root / "JPEGImages" / "one.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="one.png"): dataset_picture(root, "one")


# ---- pictures of all kinds ------------------------------------------------------------------------------------------

def test_twenty_megapixels_are_made_smaller_with_a_note(backbone: Backbone) -> None:
    found = uploaded(encoded_as(Image.fromarray(picture(4000, 5000)), "JPEG"), "holiday.jpg")
    assert found.image.shape == (819, LONGEST_SIDE, 3)
    assert len(found.notes) == 1 and all(word in found.notes[0] for word in ("holiday.jpg", "5000 x 4000", "1024 x 819"))
    small = np.asarray(Image.fromarray(picture(4000, 5000)).resize((1024, 819), Image.Resampling.BOX))
    assert np.abs(found.image.astype(int) - small).mean() < 3
    assert_drawable(explore(found, ["star"], backbone))


@pytest.mark.parametrize("mode, kind", [("L", "PNG"), ("L", "JPEG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("1", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("RGB", "WEBP"), ("RGB", "BMP")])
def test_every_kind_of_picture_can_be_looked_at(mode: str, kind: str, backbone: Backbone) -> None:
    content = encoded_as(Image.fromarray(picture()).convert(mode), kind)
    found = uploaded(content, f"a.{kind.lower()}")
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert found.image.dtype == np.uint8 and (found.image == expected).all() and found.title == f"a.{kind.lower()}"
    analysis = explore(found, ["star"], backbone, SMALL)
    assert analysis.grid == (8, 12) and analysis.shown().labels.shape == (40, 60)


def test_grey_of_sixteen_bits_keeps_its_shades() -> None:
    deep = (np.arange(40 * 60).reshape(40, 60) * 27).astype(np.uint16)
    found = uploaded(encoded_as(Image.fromarray(deep), "PNG"), "deep.png")
    assert np.abs(found.image[..., 0].astype(int) - deep // 256).max() <= 1


@pytest.mark.parametrize("turn", range(1, 9))
def test_uploads_are_turned_as_their_note_says(turn: int, tmp_path: Path) -> None:
    note = Image.Exif()
    note[0x0112] = turn
    content = encoded_as(Image.fromarray(picture()), "JPEG", exif=note, quality=95)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert (uploaded(content, "turned.jpg").image == expected).all()
    (tmp_path / "turned.jpg").write_bytes(content)
    assert (photograph(tmp_path / "turned.jpg").image == expected).all()


def damaged() -> dict[str, bytes]:
    "Uploads that are no pictures."
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    png, photo = encoded_as(noise, "PNG"), encoded_as(noise, "JPEG")
    return {"empty.png": b"", "text.jpg": b"no picture at all", "cut.png": png[:len(png) // 2], "cut.jpg": photo[:len(photo) // 2], "head.png": png[:8],
            "vector.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no suffix": b"\0" * 100}


@pytest.mark.parametrize("name", damaged())
def test_uploads_that_are_no_pictures_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=name) as told: uploaded(damaged()[name], name)
    assert "JPEG" in str(told.value) and "/tmp" not in str(told.value)


@pytest.mark.parametrize("name", ["../../up.png", "/etc/up.png", "a name, with 'quotes' and \"more\".png", "ohne Endung", "b\u00e4r.PNG", ".png"])
def test_the_name_of_an_upload_is_only_a_name(name: str) -> None:
    found = uploaded(encoded_as(Image.fromarray(picture()), "PNG"), name)
    assert found.title == name and (found.image == picture()).all()


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent.png does not exist"): photograph(tmp_path / "absent.png")
    with pytest.raises(InputError, match=tmp_path.name): photograph(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="a.png"): photograph(tmp_path / "a.png")


@pytest.mark.parametrize("height, width", [(40, 160), (160, 40), (1, 1), (3, 500), (500, 2), (101, 97)])
@pytest.mark.parametrize("view", [View(), VARIED], ids=["usual", "varied"])
def test_pictures_of_any_shape_can_be_looked_at(height: int, width: int, view: View, backbone: Backbone) -> None:
    analysis = explore(subject(picture(height, width)), ["star", "wheel"], backbone, SMALL)
    longest = SMALL // backbone.patch_size
    assert max(analysis.grid) == longest and analysis.grid == tuple(max(1, round(longest * side / max(height, width))) for side in (height, width))
    assert_drawable(analysis, view)


def test_one_patch_is_enough(backbone: Backbone) -> None:
    analysis = explore(subject(picture()), ["star"], backbone, backbone.patch_size)
    assert analysis.grid == (1, 1)
    for view in (View(), VARIED, View(maps="patch_text", affinity="inverse")): assert_drawable(analysis, view)


def test_fifty_classes_fit_into_one_look(backbone: Backbone) -> None:
    names = [f"{first} {second}" for first in WORLD_CLASSES[:5] for second in WORLD_CLASSES[5:15]]
    analysis = explore(scene(48), names, backbone, SMALL)
    for view in (View(), VARIED): assert_drawable(analysis, view)
    shown = analysis.shown()
    alone = view_cells(analysis, shown, View(), slice(46, 50))
    assert [row[0].name for row in alone] == names[46:] and alone == view_cells(analysis, shown, View())[46:]


# ---- names and models -----------------------------------------------------------------------------------------------

def test_names_that_cannot_be_looked_for_are_refused(backbone: Backbone) -> None:
    nothing = subject(picture())
    with pytest.raises(InputError, match="no class"): explore(nothing, None, backbone, SMALL)
    with pytest.raises(InputError, match="no class"): explore(nothing, [], backbone, SMALL)
    with pytest.raises(InputError, match="no class"): explore(nothing, ["star", "  "], backbone, SMALL)
    with pytest.raises(InputError, match="'star' is named twice"): explore(nothing, ["star", "wheel", " star"], backbone, SMALL)
    with pytest.raises(InputError, match="unicorn"): explore(nothing, ["unicorn"], backbone, SMALL)


def test_a_bare_text_is_no_list_of_names(backbone: Backbone) -> None:
    "Its letters would be looked for one by one."
    with pytest.raises(InputError, match="list"): explore(scene(48), "star", backbone, SMALL)


def test_a_model_is_opened_by_name_or_file(tmp_path: Path, backbone: Backbone) -> None:
    assert isinstance(open_model("world"), Backbone) and usual_side(open_model("world")) == 224
    for wrong in ("ViT-B-61", str(tmp_path / "absent.safetensors"), "runs/absent"):
        with pytest.raises(InputError, match=Path(wrong).name): open_model(wrong)
    with pytest.raises(InputError, match="no checkpoint"): open_model(tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="bad.safetensors"): open_model(tmp_path / "bad.safetensors")


def test_a_folder_that_is_called_like_a_model_hides_it_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "world").mkdir()   # as after `freqseg world --out world`
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_model("world"), Backbone)


@pytest.mark.parametrize("name", ["", "  "])
def test_no_model_is_asked_for_in_words(name: str) -> None:
    with pytest.raises(InputError, match="model"): open_model(name)


@pytest.mark.slow
def test_random_weights_may_be_asked_for_any_name() -> None:
    "A ViT in the shape of published ones; it is looked at with 448 pixels unless told."
    analysis = explore(subject(picture()), ["dog", "hairy grass"], "ViT-B-32 (random weights)", 64)
    assert usual_side(analysis.backbone) == 448 and analysis.model == "ViT-B-32 (random weights)" and analysis.grid == (1, 2)
    assert_drawable(analysis)


@pytest.fixture(scope="module")
def weclip(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Path:
    "The folder of a run of a weakly supervised system."
    folder = tmp_path_factory.mktemp("weclip")
    torch.manual_seed(0)
    system = system_named("weclip").build(backbone, WORLD_CLASSES, dim=16)
    with torch.no_grad():
        for parameter in system.decoder.parameters(): parameter.add_(.1 * torch.randn_like(parameter))   # so that it says more than background
    save_system(system, folder / "best.safetensors", step=5)
    return folder


@pytest.fixture(scope="module")
def zegclip(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Path:
    "The folder of a run of a zero-shot system."
    folder = tmp_path_factory.mktemp("zegclip")
    torch.manual_seed(0)
    save_system(system_named("zegclip").build(backbone, WORLD_CLASSES, decoder_layers=1, prompts=2), folder / "best.safetensors", step=5)
    return folder


def test_a_trained_system_shows_its_own_maps_and_what_it_says(weclip: Path, backbone: Backbone) -> None:
    analysis, system = explore(scene(48), ["wheel", "key", "star"], str(weclip)), load_system(weclip)
    images, present = backbone.preprocess([analysis.subject.image], 224), torch.zeros(1, 20, dtype=torch.bool)
    order = [WORLD_CLASSES.index(name) for name in analysis.names]
    present[0, order] = True
    maps, logits = system.cam(images, present)[0, order], system.predict(images)
    shown = analysis.shown(View(maps="trained"))
    torch.testing.assert_close(shown.columns["trained"], normalise_cam(maps[None])[0], atol=1e-5, rtol=1e-4)
    best = F.interpolate(logits, analysis.subject.image.shape[:2], mode="bilinear", align_corners=False)[0].argmax(0).numpy()
    expected = np.select([best == index + 1 for index in order], [1, 2, 3], 0)
    assert (shown.prediction == expected).mean() > .9999 and set(np.unique(best)) - {0}
    np.testing.assert_allclose(list(shown.scores["prediction"].values())[:-1], numpy_iou(shown.prediction, analysis.truth, 3))
    assert [cell.title.split(" (")[0] for cell in mask_cells(analysis, shown)] == ["picture", "pseudo-label", "prediction", "mask"]
    assert_drawable(analysis, View(maps="trained", affinity="both"))


def test_a_trained_system_is_asked_for_its_own_classes_only(weclip: Path, encoded: list[int]) -> None:
    with pytest.raises(InputError, match="unicorn.*trained for"): explore(scene(48), ["unicorn"], str(weclip))
    with pytest.raises(InputError, match="'grass'"): explore(scene(48), ["grass"], str(weclip / "best.safetensors"))   # CLIP knows it, the run does not
    assert not encoded


def test_a_system_by_itself_and_its_checkpoint_look_alike(weclip: Path) -> None:
    system = load_system(weclip).train()
    by_hand, by_name = explore(scene(48), ["star"], system, SMALL), explore(scene(48), ["star"], weclip / "best.safetensors", SMALL)
    one, other = (analysis.shown(View(maps="trained")) for analysis in (by_hand, by_name))
    assert torch.equal(one.columns["trained"], other.columns["trained"]) and (one.prediction == other.prediction).all()
    assert system.training and by_name.model.endswith("best.safetensors")


def test_a_zero_shot_system_answers_for_any_names(zegclip: Path, backbone: Backbone) -> None:
    names = ["wheel", "grass", "key", "star"]   # grass is none of its classes
    analysis, system = explore(scene(48), names, str(zegclip)), load_system(zegclip).with_vocabulary(names)
    logits = system.predict(backbone.preprocess([analysis.subject.image], 224))
    shown = analysis.shown(View(maps="trained", affinity="none"))
    torch.testing.assert_close(shown.columns["trained"], normalise_cam(logits.sigmoid())[0], atol=1e-5, rtol=1e-4)
    assert set(np.unique(shown.prediction)) <= {1, 2, 3, 4} and analysis.system.vocabulary == tuple(names)
    assert_drawable(analysis, View(maps="trained"))


def test_a_zero_shot_system_holds_seen_names_back_as_in_every_other_place(zegclip: Path, backbone: Backbone) -> None:
    system, images = load_system(zegclip), backbone.preprocess([scene(48).image], 224)
    answers = dict(zip(WORLD_CLASSES, system.predict(images).mean((0, 2, 3)), strict=True))
    names = [max(system.split.seen, key=answers.get), min(system.split.unseen, key=answers.get)]   # so close that the handicap decides
    logits = F.interpolate(system.with_vocabulary(names).predict(images), (224, 224), mode="bilinear", align_corners=False)[0]
    expected = (logits.sigmoid() - torch.tensor([.1, 0])[:, None, None]).argmax(0).numpy() + 1
    analysis = explore(scene(48), names, str(zegclip))
    assert analysis.subject.image.shape == (224, 224, 3) and (logits.argmax(0).numpy() + 1 != expected).any()
    assert (analysis.shown().prediction == expected).mean() > .9999


def test_a_backbone_has_no_maps_of_its_own(small: Analysis) -> None:
    with pytest.raises(InputError, match="no maps of its own: take a trained system"): small.shown(View(maps="trained"))


# ---- options --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("option, value", [
    ("maps", "gradcm"), ("maps", ""), ("maps", None), ("maps", 3), ("maps", ["gradcam"]), ("shape", "round"), ("band", "mid"), ("affinity", "both affinities"), ("colour_scale", None),
    ("cmap", "jet"), ("layers", 0), ("layers", -1), ("layers", 2.5), ("layers", True), ("layers", "3"), ("layers", None), ("mu", -.01), ("mu", .51), ("mu", float("nan")), ("mu", ".2"),
    ("mu", None), ("mu", True), ("bands", 1), ("bands", 7), ("bands", 2.5), ("lambda_l", -.1), ("lambda_l", 2.1), ("lambda_h", float("inf")), ("boxes", "no"), ("boxes", None),
    ("epsilon", 0.), ("epsilon", 1.1), ("threshold", -.1), ("threshold", 1.1), ("opacity", 2.), ("opacity", None)])
def test_values_that_cannot_be_are_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(InputError, match=option): View(**{option: value})


@pytest.mark.parametrize("option, value", [("mu", np.float32(.2)), ("layers", np.int64(3)), ("bands", np.int32(3)), ("boxes", np.True_), ("mu", 0), ("opacity", 1)])
def test_numbers_of_numpy_and_whole_numbers_are_numbers(option: str, value: object) -> None:
    assert getattr(View(**{option: value}), option) == value


def test_every_option_explains_itself_and_has_its_default_in_range() -> None:
    for option in fields(View):
        about = option.metadata
        assert about["help"] and option.default == getattr(View(), option.name)
        if "choices" in about:
            assert option.default in about["choices"]
            for choice in about["choices"]: assert getattr(View(**{option.name: choice}), option.name) == choice
        elif "low" in about:
            for end in ("low", "high"): View(**{option.name: about[end]})
            assert about["low"] <= option.default <= about["high"] and about["step"] > 0


# ---- on the screen --------------------------------------------------------------------------------------------------

def test_cells_say_what_they_show(analysis: Analysis) -> None:
    table = view_cells(analysis, analysis.shown(), View())
    assert [[cell.title for cell in row] for row in table] == [["GradCAM", "low", "high", "over the smoothed affinity"]] * 2
    assert [row[0].name for row in table] == list(analysis.names)
    assert all(cell.title in cell.alt and cell.name in cell.alt and analysis.subject.title in cell.alt for row in table for cell in row)


def test_a_cell_is_the_overlay_of_its_map_over_the_picture(analysis: Analysis) -> None:
    view = View(opacity=.7, cmap="viridis")
    shown = analysis.shown(view)
    face = np.asarray(Image.fromarray(analysis.subject.image).resize((CELL_SIDE, CELL_SIDE), Image.Resampling.LANCZOS))
    for place, row in enumerate(view_cells(analysis, shown, view)):
        for cell, maps in zip(row, shown.columns.values(), strict=True):
            assert cell.picture == jpeg(overlay(face, maps[place], .7, "viridis"))
    masks = mask_cells(analysis, shown)
    small = np.asarray(Image.fromarray(shown.labels).resize((CELL_SIDE, CELL_SIDE), Image.Resampling.NEAREST))
    assert masks[0].picture == jpeg(face) and masks[1].picture == jpeg(paint_mask(small, face))
    assert masks[1].title == f"pseudo-label (mIoU\u00a0{100 * shown.scores['pseudo-label']['mean']:.1f})" and masks[2].title == "mask"


def test_a_patch_shows_its_rows_of_both_affinities(analysis: Analysis) -> None:
    "The smoothed one with the strongest at 1, the inverse one in red and blue around its median; the patch itself sets no scale."
    (row, column), view = (5, 9), View(opacity=.8)
    analysis.shown(view)
    face = np.asarray(Image.fromarray(analysis.subject.image).resize((CELL_SIDE, CELL_SIDE), Image.Resampling.LANCZOS))
    asked = row * analysis.grid[1] + column
    smooth, inverse = (affinity[0].numpy()[asked].astype(np.float64) for affinity in (analysis.parts.smooth, analysis.parts.invert))
    for values in (smooth, inverse): values[asked] = np.sort(values)[(len(values) - 1) // 2]
    inverse -= np.sort(inverse)[(len(inverse) - 1) // 2]
    reach = np.abs(inverse).max()
    expected = (overlay(face, smooth.reshape(analysis.grid) / smooth.max(), .8), overlay(face, inverse.reshape(analysis.grid), .75, "RdBu_r", (-reach, reach), grey=1))
    for cell, picture_of_it in zip(patch_cells(analysis, (row, column), view), expected, strict=True):
        found = np.asarray(Image.open(io.BytesIO(cell.picture))).astype(int)
        assert np.abs(found - picture_of_it).mean() < 4 and "row 5, column 9" in cell.title and "row 5, column 9" in cell.alt


@pytest.mark.parametrize("patch", [(-1, 0), (0, -1), (28, 0), (0, 28)])
def test_patches_outside_the_grid_are_refused(patch: tuple[int, int], analysis: Analysis) -> None:
    with pytest.raises(InputError, match="outside the grid of 28 x 28"): patch_cells(analysis, patch, View())


def test_the_spectrum_is_drawn_with_its_cut_off(analysis: Analysis) -> None:
    shown, space = analysis.shown(), "{http://www.w3.org/2000/svg}"
    drawn = xml.fromstring(spectrum_svg(shown, .14))
    lines, texts = drawn.findall(f"{space}polyline"), [text.text for text in drawn.findall(f"{space}text")]
    assert len(lines) == 2 and "cut-off 0.14" in texts and {"map", "after the affinity"} <= set(texts)
    _, _, width, height = map(float, drawn.get("viewBox").split())
    for line, share in zip(lines, shown.spectra.values(), strict=True):
        points = np.array([point.split(",") for point in line.get("points").split()], float)
        assert len(points) == len(shown.frequencies) and (np.diff(points[:, 0]) > 0).all()
        assert (points >= 0).all() and (points <= [width, height]).all()
        order = share.clamp_min(1e-4).argsort(descending=True)
        assert (np.diff(points[order, 1]) >= -.11).all()   # more energy is drawn higher
    assert "cut-off" not in spectrum_svg(shown)


def test_overlays_blend_every_map_as_matplotlib_colours_it() -> None:
    face, maps = picture(), np.random.default_rng(0).uniform(-.2, 1.2, (3, 40, 60)).astype(np.float32)
    found = overlays(face, maps, .3, "magma", (0., .9), .6)
    assert found.shape == (3, 40, 60, 3) and found.dtype == np.uint8
    grey = (face @ np.array([.299, .587, .114]))[..., None]
    for one, result in zip(maps, found, strict=True):
        colours = matplotlib.colormaps["magma"](np.clip(one / .9, 0, 1))[..., :3] * 255
        expected = .3 * colours + .7 * (.4 * face + .6 * grey)
        assert np.abs(result - expected).max() <= 1.5
        assert (overlay(face, one, .3, "magma", (0., .9), .6) == result).all()
    assert overlays(face, torch.from_numpy(maps[:, :10, :15])).shape == (3, 40, 60, 3)


def test_pictures_beside_a_panel_stand_in_the_first_row() -> None:
    face, maps = picture(), np.random.default_rng(0).random((2, 8, 12)).astype(np.float32)
    painted = paint_mask(np.ones((40, 60), np.uint8), face)
    figure = cam_panel(face, {"a": maps}, ["x", "y"], beside={"labels": painted, "more": Image.fromarray(face)})
    assert {"picture", "a", "labels", "more"} <= {text.get_text() for text in figure.texts}
    shown = [[np.asarray(image.get_array()) for image in axis.images] for axis in figure.axes[:8]]
    assert (shown[2][0] == painted).all() and (shown[3][0] == face).all() and not shown[6] and not shown[7]
    assert (shown[1][0] == overlay(face, maps[0])).all() and (shown[5][0] == overlay(face, maps[1])).all()
    assert len(cam_panel(face, {"a": maps}).axes) == 5


# ---- saved views ----------------------------------------------------------------------------------------------------

def again(path: Path) -> dict:
    "What a saved program makes."
    made: dict = {"__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), made)   # as a reader of the file would run it
    return made


def assert_same(saved: dict[str, Path], made: dict) -> None:
    "The program made the arrays that were saved, bit for bit."
    kept, shown = np.load(saved["npz"]), made["shown"]
    assert kept["titles"].tolist() == list(shown.columns) and kept["names"].tolist() == list(made["analysis"].names)
    assert kept["maps"].dtype == np.float32 and kept["maps"].tobytes() == torch.stack(list(shown.columns.values())).numpy().tobytes()
    assert kept["labels"].tobytes() == shown.labels.tobytes()
    assert View(**json.loads(str(kept["options"]))) == made["view"]
    if shown.prediction is not None: assert kept["prediction"].tobytes() == shown.prediction.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("view", [View(), VARIED, View(maps="patch_text", boxes=False, mu=.3, shape="disc", threshold=.25)], ids=["usual", "varied", "disc"])
def test_a_saved_view_is_made_again_bit_for_bit(view: View, small: Analysis, tmp_path: Path) -> None:
    analysis = explore(scene(48), ["wheel", "star"], "world", SMALL)
    analysis.shown(VARIED)   # what was seen before has no part in it
    saved = save_view(analysis, view, tmp_path / "views")
    assert {kind: path.name for kind, path in saved.items()} == {"png": "view-001.png", "npz": "view-001.npz", "py": "view-001.py"}
    made = again(saved["py"])
    assert made["view"] == view and made["analysis"].longest == SMALL
    assert_same(saved, made)
    file = io.BytesIO()
    view_figure(made["analysis"], made["view"]).savefig(file, format="png", dpi=150)
    assert file.getvalue() == saved["png"].read_bytes()


@plain
def test_views_of_files_scenes_and_data_sets_are_made_again(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "it's.png")
    root = voc_folder(tmp_path / "zoo")
    for found, names in ((photograph(tmp_path / "it's.png"), ["star"]), (scene(3, "val", seed=2), None), (dataset_picture(root, "one"), ["star", "key"])):
        analysis = explore(found, names, "world", 64)
        saved = save_view(analysis, View(), tmp_path / "views")
        made = again(saved["py"])
        assert (made["analysis"].subject.image == found.image).all() and made["analysis"].subject.title == found.title
        assert_same(saved, made)


@plain
def test_a_view_of_an_upload_is_saved_with_its_picture(tmp_path: Path) -> None:
    found = uploaded(encoded_as(Image.fromarray(picture(1200, 1500)), "JPEG"), "holiday.jpg")
    analysis = explore(found, ["star", "wheel"], "world", SMALL)
    saved = save_view(analysis, VARIED, tmp_path / "views")
    assert saved["picture"].parent == saved["py"].parent and (np.asarray(Image.open(saved["picture"])) == found.image).all()
    assert_same(saved, again(saved["py"]))
    assert analysis.subject.code == found.code


@plain
def test_saved_programs_run_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir(); (tmp_path / "elsewhere").mkdir()
    Image.fromarray(picture()).save(tmp_path / "here" / "photo.png")
    root = voc_folder(tmp_path / "here" / "zoo")
    monkeypatch.chdir(tmp_path / "here")
    analyses = [explore(found, ["star"], "world", 64) for found in
             (uploaded(Path("photo.png").read_bytes(), "photo.png"), photograph("photo.png"), dataset_picture(root.name, "one"))]
    saved = [save_view(analysis) for analysis in analyses]
    saved = [{kind: path.absolute() for kind, path in paths.items()} for paths in saved]
    monkeypatch.chdir(tmp_path / "elsewhere")
    for paths in saved: assert_same(paths, again(paths["py"]))


@plain
def test_a_view_of_a_trained_system_is_made_again(weclip: Path, tmp_path: Path) -> None:
    analysis = explore(scene(48), ["star", "wheel"], str(weclip), SMALL)
    saved = save_view(analysis, View(maps="trained", affinity="both"), tmp_path)
    assert "prediction" in np.load(saved["npz"])
    assert_same(saved, again(saved["py"]))


def test_the_data_set_of_a_saved_view_is_opened_as_it_was(tmp_path: Path) -> None:
    root = voc_folder(tmp_path / "zoo")
    (root / "JPEGImages" / "val").mkdir()   # with classes.txt away it would look like COCO
    (root / "classes.txt").rename(root / "names.txt")
    found = dataset_picture(root, "two", dataset="voc")
    made: dict = {}
    exec(f"from freqseg.faces.explorer import dataset_picture\nfound = {found.code}", made)
    assert (made["found"].image == found.image).all() and made["found"].known == found.known


@plain
def test_every_save_has_a_number_of_its_own(small: Analysis, tmp_path: Path) -> None:
    names = [save_view(small, View(), tmp_path)["py"].stem for _ in range(3)]
    assert names == ["view-001", "view-002", "view-003"]
    for number in (999, 1000): (tmp_path / f"view-{number}.py").write_text("kept")
    assert save_view(small, View(), tmp_path)["py"].stem == "view-1001"
    assert (tmp_path / "view-1000.py").read_text() == "kept"


@plain
@pytest.mark.parametrize("name", ["view-001.png", "view-001.npz"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_lies_in_the_way_of_a_save_is_left_alone(name: str, kind: str, small: Analysis, tmp_path: Path) -> None:
    if kind == "file": (tmp_path / name).write_bytes(b"kept")
    else: (tmp_path / name).mkdir()
    saved = save_view(small, View(), tmp_path)
    assert len(saved) == 3 and name not in {path.name for path in saved.values()}
    assert (tmp_path / name).is_dir() if kind == "folder" else (tmp_path / name).read_bytes() == b"kept"


@plain
def test_a_file_in_place_of_the_folder_is_said(small: Analysis, tmp_path: Path) -> None:
    (tmp_path / "views").write_text("a file")
    for folder in (tmp_path / "views", tmp_path / "views" / "inner"):
        with pytest.raises(InputError, match="views"): save_view(small, View(), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["views"] and (tmp_path / "views").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_the_right_to_write_is_said(small: Analysis, tmp_path: Path) -> None:
    (tmp_path / "views").mkdir(mode=0o500)
    with pytest.raises(InputError, match="views"): save_view(small, View(), tmp_path / "views")
    assert not list((tmp_path / "views").iterdir())


@plain
def test_a_read_only_disk_is_said(small: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**options): raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(freqseg.files.tempfile, "mkstemp", refused)
    with pytest.raises(InputError, match="Read-only file system"): save_view(small, View(), tmp_path)
    assert not list(tmp_path.iterdir())


@plain
@pytest.mark.parametrize("stage", ["savez_compressed", "view_code"])
def test_a_disk_that_fills_up_leaves_no_half_files(stage: str, small: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args, **options): raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(np if stage == "savez_compressed" else room, stage, full)
        with pytest.raises(InputError, match="No space left"): save_view(small, View(), tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".png", ".npz"} and not any(path.name.startswith(".") for path in tmp_path.iterdir())
    for path in tmp_path.iterdir(): assert path.stat().st_size > 100   # whole, or not there
    saved = save_view(small, View(), tmp_path)
    assert all(path.is_file() for path in saved.values())


def test_the_program_names_only_what_was_changed(small: Analysis) -> None:
    assert "view = View()\n" in view_code(small) and "view = View(mu=0.3)\n" in view_code(small, View(mu=.3))
    assert View(**json.loads(json.dumps(asdict(VARIED)))) == VARIED


def test_a_figure_of_a_view_has_names_maps_and_masks(small: Analysis) -> None:
    figure = view_figure(small, View(band="stack"))
    texts = {text.get_text().replace("\n", " ") for text in figure.texts}
    assert {"wheel", "star", "GradCAM", "mask", "over the smoothed affinity"} <= texts and any(text.startswith("pseudo-label") for text in texts)
    assert png_bytes(figure).startswith(b"\x89PNG")
