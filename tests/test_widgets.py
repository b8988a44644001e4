"""The explorer's widgets without a browser: controls, errors in words, one explorer per cell, no growth, pages, saving, data sets, models."""

import functools
import gc
import html
import io
import itertools
import os
import re
import runpy
import threading
from dataclasses import asdict, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import ipywidgets as w
import numpy as np
import pytest
import torch
from ipywidgets.widgets.widget import _instances as open_widgets
from PIL import Image

import freqseg.faces.explorer
import freqseg.faces.widgets as room
from freqseg.systems.segmenter import system_named
from freqseg.work.checkpoints import save_system
from freqseg.clip import Backbone, build_closed_clip, load_clip, read_metadata, save_clip
from freqseg.lists import write_labels
from freqseg.pictures import write_mask
from freqseg.faces.explorer import AFFINITIES, Analysis, View, explore, patch_cells, spectrum_svg, view_cells
from freqseg.files import InputError, shipped
from freqseg.faces.widgets import CHOICES, FrequencyExplorer, PictureGrid, PicturePicker, bar_colours, close_tree, trained_runs, option_control
from freqseg.world.scenes import WORLD_CLASSES, World

SMALL = 96   # longest side that the tower sees in these tests: 12 x 12 patches
DEPTH = 6    # blocks of the world's CLIP
NOW = datetime(2024, 1, 1, tzinfo=timezone.utc)
REQUESTS = itertools.count()


def running(cell: str) -> SimpleNamespace:
    "A notebook's shell while a cell runs; every run is a request of its own."
    parent = {"metadata": {"cellId": cell}, "header": {"msg_id": f"request {next(REQUESTS)}"}}
    return SimpleNamespace(get_parent=lambda: parent)


@functools.cache
def the_world() -> Backbone: return load_clip("world")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    "Small analyses, small pictures, one load of the world's CLIP, and no notebook around."
    monkeypatch.setattr(freqseg.faces.explorer, "CELL_SIDE", 64)
    opened = room.open_model
    world = the_world()
    monkeypatch.setattr(room, "explore", lambda subject, names, model: explore(subject, names, model, SMALL))
    monkeypatch.setattr(room, "open_model", lambda name: world if name == "world" else opened(name))
    monkeypatch.setattr(room, "get_ipython", lambda: None)


@pytest.fixture
def explorer(tmp_path: Path) -> FrequencyExplorer:
    return FrequencyExplorer(folder=tmp_path / "views", runs=tmp_path / "runs")


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    "How often a tower ran (encode) and a view was computed (shown)."
    found = {"encode": 0, "shown": 0}

    def counted(kind: type, name: str) -> None:
        function = getattr(kind, name)

        def wrapper(*args, **options):
            found[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(kind, name, wrapper)

    counted(Backbone, "encode")
    counted(Analysis, "shown")
    return found


def drawn(explorer: FrequencyExplorer) -> tuple:
    "What is on the screen."
    return (explorer.pictures.rows, list(explorer.pictures.pictures), explorer.pictures.bar, explorer.masks.rows, list(explorer.masks.pictures), explorer.spectrum.value)


def said(explorer: FrequencyExplorer) -> str:
    "The line above the pictures."
    return html.unescape(explorer.message.value)


def is_error(explorer: FrequencyExplorer) -> bool: return "fs-error" in explorer.message.value


def tree(widget: w.Widget, found: dict[int, w.Widget] | None = None) -> dict[int, w.Widget]:
    "All widgets that a widget is made of, itself included, by identity."
    found = {} if found is None else found
    if id(widget) in found: return found
    found[id(widget)] = widget
    for name in widget.keys:
        value = getattr(widget, name)
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(part, w.Widget): tree(part, found)
    return found


def observers(widgets: dict[int, w.Widget]) -> int:
    "How many functions listen to these widgets."
    return sum(len(listeners) for widget in widgets.values() for kinds in widget._trait_notifiers.values() for listeners in kinds.values())


def file_of(height: int = 40, width: int = 60) -> bytes:
    "A PNG file of smooth colours."
    coarse, file = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8), io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def upload(explorer: FrequencyExplorer, content: bytes, name: str = "mine.png") -> None:
    "As a browser would."
    explorer.picker.file.value = ({"name": name, "type": "image/png", "size": len(content), "content": memoryview(content), "last_modified": NOW},)


# ---- controls -------------------------------------------------------------------------------------------------------

def test_at_the_start_the_scene_is_shown_as_the_explorer_without_widgets_shows_it(explorer: FrequencyExplorer) -> None:
    analysis = explore(explorer.analysis.subject, ["star", "wheel"], "world", SMALL)
    assert explorer.analysis.subject.title == "scene 48 of test" and explorer.names.value == "star, wheel" and explorer.analysis.model == "world"
    assert explorer.view == View(layers=DEPTH)
    shown = analysis.shown(explorer.view)
    table = view_cells(analysis, shown, explorer.view)
    assert list(explorer.pictures.pictures) == [cell.picture for row in table for cell in row]
    assert [[cell["title"] for cell in row] for row in explorer.pictures.rows] == [[cell.title for cell in row] for row in table]
    assert explorer.spectrum.value == spectrum_svg(shown, .14) and list(explorer.pictures.grid) == [12, 12]
    assert not is_error(explorer) and all(word in said(explorer) for word in ("scene 48 of test", "world", "12 x 12 patches", "star", "wheel", "IoU"))


