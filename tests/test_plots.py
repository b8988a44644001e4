"""freqseg.faces.plots: what is drawn, that no word is cut off, and that drawing touches nothing global."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

import freqseg.faces.plots
from freqseg.pictures import palette
from freqseg.files import InputError
from freqseg.metrics import Interval
from freqseg.faces.plots import (
    affinity_row,
    as_picture,
    band_panel,
    bar_chart,
    cam_panel,
    curve,
    gallery,
    mask_panel,
    overlay,
    paint_mask,
    png_bytes,
    radial_spectrum,
    save_figure,
    thumbnail,
)

NAMES = ["person", "diningtable", "traffic light", "a name of many words that has to be wrapped"]
VIEWS = ["CAM", "smoothed attention of the last four blocks", "W_inv", "inverse attention after Sinkhorn", "plan", "PAR"]


def photo(height=60, width=80, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def maps(classes=1, height=5, width=7, seed=0):
    return np.random.default_rng(seed).random((classes, height, width), np.float32)


def words(figure):
    "Every drawn text with its box in pixels."
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text().strip()]
    # An axis that is switched off, and a tick outside the view, keep their labels; they are not drawn.
    hidden = {id(t) for axis in figure.axes if not axis.axison for t in axis.findobj(matplotlib.text.Text)}
    for axis in (side for axes in figure.axes for side in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        outside = [t for t in (*axis.get_major_ticks(), *axis.get_minor_ticks()) if not low <= t.get_loc() <= high]
        hidden |= {id(label) for tick in outside for label in (tick.label1, tick.label2)}
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts if id(text) not in hidden]


def assert_readable(figure):
    "No word leaves the figure; words of tables do not meet."
    width, height = figure.bbox.width, figure.bbox.height
    boxes = words(figure)
    assert boxes
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, f"{text!r} is cut off"
    own = [(t.get_text(), t.get_window_extent()) for t in figure.texts if t.get_text().strip()]
    for i, (text, box) in enumerate(own):
        for other, second in own[i + 1:]: assert not box.padded(-1).overlaps(second.padded(-1)), f"{text!r} meets {other!r}"


# overlay and pictures


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_overlay_has_the_size_of_the_picture_whatever_the_map(height, width, rows, columns):
    result = overlay(photo(height, width), maps(1, rows, columns)[0])
    assert result.shape == (height, width, 3) and result.dtype == np.uint8


def test_overlay_without_weight_is_the_picture_and_with_full_weight_the_colour_map():
    picture = photo()
    assert (overlay(picture, maps()[0], alpha=0, grey=0) == picture).all()
    flat = overlay(picture, np.full((3, 4), 0.25), alpha=1, cmap="viridis")
    assert (flat == matplotlib.colormaps["viridis"](0.25, bytes=True)[:3]).all()


def test_overlay_clips_to_its_limits():
    picture = photo()
    for low, high in ((-3.0, 0.0), (5.0, 1.0)):
        assert (overlay(picture, np.full((2, 2), low)) == overlay(picture, np.full((2, 2), high))).all()


@pytest.mark.parametrize("size", [(4, 6), (64, 3), (65, 70), (120, 90)])
def test_overlay_interpolates_like_torch(size):
    cam = torch.rand(*size)
    smooth = torch.nn.functional.interpolate(cam[None, None], (60, 80), mode="bilinear", align_corners=False)[0, 0]
    assert (overlay(photo(), cam) == overlay(photo(), smooth)).mean() > .999   # a value may round to the neighbouring colour


def test_overlay_takes_a_mirrored_view_of_a_map():
    cam = np.random.default_rng(0).random((4, 6), np.float32)
    assert (overlay(photo(), cam[:, ::-1]) == overlay(photo(), cam[:, ::-1].copy())).all()


def test_pictures_may_be_pil_grey_or_transparent():
    picture = photo()
    assert (as_picture(Image.fromarray(picture)) == picture).all()
    assert (as_picture(picture[..., 0]) == picture[..., :1]).all()
    assert (as_picture(np.dstack([picture, picture[..., 0]])) == picture).all()


@pytest.mark.parametrize("image, reason", [(photo() / 255, "float64"), (photo()[..., :2], r"\(60, 80, 2\)")])
def test_other_pictures_are_refused(image, reason):
    with pytest.raises(InputError, match=reason): overlay(image, maps()[0])


def test_maps_with_nan_are_refused():
    with pytest.raises(InputError, match="NaN"): overlay(photo(), np.full((2, 2), np.nan))
    with pytest.raises(InputError, match="'CAM' holds NaN or infinity in 1 "):
        cam_panel(photo(), {"CAM": np.array([[0.0, np.inf]])})


# tables


@pytest.mark.parametrize("rows, columns, size", [
    (1, 1, (60, 80)), (1, 1, (100, 50)), (2, 3, (60, 80)), (4, 6, (60, 80)), (3, 6, (30, 100)), (4, 2, (30, 100)), (4, 1, (100, 50))])
def test_cam_panels_of_every_size_are_readable(rows, columns, size):
    panels = {view: maps(rows) for view in VIEWS[:columns]}
    figure = cam_panel(photo(*size), panels, NAMES[-rows:], heading="A heading that may be longer than a single column is wide")
    assert_readable(figure)
    assert figure.get_figwidth() < 13.5 and figure.get_figheight() < 12


def test_cells_have_the_aspect_of_the_picture_and_stand_in_line():
    figure = cam_panel(photo(50, 100), {"a": maps(2), "b": maps(2)}, ["x", "y"])
    boxes = np.array([axis.get_position().bounds for axis in figure.axes[:6]]) * np.tile(figure.get_size_inches(), 2)
    assert np.allclose(boxes[:, 3] / boxes[:, 2], 0.5)
    assert np.ptp(boxes[:3, 1]) < 1e-9 and np.ptp(boxes[[0, 3], 0]) < 1e-9


def test_cam_panel_shows_the_overlay_of_every_class_and_view():
    picture, first, second = photo(), maps(2, seed=1), maps(2, seed=2)
    figure = cam_panel(picture, {"a": first, "b": torch.from_numpy(second)}, ["x", "y"])
    shown = [axis.images[0].get_array() for axis in figure.axes[:6]]
    expected = [picture, overlay(picture, first[0]), overlay(picture, second[0]),
                picture, overlay(picture, first[1]), overlay(picture, second[1])]
    assert all((s == e).all() for s, e in zip(shown, expected, strict=True))
    assert {"a", "b", "x", "y", "picture", "activation"} <= {text.get_text() for text in figure.texts}


def test_the_picture_can_be_left_out_of_a_panel():
    figure = cam_panel(photo(), {"a": maps()}, picture_title=None)
    assert len(figure.axes) == 1 + 1 and "picture" not in {text.get_text() for text in figure.texts}


@pytest.mark.parametrize("panels, names, reason", [
    ({}, None, "no panels"),
    ({"a": maps(2), "b": maps(3)}, None, "different numbers"),
    ({"a": maps(2)}, ["one"], "1 class names for 2"),
    ({"a": np.stack([maps(2)] * 2)}, None, "shape"),
])
def test_panels_that_do_not_match_are_refused(panels, names, reason):
    with pytest.raises(InputError, match=reason): cam_panel(photo(), panels, names)


def test_bands_have_zero_in_the_middle_and_share_a_scale_unless_told():
    low, high = np.array([[4.0, -1.0]]), np.array([[0.1, -0.2]])
    middle = np.array(matplotlib.colormaps["RdBu_r"](0.5))
    shared, own = (band_panel(None, {"low": low, "high": high}, shared=choice) for choice in (True, False))
    assert shared.axes[2].get_ylim() == (-4, 4) and own.axes[2].get_ylim() == (-1, 1)
    assert np.abs(np.asarray(shared.axes[1].images[0].get_array()) - middle).max() < 0.15  # faint beside the low band
    assert np.abs(np.asarray(own.axes[1].images[0].get_array()) - middle).max() > 0.4
    assert "high (max 0.2)" in {text.get_text() for text in own.texts}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_band_panels_are_readable(rows, shared):
    assert_readable(band_panel(photo(), {view: maps(rows) - 0.5 for view in VIEWS[:4]}, NAMES[:rows], shared, heading="bands"))


def test_constant_zero_bands_can_be_drawn():
    assert_readable(band_panel(photo(), {"high": np.zeros((4, 4))}, shared=False))


def test_gallery_keeps_aspects_and_leaves_gaps():
    figure = gallery([{"a": photo(), "b": photo(80, 60)}, {"b": photo()}], ["first", "second row"])
    assert_readable(figure)
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 0, 1]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    portrait = figure.axes[1].get_window_extent()
    assert portrait.height / portrait.width == pytest.approx(80 / 60, rel=0.02)


def test_galleries_without_pictures_or_names_that_do_not_match_are_refused():
    with pytest.raises(InputError, match="no pictures"): gallery([])
    with pytest.raises(InputError, match="2 row names for 1"): gallery([{"a": photo()}], ["x", "y"])


# masks


def test_painted_masks_have_the_palette_and_white_contours():
    mask = np.zeros((6, 8), int)
    mask[:, 4:] = 15
    painted = paint_mask(mask)
    assert (painted[:, :3] == palette()[0]).all() and (painted[:, 4:] == palette()[15]).all()
    assert (painted[:, 3] == 255).all()


def test_ignored_pixels_are_painted_and_get_no_contour():
    mask = np.array([[1, 1, 255, 255, 2, 2]] * 3)
    assert (paint_mask(mask) == palette()[mask]).all()


def test_background_is_dimmed_more_lightly_than_classes_are_painted():
    picture = np.full((3, 9, 3), 200, np.uint8)
    mask = np.zeros((3, 9), np.uint8)
    mask[:, 5:] = 1
    painted = paint_mask(torch.from_numpy(mask), picture, alpha=0.7)
    assert (painted[0, 0] == 160).all()
    assert (painted[0, 8] == [round(0.7 * 128 + 60), 60, 60]).all()
    assert (paint_mask(mask, picture, alpha=0.7, background=None)[0, 0] == 60).all()


@pytest.mark.parametrize("image", [None, photo()])
def test_legend_names_the_classes_that_occur(image):
    mask = np.zeros((60, 80), np.uint8)
    mask[10:20], mask[30:40], mask[50:] = 2, 255, 9
    figure = mask_panel(image, {"truth": mask, "guess": np.where(mask == 9, 0, mask)}, ["background", "cat", "dog"])
    assert_readable(figure)
    named = {text.get_text() for text in figure.texts} - {"truth", "guess", "picture"}
    assert named == {"dog", "class 9", "ignored"} | ({"background"} if image is None else set())
    swatches = {patch.get_facecolor()[:3] for patch in figure.findobj(matplotlib.patches.Rectangle)}
    assert tuple(palette()[2] / 255) in swatches


def test_long_legends_are_readable():
    mask = np.arange(60 * 80).reshape(60, 80) % 90
    assert_readable(mask_panel(photo(), {"stuff": mask}, [f"class with number {i}" for i in range(90)], background=None))
    assert_readable(mask_panel(None, {"tiny": np.array([[1, 255], [0, 3]])}))


@pytest.mark.parametrize("mask, reason", [
    (np.zeros((5, 5), int), "differ in size"),
    (np.zeros((60, 80)), "float64"),
    (np.full((60, 80), 300), "300"),
    (np.zeros((1, 60, 80), int), r"\(1, 60, 80\)"),
])
def test_unusable_masks_are_refused(mask, reason):
    with pytest.raises(InputError, match=reason): mask_panel(photo(), {"truth": mask})
    with pytest.raises(InputError, match="no masks"): mask_panel(photo(), {})


# affinity


def test_affinity_row_shows_the_row_of_the_patch_and_marks_it():
    picture, affinity = photo(60, 80), torch.rand(12, 12)
    figure = affinity_row(picture, affinity, patch=(1, 2), grid=(3, 4))
    assert_readable(figure)
    others = np.delete(affinity[6].numpy(), 6)
    expected = overlay(picture, affinity[6].view(3, 4), 0.6, "inferno", (0, float(others.max())), grey=1)
    assert (figure.axes[1].images[0].get_array() == expected).all()
    for axis in figure.axes[:2]:
        marks = {(patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axis.patches}
        assert marks == {((39.5, 19.5), 20, 20)}


def test_signed_rows_are_drawn_around_zero_and_the_patch_itself_does_not_set_the_scale():
    weight = torch.rand(16, 16).softmax(-1)
    figure = affinity_row(photo(), {"W": weight, "I - W": torch.eye(16) - weight}, (0, 0))
    first, second = (axis.get_xlim() for axis in figure.axes[3:])
    peak = weight[0, 1:].max().item()
    assert first == pytest.approx((0, peak)) and second == pytest.approx((-peak, peak))


def test_many_affinities_are_readable():
    assert_readable(affinity_row(photo(100, 50), {view: torch.rand(16, 16) - 0.2 for view in VIEWS}, (3, 3), heading="corner"))


@pytest.mark.parametrize("affinity, options, reason", [
    (torch.rand(12, 12), dict(patch=(0, 0)), "grid"),
    (torch.rand(16, 9), dict(patch=(0, 0)), r"\(N, N\)"),
    (torch.rand(16, 16), dict(patch=(4, 0)), "outside"),
])
def test_unusable_affinities_are_refused(affinity, options, reason):
    with pytest.raises(InputError, match=reason): affinity_row(photo(), affinity, **options)


# charts


def test_spectrum_draws_the_cutoff_and_leaves_out_zero_power():
    frequency = torch.linspace(0, 0.7, 8)
    figure = radial_spectrum(frequency, {"block 0": torch.tensor([0.0, *np.geomspace(1, 1e-3, 7)])}, cutoff=0.25)
    assert_readable(figure)
    line, cutoff = figure.axes[0].lines
    assert np.isnan(line.get_ydata()[0]) and line.get_ydata()[1] == 1
    assert list(cutoff.get_xdata()) == [0.25, 0.25]
    assert figure.axes[0].get_yscale() == "log"


@pytest.mark.parametrize("blocks", [1, 7, 24])
def test_spectra_of_many_blocks_are_readable_and_told_apart(blocks):
    figure = radial_spectrum(np.arange(5), {f"block {b}": np.arange(1, 6) + b for b in range(blocks)}, cutoff=3.9,
                             title="A title that is far too long for one line above such a small chart, so it is wrapped")
    assert_readable(figure)
    colours = {to_rgb(line.get_color()) for line in figure.axes[0].lines[:blocks]}
    assert len(colours) == blocks


def test_curves_draw_intervals_and_mark_the_best():
    x, values = np.arange(1, 6), np.array([0.1, 0.5, 0.4, 0.3, 0.2])
    figure = curve(x, {"a": Interval(values, values - 0.1, values + 0.1), "b": values[::-1]}, "px", mark_best=True)
    assert_readable(figure)
    axis = figure.axes[0]
    assert len(axis.collections) == 1
    assert [text.get_text() for text in axis.texts] == ["0.5 at 2", "0.5 at 4"]


def test_lines_of_another_length_are_refused():
    with pytest.raises(InputError, match="'a'"): curve([1, 2, 3], {"a": [1, 2]}, "px")
    with pytest.raises(InputError, match="'b'"): radial_spectrum(np.arange(3), {"b": np.arange(4)})


def test_bars_begin_at_zero_and_are_as_long_as_their_figures():
    table = {"one": {"seed": Interval(0.5, 0.4, 0.7), "mask": 0.6}, "two": {"mask": 0.8}}
    figure = bar_chart(table)
    assert_readable(figure)
    axis = figure.axes[0]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([50, 60, 80])
    assert axis.get_xlim()[0] == 0 and axis.get_xlim()[1] > 80
    assert [text.get_text() for text in axis.texts] == ["50.0", "60.0", "80.0"]
    centres = [bar.get_y() + bar.get_height() / 2 for bar in axis.patches]
    assert round(centres[1]) == 0 and round(centres[2]) == 1


def test_bar_labels_do_not_depend_on_the_number_of_systems():
    assert_readable(bar_chart({"only": {"AUC": 0.734}}, "AUC", percent=False))
    assert_readable(bar_chart({f"a rather long name of a system, number {i}": dict.fromkeys("abcd", 0.5) for i in range(4)}))
    with pytest.raises(InputError, match="no figures"): bar_chart({})


# files, bytes, threads


def test_saving_writes_the_whole_figure_or_nothing(tmp_path, monkeypatch):
    figure = curve([0, 1], {"a": [0, 1]}, "x")
    path = save_figure(figure, tmp_path / "new" / "a.png")
    assert Image.open(path).size == tuple((figure.get_size_inches() * 100).round().astype(int))
    before = path.read_bytes()

    def fail(file, **options):
        Path(file).write_bytes(b"half")
        raise RuntimeError("disk pulled out")
    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(RuntimeError): save_figure(figure, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_suffix_chooses_the_format(tmp_path, suffix, start):
    path = save_figure(gallery([{"a": photo()}]), tmp_path / f"figure.{suffix}")
    assert path.read_bytes().startswith(start)


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(InputError, match="figure.bmp"): save_figure(gallery([{"a": photo()}]), tmp_path / "figure.bmp")
    assert not list(tmp_path.iterdir())


def test_a_figure_shows_itself_and_its_thumbnail_is_small():
    figure = cam_panel(photo(), {"a": maps()})
    assert figure._repr_png_() == png_bytes(figure)
    assert Image.open(io.BytesIO(png_bytes(figure))).size == tuple(int(v) for v in figure.bbox.size)
    lines = curve(range(20), {"a": range(20)}, "x")
    assert len(thumbnail(figure).data) < len(png_bytes(figure))
    assert len(thumbnail(lines, photo=False).data) < 12_000
    assert thumbnail(lines, photo=False).format == "png"


def test_threads_draw_what_one_alone_draws():
    def draw(seed):
        return png_bytes(cam_panel(photo(), {"a": maps(2, seed=seed), "b": maps(2)}, ["x", "y"]), dpi=50)
    alone = [draw(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool: assert list(pool.map(draw, range(4))) == alone


def test_drawing_changes_no_global_settings():
    before = dict(matplotlib.rcParams)
    png_bytes(bar_chart({"a": {"b": 0.5}}))
    png_bytes(mask_panel(photo(), {"m": np.zeros((60, 80), int)}))
    assert dict(matplotlib.rcParams) == before


def test_drawing_does_not_need_pyplot(monkeypatch):
    "With pyplot made impossible to import, everything is drawn all the same."
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert "pyplot" not in vars(freqseg.faces.plots)
    for figure in (cam_panel(photo(), {"a": maps()}), curve([0, 1], {"a": [0, 1]}, "x"), gallery([{"a": photo()}])):
        assert png_bytes(figure).startswith(b"\x89PNG")
