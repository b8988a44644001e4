"""Robustness: every row is an evaluation of its own, drops are paired, and systems are compared on the same pictures only."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from toy_inference import QUIET, SIZES, Toy, ZeroShotToy, write_folder

from freqseg.faces.cli import main
from freqseg.clip import load_clip
from freqseg.work.corruptions import Corruption
from freqseg.work.checkpoints import save_system
from freqseg.data import SegmentationFolder, open_folder, zero_shot_view
from freqseg.lists import zero_shot_split
from freqseg.work.seeds import paired_gain
from freqseg.files import InputError
from freqseg.metrics import ConfusionMeter
from freqseg.work.robustness import Robustness, read_robustness, robustness, robustness_markdown, robustness_plot, side_by_side
from freqseg.work.evaluation import evaluate_system
from freqseg.systems.weclip import WeCLIP
from freqseg.world.scenes import WORLD_CLASSES, write_world


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    return open_folder(write_folder(tmp_path_factory.mktemp("toy") / "data"), "val", masks=True)


@pytest.fixture(scope="module")
def found(dataset) -> Robustness:
    return robustness(Toy().eval(), dataset, ("noise", "contrast"), (3, 1), weights="none", command="again", **QUIET)


# ---- counts side by side --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("images, block", [(7, 64), (7, 3), (1, 1), (130, 64)])
def test_counts_side_by_side_are_the_counts(images: int, block: int) -> None:
    counts = torch.randint(0, 3, (images, 3, 4, 4))
    counts[images // 2] = 0   # a picture of ignored pixels alone leaves no cell
    meters = [ConfusionMeter(4) for _ in range(3)]
    for place, meter in enumerate(meters):
        for part in counts[:, place].split(5):
            meter.add(part)
    whole, expected = side_by_side(meters, block), ConfusionMeter(4, (3,))
    expected.add(counts)
    assert len(whole) == images and whole.shape == (3, 4, 4) and torch.equal(whole.triples, expected.triples)


def test_different_numbers_of_pictures_are_no_comparison() -> None:
    meters = [ConfusionMeter(2), ConfusionMeter(2)]
    meters[0].add(torch.ones(3, 2, 2, dtype=torch.int64))
    with pytest.raises(InputError, match="of 0 and of 3 pictures"):
        side_by_side(meters)


# ---- the table ------------------------------------------------------------------------------------------------------

def test_rows_are_evaluations_and_drops_their_paired_differences(found, dataset) -> None:
    clean = evaluate_system(Toy().eval(), dataset, figures=("seg",), **QUIET)["seg"]
    assert found.clean == clean.miou and found.clean_boundary == clean.boundary and found.images == len(dataset)
    assert [(row.corruption.kind, row.corruption.strength) for row in found.rows] == [("noise", 1), ("noise", 3), ("contrast", 1), ("contrast", 3)]
    for row in found.rows:
        worse = evaluate_system(Toy().eval(), dataset, figures=("seg",), corrupt=row.corruption, **QUIET)["seg"]
        assert row.miou == worse.miou and row.boundary == worse.boundary
        both = torch.stack([torch.stack([torch.zeros(4, 4, dtype=torch.int64).flatten().index_put_((cell[image == n],), count[image == n]).view(4, 4)
                                         for n in range(len(dataset))]) for image, cell, count in (one.counts.triples.long() for one in (clean, worse))], 1)
        assert row.drop == pytest.approx(tuple(paired_gain(both, 0, 1, samples=20)), abs=1e-12)
        assert row.drop.value == pytest.approx(found.clean.value - row.miou.value)


def test_seen_and_unseen_classes_are_told_apart_where_there_are_such(found, dataset) -> None:
    view = SegmentationFolder(zero_shot_view(dataset.listing, zero_shot_split(dataset.classes, unseen=dataset.classes[1:2])), masks=True)
    told = robustness(ZeroShotToy(.1).eval(), view, ("noise",), (2,), **QUIET)
    alone = evaluate_system(ZeroShotToy(.1).eval(), view, figures=("seg",), corrupt=Corruption("noise", 2), **QUIET)
    assert told["noise", 2].hiou == alone.zero_shot.hiou and told.clean_hiou.value == told.as_dict()["clean_hiou"]["value"]
    assert f"{100*told.clean_hiou.value:.1f} (" not in robustness_markdown({"a": told}) and f"| {100*told.clean_hiou.value:.1f} |" in robustness_markdown({"a": told}, "hiou")
    with pytest.raises(InputError, match="no hIoU"): robustness_markdown({"a": found}, "hiou")
    assert "hIoU %" in told.markdown() and "hIoU" not in found.markdown() and "hiou" not in json.dumps(found.as_dict())


def test_the_mean_is_that_of_the_rows(found) -> None:
    assert found.mean.value == pytest.approx(np.mean([row.miou.value for row in found.rows]))
    assert found.mean_drop.value == pytest.approx(found.clean.value - found.mean.value) == pytest.approx(np.mean([row.drop.value for row in found.rows]))
    assert found.mean.low <= found.mean.value <= found.mean.high


def test_a_system_that_looks_at_nothing_loses_nothing(dataset) -> None:
    class Blind(Toy):
        def predict(self, images, keep=None):
            return super().predict(torch.zeros_like(images), keep)
    for row in robustness(Blind().eval(), dataset, **QUIET).rows:
        assert row.drop == (0, 0, 0)


def test_a_clean_report_is_not_made_again(dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    import freqseg.work.robustness as room
    clean, seen = evaluate_system(Toy().eval(), dataset, **QUIET), []
    monkeypatch.setattr(room, "evaluate_system", lambda *given, corrupt, **options: seen.append(corrupt) or evaluate_system(*given, corrupt=corrupt, **options))
    found = robustness(Toy().eval(), dataset, ("jpeg",), (2,), clean=clean, **QUIET)
    assert seen == [Corruption("jpeg", 2)] and found.clean == clean["seg"].miou and found.figure == "seg"


def test_the_figure_that_says_most_is_the_table_s(dataset) -> None:
    found = robustness(Toy().eval(), dataset, ("jpeg",), (2,), figures=("seed", "mask"), **QUIET)
    assert found.figure == "mask" and "pseudo-labels from image labels" in found.markdown()


def test_bad_pictures_are_left_out_of_all(tmp_path) -> None:
    root = write_folder(tmp_path / "broken")
    (root / "JPEGImages/val_2.png").write_bytes(b"no picture")
    found = robustness(Toy().eval(), open_folder(root, "val", masks=True), ("blur",), (1,), skip_bad=True, **QUIET)
    assert found.images == len(SIZES) - 1 and math.isfinite(found["blur", 1].drop.value)


# ---- what is shown --------------------------------------------------------------------------------------------------

def test_the_table_says_everything_once(found) -> None:
    rows = [line.split(" | ") for line in found.markdown().splitlines() if line.startswith("|")]
    assert [row[0].strip("| ") for row in rows] == ["corruption", "---", "clean", "noise 1", "noise 3", "contrast 1", "contrast 3", "mean of 4"]
    assert len({len(row) for row in rows}) == 1 and rows[3][1] == "deviation 0.08" and rows[6][1] == "5% left"
    assert f"{100 * found['noise', 3].drop.value:.1f} [" in rows[4][3]
    assert "Made by `again`" in found.markdown() and "-0.0" not in found.markdown()


def test_json_holds_every_figure(found) -> None:
    told = json.loads(json.dumps(found.as_dict()))
    assert told["rows"][1]["drop"]["value"] == found["noise", 3].drop.value and told["rows"][1]["parameter"] == 0.38 and told["rows"][1]["severity"] == 5
    assert told["clean"]["value"] == found.clean.value and told["mean_drop"]["low"] == found.mean_drop.low and told["figure"] == "seg"


def test_three_files_are_written_whole(found, tmp_path) -> None:
    paths = found.save(tmp_path / "out")
    assert [path.name for path in paths] == ["robustness.md", "robustness.json", "robustness.png"]
    assert set(paths) == set((tmp_path / "out").iterdir())
    assert Image.open(paths[2]).width > 300


def test_lines_go_from_the_clean_figure_through_every_strength(found) -> None:
    axes, = robustness_plot({"toy": found}).axes
    for line, kind in zip(axes.lines, found.kinds, strict=True):
        assert line.get_label() == kind and list(line.get_xdata()) == [0, 1, 3]
        assert list(line.get_ydata()) == pytest.approx([100 * found.clean.value, *(100 * found[kind, strength].miou.value for strength in (1, 3))])


def test_systems_stand_side_by_side_on_one_scale(found, dataset) -> None:
    other = robustness(Toy(seed=1).eval(), dataset, ("noise", "contrast"), (1, 3), **QUIET)
    sheet = robustness_plot({"one": found, "two": other})
    assert [axes.get_title() for axes in sheet.axes] == ["one", "two"] and sheet.axes[0].get_ylim() == sheet.axes[1].get_ylim()
    lines = robustness_markdown({"one": found, "two": other}).splitlines()
    assert "| corruption | one | two |" in lines and sum(line.startswith("| noise") for line in lines) == 2


def test_what_was_saved_is_read_again_and_compared(found, dataset, tmp_path) -> None:
    found.save(tmp_path)
    again = read_robustness(tmp_path)
    assert again.as_dict() == found.as_dict() and again.markdown() == found.markdown()
    assert robustness_markdown({"then": again, "now": found}) == robustness_markdown({"then": found, "now": found})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"kind": "fog", "strength": 1}]}'])
def test_a_file_that_is_no_robustness_is_named(text: str, tmp_path) -> None:
    (tmp_path / "robustness.json").write_text(text)
    with pytest.raises(InputError, match="robustness.json"):
        read_robustness(tmp_path / "robustness.json")
    with pytest.raises(InputError, match="freqseg evaluate .* --corrupt"):
        read_robustness(tmp_path / "elsewhere")


def test_systems_that_saw_other_things_are_not_compared(found, dataset, tmp_path) -> None:
    other = robustness(Toy().eval(), dataset, ("noise",), (1,), **QUIET)
    fewer = robustness(Toy().eval(), dataset, ("noise", "contrast"), (1, 3), limit=3, **QUIET)
    for one in (other, fewer):
        for compare in (robustness_plot, robustness_markdown):
            with pytest.raises(InputError, match="evaluate them alike"):
                compare({"one": found, "two": one})
    with pytest.raises(InputError, match="at least one system"):
        robustness_plot({})


@pytest.mark.parametrize("options, message", [
    (dict(kinds=("blurr",)), "Did you mean 'blur'"), (dict(strengths=(4,)), "strength=4"), (dict(strengths=(0, 1)), "leave 0 away"), (dict(kinds=()), "at least one"),
    (dict(kinds="blur"), "give a list"), (dict(strengths=(1, 1)), "once")])
def test_what_cannot_be_is_said_before_anything_is_evaluated(options, message: str, dataset) -> None:
    with pytest.raises(InputError, match=message):
        robustness(None, dataset, **options)


def test_a_row_that_there_is_not_is_named(found) -> None:
    with pytest.raises(InputError, match="there are noise 1, noise 3"):
        found["blur", 1]


# ---- the command ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    "A folder like that of a training, with a few scenes and a system that has learned nothing."
    folder = tmp_path_factory.mktemp("run")
    write_world(str(folder / "world"), train=0, val=2, test=3, size=64)
    torch.manual_seed(0)
    save_system(WeCLIP.build(load_clip("world"), WORLD_CLASSES, dim=16, decoder_layers=1), folder / "last.safetensors")
    return folder


def test_evaluate_corrupt_writes_the_table_beside_the_report(run, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(run), "--device", "cpu", "--workers", "0", "--no-flip", "--out", str(tmp_path), "--corrupt", "blur,noise"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "mean of 6" in said and "robustness.png" in said
    assert {"report.html", "report.md", "report.json", "robustness.md", "robustness.json", "robustness.png"} == {path.name for path in tmp_path.iterdir()}
    report, told = (json.loads((tmp_path / name).read_text()) for name in ("report.json", "robustness.json"))
    assert told["clean"] == report["figures"]["seg"]["miou"] and len(told["rows"]) == 6 and told["command"].startswith("freqseg evaluate") and told["caveat"]
    assert "corrupt" not in report["settings"] and told["weights"] == "the CLIP of the embedded world"
    system_rows = {(row["kind"], row["strength"]) for row in told["rows"]}
    assert system_rows == {(kind, strength) for kind in ("blur", "noise") for strength in (1, 2, 3)}


@pytest.mark.parametrize("kinds, message", [("fog", "unknown corruption"), ("blurr", "Did you mean 'blur'"), ("blur,blur", "twice"), ("", "no corruption named")])
def test_an_unknown_corruption_is_said_before_the_evaluation(run, tmp_path, capsys: pytest.CaptureFixture[str], kinds: str, message: str) -> None:
    assert main(["evaluate", str(run), "--device", "cpu", "--out", str(tmp_path / "out"), "--corrupt", kinds]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_split_without_masks_has_no_robustness(run, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bare"
    write_world(str(folder), train=0, val=2, test=0, size=64)
    for path in (folder / "SegmentationClass").iterdir():
        path.unlink()
    assert main(["evaluate", str(run), "--data", str(folder), "--device", "cpu", "--save-masks", str(tmp_path / "masks"), "--corrupt", "all"]) == 2
    assert "no masks to score against" in capsys.readouterr().err and not (tmp_path / "masks").exists()