EFFECT: dict[str, tuple[dict, object]] = {   # option -> other options with which it is in use, and a value that shows
    "maps": ({}, "patch_text"), "layers": ({}, 2), "skip": ({}, 4), "mu": ({}, .3), "shape": ({"mu": .3}, "disc"), "band": ({}, "low"), "bands": ({"band": "stack"}, 6), "affinity": ({}, "none"),
    "lambda_l": ({"affinity": "both", "lambda_h": 2.}, .2), "lambda_h": ({"affinity": "both"}, 2.), "boxes": ({}, False), "epsilon": ({"maps": "transport"}, .5),
    "threshold": ({}, .1), "colour_scale": ({}, "shared"), "opacity": ({}, .9), "cmap": ({}, "gray")}


def put(explorer: FrequencyExplorer, values: dict) -> None:
    for name, value in values.items(): explorer.options[name].value = value


@pytest.mark.parametrize("option", EFFECT)
def test_every_option_changes_the_view_and_what_is_drawn(option: str, explorer: FrequencyExplorer) -> None:
    others, value = EFFECT[option]
    put(explorer, others)
    before, control = drawn(explorer), explorer.options[option]
    assert not control.disabled and control.value != value
    control.value = value
    assert explorer.view == replace(View(layers=DEPTH), **others, **{option: value}) and drawn(explorer) != before and not is_error(explorer)
    analysis = explore(explorer.analysis.subject, ["star", "wheel"], "world", SMALL)
    table = view_cells(analysis, analysis.shown(explorer.view), explorer.view)
    assert list(explorer.pictures.pictures) == [cell.picture for row in table for cell in row]


def test_every_option_has_a_control() -> None:
    assert set(EFFECT) == {option.name for option in fields(View)}


@pytest.mark.parametrize("maps, affinity, band", [*((maps, affinity, "whole") for maps in ("gradcam", "patch_text", "transport") for affinity in AFFINITIES),
                                                  ("gradcam", "none", "stack"), ("gradcam", "both", "low"), ("transport", "both", "stack")])
def test_a_control_is_disabled_exactly_when_it_changes_nothing(maps: str, affinity: str, band: str, explorer: FrequencyExplorer) -> None:
    context = {"maps": maps, "affinity": affinity, "band": band, "mu": .3, "bands": 3, "lambda_h": .5}
    changes = {"layers": 1, "skip": 3, "mu": .1, "shape": "disc", "bands": 5, "lambda_l": .1, "lambda_h": 2., "boxes": False, "epsilon": .5, "threshold": .97, "opacity": .9, "cmap": "gray", "colour_scale": "shared"}
    put(explorer, context)
    before = drawn(explorer)
    for name, value in changes.items():
        control = explorer.options[name]
        old, control.value = control.value, value
        assert (drawn(explorer) == before) == control.disabled, name
        control.value = old
        assert drawn(explorer) == before, name


def test_controls_offer_what_a_view_can_be() -> None:
    for option in fields(View):
        control, about = option_control(option.name), option.metadata
        assert control.value == option.default and control.tooltip == about["help"] and control.description
        if "choices" in about:
            assert [value for _, value in control.options] == list(about["choices"])
            assert all(label == CHOICES.get(value, value) for label, value in control.options)
        elif "low" in about: assert (control.min, control.max, control.step) == (about["low"], about["high"], about["step"])
        else: assert isinstance(control, w.Checkbox)


def test_everything_that_can_be_moved_says_what_it_is(explorer: FrequencyExplorer) -> None:
    controls = [part for part in tree(explorer).values() if isinstance(part, (w.ValueWidget, w.Button)) and not isinstance(part, w.HTML)]
    assert len(controls) >= len(EFFECT) + 6
    for control in controls: assert control.description and control.tooltip, type(control).__name__


def test_no_box_has_a_tooltip_because_ipywidgets_would_not_draw_it(explorer: FrequencyExplorer) -> None:
    boxes = [part for part in tree(explorer).values() if isinstance(part, w.Box)]
    assert len(boxes) > 5 and all(box.tooltip is None for box in boxes)


def test_controls_are_answered_again_after_setting_them_failed(explorer: FrequencyExplorer) -> None:
    before = drawn(explorer)
    with pytest.raises(AttributeError): explorer._set(object())
    explorer.options["mu"].value = .3
    assert drawn(explorer) != before


def test_a_view_to_start_with_is_where_reset_leads(tmp_path: Path) -> None:
    start = View(mu=.3, maps="transport", affinity="both", cmap="viridis", layers=4)
    explorer = FrequencyExplorer(view=start)
    assert explorer.view == start
    first = drawn(explorer)
    put(explorer, {"mu": .1, "maps": "gradcam", "cmap": "gray", "layers": 2})
    explorer.reset()
    assert explorer.view == start and drawn(explorer) == first


