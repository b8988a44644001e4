"""The explorer's other views: two models side by side, a training step by step, sub-bands, filters of prompts; with and without widgets."""

import html
import io
import json
from pathlib import Path

import numpy as np
import pytest
import pywt
import torch
from PIL import Image

from freqseg.work.checkpoints import SHIPPED, load_system
from freqseg.faces.explorer import (View, compare_cells, explore, history_svg, learned_taps, open_history, prompt_cells, prompt_tower, scene,
                              snapshot_cells, wavelet_cells)
from freqseg.faces.plots import svg_chart
from freqseg.files import InputError
from freqseg.spectral_prompts import filter_magnitude
from freqseg.faces.widgets import CompareExplorer, PromptExplorer, RunExplorer, WaveletExplorer
from freqseg.world.scenes import WORLD_CLASSES

OWN = View(maps="trained", affinity="none")


def told(explorer: object) -> str:
    "The line above the pictures."
    return html.unescape(explorer.message.value.split(">", 1)[1].rsplit("<", 1)[0])


def grey(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("L"), np.float32)


def middles(shown: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    "What a picture shows in the middle of every cell of a grid."
    rows, columns = (((np.arange(count) + .5) * side / count).astype(int) for count, side in zip(grid, shown.shape))
    return shown[np.ix_(rows, columns)]


@pytest.fixture(scope="module")
def picture() -> object:
    return scene(48)


# ---- systems that ship ----------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_system_is_trained_for_the_worlds_classes_and_finds_what_scenes_show(name: str) -> None:
    system = load_system(name)
    assert system.name == name and set(system.classes) == set(WORLD_CLASSES)
    untrained = type(system).build(system.backbone, system.classes, **{} if name in ("zegclip", "sptseg") else {"dim": 64}).eval()

    def found(model: object) -> float:
        "Mean of the mIoU over scenes, with all names to choose from."
        return sum(explore(scene(number), WORLD_CLASSES, model).shown(OWN).scores["prediction"]["mean"] for number in (11, 48)) / 2

    assert found(system) > 2 * found(untrained)


# ---- side by side ---------------------------------------------------------------------------------------------------

def test_the_difference_of_a_map_with_itself_is_nothing_and_signs_are_right(picture: object) -> None:
    left, right = explore(picture, model="weclip"), explore(picture, model="dfa")
    (same, *_), _ = compare_cells(left, left, (OWN, OWN))
    colours = np.asarray(Image.open(io.BytesIO(same[2].picture)).convert("RGB"), int)
    assert np.abs(colours[..., 0] - colours[..., 2]).max() < 12   # neither red nor blue, but for what JPEG makes of it
    (row, *_), masks = compare_cells(left, right, (OWN, OWN))
    colours = np.asarray(Image.open(io.BytesIO(row[2].picture)).convert("RGB").resize((28, 28)), int)
    higher = (left.shown(OWN).final - right.shown(OWN).final)[0].numpy()
    redder = colours[..., 0] - colours[..., 2]
    assert np.corrcoef(higher.ravel(), redder.ravel())[0, 1] > .8
    assert [cell.title.split(" (")[0] for cell in masks] == ["A: pseudo-label", "A: prediction", "B: pseudo-label", "B: prediction", "mask"]


def test_looks_at_different_things_are_not_compared(picture: object) -> None:
    look = explore(picture)
    for other in (explore(scene(7)), explore(picture, ["star"])):
        with pytest.raises(InputError, match="same picture, for the same names"):
            compare_cells(look, other, (View(), View()))


def test_one_side_moves_and_the_other_stays(picture: object) -> None:
    pair = CompareExplorer()
    before = pair.pictures.pictures
    pair.sides[1]["maps"].value = "gradcam"
    assert pair.pictures.pictures[0] == before[0] and pair.pictures.pictures[1] != before[1] and pair.pictures.pictures[2] != before[2]
    pair.options["cmap"].value = "viridis"
    assert pair.pictures.pictures[0] != before[0]
    pair.models[1].value = "world"   # has no maps of its own: none are offered
    assert "trained" not in [value for _, value in pair.sides[1]["maps"].options] and "trained" in [value for _, value in pair.sides[0]["maps"].options]
    assert "weclip and world" in told(pair) and len(pair.pictures.pictures) == len(before)


def test_the_cut_off_moves_both_sides_at_once_and_what_moves_neither_is_grey(picture: object) -> None:
    pair = CompareExplorer()
    before = list(pair.pictures.pictures)
    assert not pair.options["mu"].disabled and pair.options["layers"].disabled and pair.options["layers"].max == 6
    pair.options["mu"].value = .4
    assert all(a != b for a, b in zip(pair.pictures.pictures, before))
    pair.options["band"].value = "whole"
    assert pair.options["mu"].disabled
    pair.sides[0]["affinity"].value = "smoothed"
    assert not pair.options["layers"].disabled


# ---- a training -----------------------------------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path: Path) -> Path:
    "A run of 40 steps with two snapshots of one picture."
    (tmp_path / "snapshots").mkdir()
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(file, "JPEG")
    for step in (20, 40):
        cam = np.full((2, 8, 8), step / 40, np.float16)
        cam[:, 0, 0] = 0
        np.savez_compressed(tmp_path / "snapshots" / f"step-{step:06d}.npz", labels_0=np.full((8, 8), 1, np.uint8), cam_0=cam,
                            picture_0=np.frombuffer(file.getvalue(), np.uint8), names_0=np.array(["dog", "cat"]))
    rows = [dict(step=step, loss=40 / step, losses={"seg": 30 / step, "affinity": 10 / step}) for step in (10, 20, 30, 40)]
    rows.append(dict(step=40, scores={"miou": .5}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_snapshots_are_shown_with_their_names_and_losses_with_their_step(run: Path) -> None:
    history = open_history(run)
    assert history.steps == (20, 40) and history.pictures == 1
    table, masks = snapshot_cells(history, 40)
    assert [[cell.title for cell in row] for row in table] == [["map", "low", "high"]] * 2 and [row[0].name for row in table] == ["dog", "cat"]
    early, late = (grey(snapshot_cells(history, step)[0][0][0].picture).mean() for step in (20, 40))
    assert late > early   # the map grew
    assert "labels at step 40" in [cell.title for cell in masks]
    drawn = history_svg(history, 20)
    assert "step 20" in drawn and all(name in drawn for name in ("seg", "affinity", "mIoU"))


def test_scrubbing_and_what_cannot_be_scrubbed(run: Path, tmp_path: Path) -> None:
    explorer = RunExplorer(str(run))
    late = explorer.pictures.pictures
    explorer.step.value = 20
    assert explorer.pictures.pictures != late and "step 20 of 40" in told(explorer)
    explorer.run.value = str(tmp_path / "nothing")
    assert "is no folder of a training" in told(explorer) and explorer.history.folder == run
    (run / "snapshots" / "step-000020.npz").write_bytes(b"half a file")
    explorer.run.value, explorer.step.value = str(run), 40
    explorer.step.value = 20
    assert "step-000020.npz is damaged" in told(explorer)
    for path in (run / "snapshots").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="has no snapshots: train with -p snapshot_every"):
        open_history(run)


# ---- sub-bands ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_sub_bands_are_those_of_pywavelets(wavelet: str, picture: object) -> None:
    look = explore(picture)
    (cells,), taps = wavelet_cells(look, 2, 5, wavelet, "gray")
    centred = look.tokens[2][5] - look.tokens[2][5].mean()
    approximation, details = pywt.dwt2(centred.numpy(), wavelet, "periodization")
    for cell, expected in zip(cells[1:], (approximation, *details)):
        shown = grey(cell.picture)
        expected = np.abs(expected) / np.abs(expected).max() * 255
        assert np.corrcoef(middles(shown, expected.shape).ravel(), expected.ravel())[0, 1] > .99, cell.title
    assert len(taps) == 4 and f"{pywt.Wavelet(wavelet).dec_lo[0]:.3f}"[:5] in taps[0].alt


def test_blocks_and_channels_that_are_not_there(picture: object) -> None:
    look = explore(picture)
    for options, said in (((9,), "blocks 0 to 5"), ((0, 128), "channels 0 to 127")):
        with pytest.raises(InputError, match=said):
            wavelet_cells(look, *options)


def test_learned_taps_are_offered_where_there_are_some(picture: object) -> None:
    assert learned_taps(explore(picture, model="wtclip")) is None   # the published setting keeps them fixed
    learned = type(load_system("wtclip")).build(load_system("wtclip").backbone, WORLD_CLASSES, dim=16, learn_filters=True)
    assert learned_taps(explore(picture, model=learned)).shape == (4, 2)
    viewer = WaveletExplorer()
    before = viewer.pictures.pictures
    viewer.channel.value = 3
    assert viewer.pictures.pictures != before and "after block 3 of 6" in told(viewer)


# ---- prompts --------------------------------------------------------------------------------------------------------

def test_filters_are_drawn_as_they_were_learned(picture: object) -> None:
    look = explore(picture, model="sptseg")
    table, profile = prompt_cells(look, "gray")
    tower = prompt_tower(look)
    assert len(table) == 1 and table[0][0].name == "blocks 1, 2" and "blocks 1, 2" in profile   # one filter for both
    gain, own = tower.spectral.gain(0), tuple(tower.spectral.filters[0].grid)
    size = filter_magnitude(gain, own).numpy()
    shown = grey(table[0][0].picture)
    assert np.corrcoef(middles(shown, own).ravel(), size.ravel())[0, 1] > .99
    with torch.no_grad():
        tower.spectral.filters[0].weight.zero_()
    assert "at most 0" in prompt_cells(look)[0][0][0].alt


def test_systems_without_spectral_prompts_say_so() -> None:
    viewer = PromptExplorer()
    assert "type the folder of a training of sptseg" in told(viewer)
    viewer.model.value = "dfa"
    assert "dfa has no spectral prompts" in told(viewer)
    viewer.model.value = "sptseg"
    assert len(viewer.pictures.pictures) == 2


def test_a_chart_is_well_formed_and_keeps_its_lines_inside() -> None:
    from xml.etree import ElementTree
    drawn = ElementTree.fromstring(svg_chart({"a & b": [(0, -1), (1, 2)]}, [(0, "0"), (1, "1")], [(0, "0"), (1, "1")], "x < y", (0.5, "here")))
    points = next(one for one in drawn.iter() if one.tag.endswith("polyline")).get("points")
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert max(heights) <= 156 and min(heights) >= 26