def test_reset_leaves_picture_names_and_model_alone(explorer: FrequencyExplorer) -> None:
    explorer.picker.number.value = 3
    explorer.names.value = "key"
    first = drawn(explorer)
    explorer.pictures.patch = [3, 4]
    assert explorer.related.pictures
    put(explorer, {"mu": .3, "cmap": "gray", "opacity": .9, "layers": 2, "band": "stack"})
    explorer.reset_button.click()
    assert explorer.view == View(layers=DEPTH) and explorer.options["bands"].disabled
    assert drawn(explorer) == first and explorer.analysis.names == ("key",) and explorer.analysis.subject.title == "scene 3 of test"
    assert list(explorer.pictures.patch) == [] and list(explorer.related.pictures) == []


def test_help_tells_every_control_and_goes_away(explorer: FrequencyExplorer) -> None:
    assert explorer.help_text.value == ""
    explorer.help_button.click()
    told = html.unescape(explorer.help_text.value)
    for control in (*explorer.options.values(), explorer.names, explorer.model.choice): assert control.description in told and control.tooltip in told
    assert "arrow keys" in told
    explorer.help_button.click()
    assert explorer.help_text.value == ""


# ---- no more work than needed ---------------------------------------------------------------------------------------

def test_a_start_is_one_pass_and_one_drawing(counts: dict[str, int]) -> None:
    FrequencyExplorer()
    assert counts == {"encode": 1, "shown": 1}


def test_names_to_start_with_cost_no_second_pass(counts: dict[str, int]) -> None:
    explorer = FrequencyExplorer(3, ["key", "star"])
    assert explorer.analysis.names == ("key", "star") and explorer.names.value == "key, star" and counts["encode"] == 1


def test_options_cost_a_drawing_each_and_no_pass(explorer: FrequencyExplorer, counts: dict[str, int]) -> None:
    moves = [("mu", .2), ("mu", .3), ("layers", 3), ("maps", "transport"), ("affinity", "both"), ("epsilon", .3), ("lambda_h", .4), ("threshold", .2), ("cmap", "gray")]
    for name, value in moves: explorer.options[name].value = value
    assert counts == {"encode": 0, "shown": len(moves)}


def test_what_changes_no_view_costs_nothing(explorer: FrequencyExplorer, counts: dict[str, int]) -> None:
    for name, control in explorer.options.items(): control.value = getattr(explorer.view, name)
    explorer.names.value = explorer.names.value
    explorer.help_button.click()
    explorer.pictures.patch = [2, 2]
    explorer.pictures.patch = [2, 3]
    explorer.picker.kind.value = "file"
    assert counts == {"encode": 0, "shown": 0}


def test_another_picture_other_names_and_another_page_cost_what_they_must(explorer: FrequencyExplorer, counts: dict[str, int]) -> None:
    explorer.names.value = "star, wheel, key, moon, tree, fish"
    assert counts == {"encode": 1, "shown": 1}
    explorer.page.value = 3
    assert counts == {"encode": 1, "shown": 2}
    explorer.picker.number.value = 4
    assert counts == {"encode": 2, "shown": 3}


def test_a_reset_is_one_drawing(explorer: FrequencyExplorer, counts: dict[str, int]) -> None:
    put(explorer, {"mu": .3, "band": "stack", "maps": "transport"})
    counts.update(shown=0)
    explorer.reset()
    assert counts == {"encode": 0, "shown": 1}


def test_only_what_changed_goes_to_the_browser(explorer: FrequencyExplorer, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[set[str]] = []
    monkeypatch.setattr(PictureGrid, "send_state", lambda self, key=None: sent.append({key} if isinstance(key, str) else set(key or ())))
    explorer.options["mu"].value = .3
    assert set().union(*sent) == {"pictures"}
    sent.clear()
    explorer.options["cmap"].value = "gray"
    assert set().union(*sent) == {"pictures", "bar"}


def test_the_models_in_use_stay_open_and_no_more_than_two(explorer: FrequencyExplorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    world = the_world()
    monkeypatch.setattr(room, "open_model", lambda name: opened.append(name) or world)
    for name in ("a", "b", "a", "world", "a"): explorer.model.value = name
    assert opened == ["a", "b", "world"] and len(explorer._models) == 2   # a was in use all the time: b goes


# ---- errors in words ------------------------------------------------------------------------------------------------

def wrong_inputs() -> dict[str, tuple]:
    "What a user may get wrong: how, and a word of the answer."
    return {
        "unknown name": (lambda e, t: setattr(e.names, "value", "unicorn"), "unicorn"),
        "no name": (lambda e, t: setattr(e.names, "value", " , "), "type the classes"),
        "a name twice": (lambda e, t: setattr(e.names, "value", "star, star"), "twice"),
        "markup": (lambda e, t: setattr(e.names, "value", "<b>star</b>"), "<b>star</b>"),
        "model with a slip": (lambda e, t: setattr(e.model, "value", "ViT-B-61"), "ViT-B-61"),
        "no model": (lambda e, t: setattr(e.model, "value", ""), "model"),
        "folder that is no run": (lambda e, t: setattr(e.model, "value", str(t)), "no checkpoint"),
        "file that is no model": (lambda e, t: setattr(e.model, "value", str(t / "bad.safetensors")), "bad.safetensors"),
        "no weight": (lambda e, t: put(e, {"affinity": "both", "lambda_h": 0., "lambda_l": 0.}), "lambda_l"),
        "damaged upload": (lambda e, t: upload(e, file_of()[:99], "half.png"), "half.png"),
        "empty upload": (lambda e, t: upload(e, b"", "empty.png"), "empty.png"),
        "no data set": (lambda e, t: setattr(e.picker.root, "value", str(t / "absent")), "absent"),
        "no data set there": (lambda e, t: setattr(e.picker.root, "value", str(t)), "no dataset folder"),
        "patch outside": (lambda e, t: setattr(e.pictures, "patch", [50, 0]), "outside the grid"),
    }


@pytest.mark.parametrize("what", wrong_inputs())
def test_what_cannot_be_is_said_and_what_was_shown_stays(what: str, explorer: FrequencyExplorer, tmp_path: Path) -> None:
    act, word = wrong_inputs()[what]
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    if what == "no weight": put(explorer, {"affinity": "both", "lambda_h": 0., "lambda_l": .05})
    before, analysis = drawn(explorer), explorer.analysis
    act(explorer, tmp_path)
    assert is_error(explorer) and word in said(explorer) and 'role="alert"' in explorer.message.value
    assert "<b>" not in explorer.message.value and not explorer.pictures.busy
    if what != "no weight": assert drawn(explorer) == before
    explorer.reset(); explorer.model.value = "world"; explorer.names.value = "wheel, star"   # and all goes on
    assert not is_error(explorer) and explorer.analysis.names == ("wheel", "star") and explorer.analysis is not analysis


def test_maps_of_its_own_are_offered_where_the_model_has_some(explorer: FrequencyExplorer) -> None:
    offered = lambda: [value for _, value in explorer.options["maps"].options]
    assert "trained" not in offered()
    explorer.model.value = "weclip"
    explorer.options["maps"].value = "trained"
    assert not is_error(explorer) and explorer.pictures.rows[0][0]["title"] == "trained"
    explorer.model.value = "world"
    assert explorer.view.maps == "gradcam" and "trained" not in offered() and not is_error(explorer)


def test_a_name_may_have_capitals_and_what_has_no_score_says_why(explorer: FrequencyExplorer) -> None:
    before = said(explorer)
    explorer.names.value = "Star, wheel"
    assert re.findall(r"\d+\.\d(?=[,.])", said(explorer)) == re.findall(r"\d+\.\d(?=[,.])", before)
    explorer.names.value = "star wheel"   # a comma is missing
    assert "IoU of" not in said(explorer) and "it shows star, wheel" in said(explorer)


def test_a_photograph_before_the_world_s_tower_is_no_secret(explorer: FrequencyExplorer) -> None:
    assert "photographs" not in said(explorer)
    upload(explorer, file_of(), "mine.png")
    assert "for photographs set model to ViT-B-16" in said(explorer) and not is_error(explorer)


def test_saving_what_the_fields_no_longer_ask_for_says_so(explorer: FrequencyExplorer) -> None:
    explorer.names.value = "zebra"
    explorer.save()
    assert "Saved is what is shown: star, wheel in scene 48 of test with world" in said(explorer)
    explorer.names.value = "star, wheel"
    explorer.save()
    assert "Saved in" in said(explorer) and "what is shown" not in said(explorer)


def test_a_click_on_save_waits_for_the_model_that_is_being_opened(explorer: FrequencyExplorer, monkeypatch: pytest.MonkeyPatch) -> None:
    "A browser's messages may be answered by several threads: what was asked for first is done first."
    begun, go = threading.Event(), threading.Event()
    def slowly(name):
        begun.set()
        assert go.wait(30)
        return the_world()
    monkeypatch.setattr(room, "open_model", slowly)
    first = threading.Thread(target=lambda: setattr(explorer.model, "value", "slow"))
    first.start()
    assert begun.wait(30) and explorer.pictures.busy and "slow" in said(explorer)
    saved = []
    second = threading.Thread(target=lambda: saved.append(explorer.save()))
    second.start()
    second.join(.3)
    assert second.is_alive() and not saved
    go.set()
    first.join(60), second.join(60)
    assert "model='slow'" in saved[0]["py"].read_text() and not explorer.pictures.busy


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"), RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")])
def test_lack_of_memory_is_said(error: Exception, explorer: FrequencyExplorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args): raise error
    before = drawn(explorer)
    with monkeypatch.context() as patched:
        patched.setattr(room, "explore", fail)
        explorer.names.value = "star"
    assert is_error(explorer) and "memory" in said(explorer) and drawn(explorer) == before and not explorer.pictures.busy
    explorer.names.value = "wheel"
    assert not is_error(explorer)


def test_a_start_that_fails_can_be_mended() -> None:
    explorer = FrequencyExplorer(model="ViT-B-61")
    assert is_error(explorer) and explorer.analysis is None and explorer.save() == {}
    explorer.options["mu"].value = .3
    explorer.pictures.patch = [0, 0]
    explorer.model.value = "world"
    assert not is_error(explorer) and explorer.analysis is not None and explorer.view.mu == .3


def test_towers_deeper_than_twelve_blocks_can_be_looked_through(explorer: FrequencyExplorer, tmp_path: Path) -> None:
    about = read_metadata(shipped("world_clip.safetensors"))
    config = {**about["config"], "vision_cfg": {**about["config"]["vision_cfg"], "layers": 14}}
    save_clip(build_closed_clip(config), tmp_path / "deep.safetensors", config, about["vocabulary"])
    explorer.model.value = str(tmp_path / "deep.safetensors")
    assert explorer.analysis.depth == 14 and explorer.options["layers"].max == 14
    for layers in (14, 3, 13):
        explorer.options["layers"].value = layers
        assert explorer.view.layers == layers and not is_error(explorer)


def test_a_list_of_names_may_be_given_as_text(tmp_path: Path) -> None:
    "As it would be typed; letter by letter it would be nonsense."
    assert FrequencyExplorer(names="wheel, star").analysis.names == ("wheel", "star")


# ---- one explorer per cell ------------------------------------------------------------------------------------------

def test_a_cell_that_runs_again_closes_what_it_showed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    explorers, numbers = [], []
    for _ in range(4):
        shell = running("x")
        monkeypatch.setattr(room, "get_ipython", lambda shell=shell: shell)
        explorers.append(FrequencyExplorer())
        numbers.append(len(open_widgets))
    assert numbers[1:] == numbers[:1] * 3, "widgets of closed explorers stay open"
    assert explorers[-1].comm is not None and all(one.comm is None for one in explorers[:-1])
    for part in tree(explorers[-1]).values(): assert part.comm is not None, f"a {type(part).__name__} of the new explorer was closed with the old one"
    explorers[-1].options["mu"].value = .3
    assert not is_error(explorers[-1]) and explorers[-1].get_state()


def test_hidden_pages_are_closed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = FrequencyExplorer()
    picker = explorer.picker
    parts = [picker.number, picker.file, picker.root, picker.split, picker.class_name, picker.picture]
    close_tree(explorer)
    assert all(part.comm is None for part in [*tree(explorer).values(), *parts] if not isinstance(part, w.Layout))
    other = FrequencyExplorer()
    assert all(part.comm is not None for part in tree(other).values()) and not is_error(other)


def test_two_explorers_in_one_cell_stay_both(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = running("y")
    monkeypatch.setattr(room, "get_ipython", lambda: shell)
    pair = [FrequencyExplorer(), FrequencyExplorer(7)]
    assert all(one.comm is not None for one in pair)


@pytest.mark.parametrize("parent", [None, {}, {"metadata": {}}, {"metadata": {"cellId": None}}])
def test_outside_a_notebook_explorers_do_not_close_one_another(parent: dict | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "get_ipython", lambda: SimpleNamespace(get_parent=lambda: parent))
    first, second = FrequencyExplorer(), FrequencyExplorer()
    assert first.comm is not None and second.comm is not None
    monkeypatch.setattr(room, "get_ipython", lambda: SimpleNamespace())
    FrequencyExplorer()
    assert first.comm is not None


def test_cells_keep_an_explorer_each(monkeypatch: pytest.MonkeyPatch) -> None:
    explorers = {}
    for name in ("one", "two", "one"):
        shell = running(name)
        monkeypatch.setattr(room, "get_ipython", lambda shell=shell: shell)
        old, explorers[name] = explorers.get(name), FrequencyExplorer()
    assert old.comm is None and all(one.comm is not None for one in explorers.values())


# ---- no growth ------------------------------------------------------------------------------------------------------

def resident() -> float:
    "Memory of this process, MiB."
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


def alive() -> int:
    "Widgets, analyses and tensors in this process."
    gc.collect()
    return sum(issubclass(type(one), (w.Widget, Analysis, torch.Tensor)) for one in gc.get_objects())


def moves(explorer: FrequencyExplorer, count: int, seed: int) -> None:
    "Moves of all controls, most of them sliders, as a hand would make them; every fiftieth a patch, another picture or other names."
    rng = np.random.default_rng(seed)
    sliders = [name for name, control in explorer.options.items() if isinstance(control, (w.IntSlider, w.FloatSlider))]
    for number in range(count):
        if number % 50 == 49: explorer.picker.number.value = int(rng.integers(0, 99))
        elif number % 50 == 29: explorer.pictures.patch = [int(rng.integers(12)), int(rng.integers(12))]
        elif number % 10 == 9:
            name = rng.choice(["maps", "affinity", "band", "shape", "cmap"])
            explorer.options[name].value = rng.choice([value for _, value in explorer.options[name].options if value != "trained"])
        else:
            control = explorer.options[rng.choice(sliders)]
            control.value = type(control.value)(rng.uniform(control.min, control.max))


@pytest.mark.slow
def test_five_hundred_moves_leave_nothing_behind(explorer: FrequencyExplorer) -> None:
    moves(explorer, 100, seed=0)
    widgets, opened, listeners = tree(explorer), len(open_widgets), observers(tree(explorer))
    objects, memory = alive(), resident() if Path("/proc/self/statm").exists() else None
    moves(explorer, 500, seed=1)
    assert tree(explorer).keys() == widgets.keys() and len(open_widgets) == opened and observers(tree(explorer)) == listeners
    assert alive() <= objects + 50   # parts of one analysis
    if memory is not None: assert resident() - memory < 40


# ---- names, pages, patches ------------------------------------------------------------------------------------------

def test_fifty_classes_are_paged(explorer: FrequencyExplorer) -> None:
    assert explorer.page.layout.display == "none"
    names = [f"{first} {second}" for first in WORLD_CLASSES[:5] for second in WORLD_CLASSES[5:15]]
    explorer.names.value = ", ".join(names)
    assert explorer.page.layout.display is None and (explorer.page.min, explorer.page.max, explorer.page.value) == (1, 47, 1)
    for first in (1, 20, 47):
        explorer.page.value = first
        assert [row[0]["name"] for row in explorer.pictures.rows] == names[first - 1:first + 3]
        assert len(explorer.pictures.pictures) == sum(map(len, explorer.pictures.rows)) == 16
    explorer.page.value = 99
    assert explorer.page.value == 47
    explorer.names.value = "star"
    assert explorer.page.layout.display == "none" and explorer.page.value == 1 and [row[0]["name"] for row in explorer.pictures.rows] == ["star"]


@pytest.mark.parametrize("count, pages", [(1, 1), (4, 1), (5, 2), (8, 5)])
def test_every_class_is_on_a_page(count: int, pages: int, explorer: FrequencyExplorer) -> None:
    explorer.names.value = ",".join(WORLD_CLASSES[:count])
    assert explorer.page.max == pages and (explorer.page.layout.display is None) == (pages > 1)
    explorer.page.value = pages
    assert explorer.pictures.rows[-1][0]["name"] == WORLD_CLASSES[count - 1] and len(explorer.pictures.rows) == min(count, 4)


def test_names_may_be_typed_with_any_spaces_and_commas(explorer: FrequencyExplorer) -> None:
    explorer.names.value = " wheel ,, star,"
    assert explorer.analysis.names == ("wheel", "star")


def test_a_new_scene_brings_its_names(explorer: FrequencyExplorer) -> None:
    explorer.picker.number.value = 3
    assert explorer.names.value == ", ".join(World(0, "test")[3].classes) and explorer.analysis.subject.title == "scene 3 of test"


def test_a_clicked_patch_shows_what_it_is_related_to(explorer: FrequencyExplorer) -> None:
    assert list(explorer.related.pictures) == []
    explorer.pictures.patch = [5, 7]
    expected = [cell.picture for cell in patch_cells(explorer.analysis, (5, 7), explorer.view)]
    assert list(explorer.related.pictures) == expected
    for name, value in (("cmap", "gray"), ("opacity", .9), ("layers", 2)):
        before = list(explorer.related.pictures)
        explorer.options[name].value = value
        assert list(explorer.related.pictures) != before
        assert list(explorer.related.pictures) == [cell.picture for cell in patch_cells(explorer.analysis, (5, 7), explorer.view)]
    explorer.picker.number.value = 5
    assert list(explorer.pictures.patch) == [] and list(explorer.related.pictures) == [] and explorer.related.rows == []


def test_a_grid_has_rows_pictures_and_a_bar_of_its_colours(explorer: FrequencyExplorer) -> None:
    grid, table = PictureGrid(), view_cells(explorer.analysis, explorer.analysis.shown(), View())
    grid.draw(table, "viridis")
    assert grid.rows == [[{"title": cell.title, "name": cell.name, "alt": cell.alt, "colour": cell.colour} for cell in row] for row in table]
    assert [row[0]["colour"] for row in grid.rows] == ["#800000", "#008000"]   # VOC's first two
    assert len(grid.pictures) == 8 and all(picture[:2] == b"\xff\xd8" for picture in grid.pictures)
    assert grid.bar == bar_colours("viridis") and grid.bar[0] == "#440154" and grid.bar[-1] == "#fde725"
    grid.draw(table[:1])
    assert grid.bar == [] and len(grid.pictures) == 4


# ---- saving ---------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_view_is_saved_and_the_message_names_the_files(explorer: FrequencyExplorer, tmp_path: Path) -> None:
    explorer.options["mu"].value = .3
    explorer.save_button.click()
    assert {path.name for path in (tmp_path / "views").iterdir()} == {"view-001.png", "view-001.npz", "view-001.py"}
    assert not is_error(explorer) and "views" in said(explorer) and "view-001.py" in said(explorer)
    kept = np.load(tmp_path / "views" / "view-001.npz")
    shown = explorer.analysis.shown(explorer.view)
    assert (kept["maps"] == torch.stack(list(shown.columns.values())).numpy()).all() and kept["names"].tolist() == ["star", "wheel"]
    made = runpy.run_path(str(tmp_path / "views" / "view-001.py"))
    assert Image.open(tmp_path / "views" / "view-001-again.png").size == Image.open(tmp_path / "views" / "view-001.png").size
    assert replace(made["view"], layers=DEPTH) == explorer.view and all(torch.equal(a, b) for a, b in zip(made["shown"].columns.values(), shown.columns.values(), strict=True))
    assert explorer.save()["py"].name == "view-002.py"


def test_a_folder_that_cannot_be_written_is_said(explorer: FrequencyExplorer, tmp_path: Path) -> None:
    (tmp_path / "views").write_text("a file")
    before = drawn(explorer)
    assert explorer.save() == {} and is_error(explorer) and "views" in said(explorer) and drawn(explorer) == before


# ---- pictures of one's own, data sets -------------------------------------------------------------------------------

def test_an_upload_is_looked_at_for_the_names_that_stand_there(explorer: FrequencyExplorer) -> None:
    explorer.picker.kind.value = "file"
    assert explorer.picker.children == (explorer.picker.kind, explorer.picker.file)
    upload(explorer, file_of())
    assert explorer.analysis.subject.title == "mine.png" and explorer.analysis.names == ("star", "wheel") and list(explorer.pictures.grid) == [8, 12]
    assert [cell["title"] for cell in explorer.masks.rows[0]] == ["picture", "pseudo-label"] and "IoU" not in said(explorer)
    upload(explorer, file_of(1000, 2100), "large.png")
    assert "2100 x 1000" in said(explorer) and explorer.analysis.subject.title == "large.png"


def test_going_back_to_an_upload_shows_it_again(explorer: FrequencyExplorer) -> None:
    explorer.picker.kind.value = "file"
    upload(explorer, file_of())
    explorer.picker.kind.value = "scene"
    assert explorer.analysis.subject.title == "scene 48 of test"
    explorer.picker.kind.value = "file"
    assert explorer.analysis.subject.title == "mine.png"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    "Scenes as a folder in VOC layout with three good lists and two that cannot be used."
    root = tmp_path / "scenes"
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    (root / "classes.txt").write_text("\n".join(WORLD_CLASSES) + "\n")
    names, present = [], np.zeros((3, 20), bool)
    for row, number in enumerate((48, 3, 4)):
        scene = World(0, "test")[number]
        names.append(f"s{number}")
        present[row, [WORLD_CLASSES.index(name) for name in scene.classes]] = True
        Image.fromarray(scene.image).save(root / "JPEGImages" / f"s{number}.png")
        write_mask(root / "SegmentationClass" / f"s{number}.png", np.where(scene.mask > 20, 0, scene.mask))
    write_labels(root / "labels.txt", names, present, WORLD_CLASSES)
    for split, ids in {"train": names[1:], "val": names, "one": names[:1], "empty": [], "broken": ["absent"]}.items():
        (lists / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return root


def test_a_data_set_is_opened_at_its_first_picture_with_one_pass(dataset: Path, explorer: FrequencyExplorer, counts: dict[str, int]) -> None:
    picker = explorer.picker
    picker.kind.value = "dataset"
    assert picker.children == (picker.kind, picker.root, picker.split, picker.class_name, picker.picture) and counts["encode"] == 0
    picker.root.value = str(dataset)
    assert list(picker.split.options) == ["broken", "empty", "one", "train", "val"] and picker.split.value == "val" and picker.picture.value == "s48"
    assert picker.class_name.value == "any class" and list(picker.picture.options) == ["s48", "s3", "s4"]
    assert set(picker.class_name.options) - {"any class"} == {name for number in (48, 3, 4) for name in World(0, "test")[number].classes}
    assert explorer.analysis.subject.title == "s48" and explorer.analysis.names == ("star", "wheel") and "IoU" in said(explorer) and not is_error(explorer)
    assert counts["encode"] == 1


def test_pictures_are_browsed_by_class(dataset: Path, explorer: FrequencyExplorer, counts: dict[str, int]) -> None:
    picker = explorer.picker
    picker.kind.value, picker.root.value = "dataset", str(dataset)
    counts.update(encode=0)
    picker.class_name.value = "star"
    assert list(picker.picture.options) == ["s48", "s4"] and picker.picture.value == "s48"
    picker.picture.value = "s4"
    assert explorer.analysis.subject.title == "s4" and counts["encode"] <= 2
    picker.class_name.value = "key"
    assert list(picker.picture.options) == ["s3"] and explorer.analysis.subject.title == "s3"
    picker.split.value = "train"
    assert list(picker.picture.options) == ["s3", "s4"] and picker.class_name.value == "any class" and explorer.analysis.subject.title == "s3"
    picker.class_name.value = "any class"
    picker.kind.value = "scene"
    assert explorer.analysis.subject.title == "scene 48 of test"
    picker.kind.value = "dataset"
    assert explorer.analysis.subject.title.startswith("s") and not is_error(explorer)


@pytest.mark.parametrize("split", ["empty", "broken"])
def test_a_list_that_cannot_be_used_is_said_and_the_others_go_on(split: str, dataset: Path, explorer: FrequencyExplorer) -> None:
    picker = explorer.picker
    picker.kind.value, picker.root.value = "dataset", str(dataset)
    before = drawn(explorer)
    picker.split.value = split
    assert is_error(explorer) and drawn(explorer) == before
    if "star" in picker.class_name.options: picker.class_name.value = "star"   # of the list before
    picker.split.value = "one"
    assert not is_error(explorer) and explorer.analysis.subject.title == "s48" and list(picker.picture.options) == ["s48"]


def test_a_folder_to_start_with_waits_until_it_is_asked_for(dataset: Path, counts: dict[str, int]) -> None:
    explorer = FrequencyExplorer(root=str(dataset))
    assert explorer.analysis.subject.title == "scene 48 of test" and counts["encode"] == 1
    explorer.picker.kind.value = "dataset"
    assert explorer.analysis.subject.title == "s48" and counts["encode"] == 2


def test_a_folder_without_image_labels_is_browsed_as_a_whole(dataset: Path, explorer: FrequencyExplorer) -> None:
    (dataset / "labels.txt").unlink()
    explorer.picker.kind.value, explorer.picker.root.value = "dataset", str(dataset)
    assert list(explorer.picker.class_name.options) == ["any class"] and explorer.analysis.names == ("star", "wheel")


def test_a_picker_tells_failures_and_hands_on_subjects() -> None:
    picked, failed = [], []
    picker = PicturePicker(picked.append, failed.append)
    picker.number.value = 7
    assert [one.title for one in picked] == ["scene 7 of test"] and not failed
    picker.number.value = -5
    assert picker.number.value == 0 and picked[-1].title == "scene 0 of test"
    picker.file.value = ({"name": "x.png", "type": "", "size": 1, "content": memoryview(b"x"), "last_modified": NOW},)
    assert len(failed) == 1 and "x.png" in failed[0]

    def refuses(subject): raise InputError("not this one")
    refusing = PicturePicker(refuses, failed.append)
    refusing.number.value = 1
    assert failed[-1] == "not this one"


# ---- models ---------------------------------------------------------------------------------------------------------

def test_runs_are_found_and_can_be_opened(tmp_path: Path) -> None:
    assert trained_runs(tmp_path / "absent") == [] and trained_runs(tmp_path) == []
    torch.manual_seed(0)
    weak, world = tmp_path / "runs" / "sweep" / "weclip", the_world()
    save_system(system_named("weclip").build(world, WORLD_CLASSES, dim=16), weak / "best.safetensors", step=1)
    zero = tmp_path / "runs" / "zegclip"
    save_system(system_named("zegclip").build(world, WORLD_CLASSES, decoder_layers=1, prompts=2), zero / "best.safetensors", step=1)
    assert trained_runs(tmp_path / "runs") == sorted([str(weak), str(zero)])
    explorer = FrequencyExplorer(runs=tmp_path / "runs")
    assert {"world", "ViT-B-16", str(weak), str(zero)} <= {value for _, value in explorer.model.choice.options}
    for run in (weak, zero):
        explorer.model.value = str(run)
        explorer.options["maps"].value = "trained"
        assert not is_error(explorer) and explorer.analysis.model == str(run) and explorer.pictures.rows[0][0]["title"] == "trained"
        assert [cell["title"].split(" (")[0] for cell in explorer.masks.rows[0]] == ["picture", "pseudo-label", "prediction", "mask"]
    explorer.names.value = "grass"   # a zero-shot system hears of it, the other was not trained for it
    assert not is_error(explorer)
    explorer.model.value = str(weak)
    assert is_error(explorer) and "grass" in said(explorer)


def test_runs_that_have_not_got_a_best_checkpoint_yet_are_found_too(tmp_path: Path) -> None:
    "A run that is going on, or was never validated, opens with its last."
    torch.manual_seed(0)
    save_system(system_named("weclip").build(the_world(), WORLD_CLASSES, dim=16), tmp_path / "run" / "last.safetensors", step=1)
    assert trained_runs(tmp_path) == [str(tmp_path / "run")]


def test_the_model_of_a_saved_view_is_the_one_that_was_named(explorer: FrequencyExplorer, tmp_path: Path) -> None:
    save_system(system_named("weclip").build(the_world(), WORLD_CLASSES, dim=16), tmp_path / "run" / "best.safetensors", step=1)
    explorer.model.value = f"  {tmp_path / 'run'} "
    program = explorer.save()["py"].read_text()
    assert f"model={str(tmp_path / 'run')!r}" in program
    assert asdict(explorer.view) == asdict(View(layers=DEPTH))
