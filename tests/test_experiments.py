"""Experiments: presets, flat parameters, one small training from end to end."""

import json
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from freqseg.systems.segmenter import known_systems, system_named
from freqseg.work.experiments import (Preset, RunOptions, draw_scenes, experiment, first_readable, known_parameters,
                                      parameters_cell, plain_warnings, plan, presets_of)
from freqseg.data import open_folder
from freqseg.files import InputError
from freqseg.faces.report import markdown
from freqseg.work.runs import notebook_parameters
from freqseg.work.train import TrainSettings


WORLD = dict(data="world", model="world", pretrained="", test_split="test", scenes=(3200, 100, 200), crop=128, resize_range=(.6, 1.1), iterations=400, batch=8,
             warmup=20, validate_every=200, save_every=100, log_every=20, workers=1)
SMOKE = dict(WORLD, scenes=(16, 8, 8), crop=80, iterations=6, batch=2, warmup=2, validate_every=0, save_every=3, log_every=2, workers=0)
VOC = dict(train_split="train_aug", crf="weclip")
COCO = dict(crf="weclip", iterations=80_000, validate_every=5000)
MASKS = dict(crop=512, largest=.75, vary_colours=True, short=512, window=512, stride=426, average="probabilities", flip=False, batch=16, lr=2e-4, warmup=1500,
             lr_power=.9, validate_every=0)
TWO = dict(side=512, scales=(1., .75))
THREE = dict(lr=1e-4, scales=(1., 1.2, 1.5))
FEW = dict(lr=3e-3, grad_clip=1., flip=False, average="probabilities")
LARGE, SMALL = dict(late_layers=10, box=.7), dict(dim=64, switch=2., background_power=2.)
SMALL_FFR = dict(dim=64, hidden=128, maps="smoothed", background_power=2., lambda_seg=1.)
SMALL_MASKS = dict(filter_size=128, residual=True)
STUFF = dict(filter_size=512, prompts=100, wording="scene")
# system -> preset -> what differs from the defaults of preset and schedule, and the system's own options: the papers' schedules are the papers'
PUBLISHED = {
    "weclip": {"voc": (VOC | TWO, {}), "coco": (COCO | TWO, LARGE), "world": (WORLD | dict(lr=1e-3), SMALL), "smoke": (SMOKE | dict(lr=1e-3), SMALL)},
    "dfa": {"voc": (VOC | THREE, {}), "coco": (COCO | THREE | dict(batch=8), {}),
            "world": (WORLD | dict(lr=1e-3), dict(dim=64)), "smoke": (SMOKE | dict(lr=1e-3), dict(dim=64))},
    "ffr": {"voc": (VOC | dict(iterations=20_000, lr=6e-5, warmup=2000, lr_power=.9), {}), "coco": (COCO | dict(batch=8, lr=6e-5, warmup=2000, lr_power=.9), {}),
            "world": (WORLD | dict(lr=1e-4), SMALL_FFR), "smoke": (SMOKE | dict(lr=1e-4), SMALL_FFR)},
    "zegclip": {"voc": (dict(train_split="train_aug", iterations=20_000) | MASKS, dict(filter_size=512)), "coco_stuff": (dict(iterations=80_000) | MASKS, STUFF),
                "world": (WORLD | FEW, SMALL_MASKS), "smoke": (SMOKE | FEW, SMALL_MASKS)}}
PUBLISHED["wtclip"] = PUBLISHED["weclip"]
PUBLISHED["sptseg"] = PUBLISHED["zegclip"] | {"coco_stuff": (dict(iterations=96_000) | MASKS, STUFF)}


@pytest.mark.parametrize("system", PUBLISHED)
def test_every_field_of_every_preset_is_what_was_published(system: str) -> None:
    presets = presets_of(system)
    assert set(presets) == set(PUBLISHED[system])
    for name, preset in presets.items():
        flat, options = PUBLISHED[system][name]
        schedule = {field.name for field in fields(TrainSettings)}
        expected = Preset("", settings=TrainSettings(**{k: v for k, v in flat.items() if k in schedule}), options=options)
        assert preset == replace(expected, **{k: v for k, v in flat.items() if k not in schedule}), (system, name)
        assert set(options) <= {field.name for field in fields(system_named(system).Options)}


@pytest.mark.parametrize("system", known_systems())
def test_no_parameter_has_two_meanings(system: str) -> None:
    names = [name for group in known_parameters(system).values() for name in group]
    assert len(names) == len(set(names))


def test_parameters_override_their_preset_and_none_does_not() -> None:
    planned = plan("dfa", dict(preset="voc", data="VOC", lambda_h=.2, iterations=7, warmup=1, crop=None, scales=[1.0]))
    assert planned.options == dict(lambda_h=.2) and planned.chosen.settings.iterations == 7 and planned.chosen.crop == 320
    assert planned.chosen.scales == (1.0,) and planned.chosen.data == "VOC"


def test_wrong_parameters_are_named() -> None:
    with pytest.raises(InputError, match="'lambda_hi'.*lambda_h"): plan("dfa", dict(lambda_hi=1))
    with pytest.raises(InputError, match="'lambda_h'"): plan("weclip", dict(lambda_h=1))
    with pytest.raises(InputError, match="'vok'.*voc"): plan("dfa", dict(preset="vok"))
    with pytest.raises(InputError, match="'dafne'"): plan("dafne", {})
    with pytest.raises(InputError, match="preset voc needs the data"): plan("dfa", dict(preset="voc"))


@pytest.mark.parametrize(("values", "message"), [
    (dict(side="abc"), "side='abc': give a whole number from 1 to 16384 or none"), (dict(side=1.5), "side=1.5"), (dict(side=True), "side=True"), (dict(side=0), "side=0"),
    (dict(limit="few"), "limit='few'"), (dict(limit=0), "limit=0"), (dict(background="sky"), "background='sky': give several values"),
    (dict(temperature="hot"), "temperature='hot': give a number above 0 or none"), (dict(crf="weklip"), "crf='weklip': did you mean 'weclip'"), (dict(crop=0), "crop=0"),
    (dict(resize_range=[1.0]), "resize_range=.*2 values"), (dict(resize_range=[2.0, 1.0]), "resize_range=.*least and then the largest"), (dict(scales=[0.0]), "scales="), (dict(maps="cam"), "maps='cam'"),
    (dict(score="best"), "score='best'"), (dict(combine="mean"), "combine='mean'")])
def test_values_that_would_fail_hours_later_are_refused_by_the_plan(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message): plan("dfa", values)


@pytest.mark.parametrize("system", ["weclip", "wtclip"])
def test_an_average_over_no_block_is_refused(system: str) -> None:
    with pytest.raises(InputError, match="early_layers=0"): plan(system, dict(early_layers=0))


@pytest.mark.parametrize("lacking", ["folder", "val", "mask", "label", "background", "crf"])
def test_what_is_missing_is_said_before_clip_is_loaded(lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = draw_scenes(tmp_path / "world", (2, 2, 2))
    given = dict(preset="smoke", data=str(folder), out=str(tmp_path / "run"))
    if lacking == "folder": given["data"], message = str(tmp_path / "nowhere"), "nowhere"
    elif lacking == "val": (folder / "ImageSets" / "Segmentation" / "val.txt").unlink(); message = "no list of split 'val'"
    elif lacking == "mask": next((folder / "SegmentationClass").glob("test_*")).unlink(); message = "mask"
    elif lacking == "label": (folder / "labels.txt").unlink(); message = "labels.txt"
    elif lacking == "background": message = "no background class"
    else: given["crf"], message = "weclip", "pydensecrf2"
    def no_clip(*_: object, **__: object) -> None: raise AssertionError("CLIP was loaded")
    def no_crf() -> None: raise InputError("install pydensecrf2")
    monkeypatch.setattr("freqseg.work.experiments.load_clip", no_clip)
    if lacking == "crf": monkeypatch.setattr("freqseg.work.experiments.require_densecrf", no_crf)
    run = experiment("dfa", given)
    if lacking == "background": run.train.listing = replace(run.train.listing, background=False)
    with pytest.raises(InputError, match=message): run.record
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("system", "name", "preset"), [("dfa", "vote_window", "smoke"), ("dfa", "box", "smoke"), ("weclip", "box", "coco"), ("wtclip", "box", "voc"),
                                                       ("ffr", "unfreeze", "world"), ("dfa", "temperature", "voc")])
def test_the_text_none_switches_an_option_off(system: str, name: str, preset: str) -> None:
    planned = plan(system, {"preset": preset, "data": "VOC", name: "none"})
    assert planned.options[name] is None and getattr(system_named(system).Options(**planned.options), name) is None


def test_the_text_none_switches_off_what_a_preset_sets() -> None:
    planned = plan("weclip", dict(preset="voc", data="VOC", crf="none", side="none", limit="none"))
    assert planned.chosen.crf is None and planned.chosen.side is None and planned.limit is None
    kept = plan("weclip", dict(preset="voc", data="VOC"))
    assert kept.chosen.crf == "weclip" and kept.chosen.side == 512


@pytest.mark.parametrize("name", ["crop", "flip", "scales", "iterations", "lr", "betas", "lambda_h", "relate", "hidden"])
def test_the_text_none_is_refused_where_there_must_be_a_value(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}='none': give "): plan("dfa", {name: "none"})


def test_the_text_none_is_a_word_where_words_stand() -> None:
    assert plan("wtclip", dict(edge="none", pretrained="none")).options["edge"] == "none"
    assert plan("wtclip", dict(pretrained="none")).chosen.pretrained == "none"
    with pytest.raises(InputError, match="precision"): plan("dfa", dict(precision="none"))
    with pytest.raises(InputError, match="'none'.*preset|preset.*'none'"): plan("dfa", dict(preset="none"))


@pytest.mark.parametrize("system", known_systems())
def test_the_parameters_of_a_training_notebook_are_those_of_its_system(system: str) -> None:
    path = Path(__file__).parent.parent / "nbs" / "train" / f"{system}.ipynb"
    cell, = (cell for cell in json.loads(path.read_text())["cells"] if "parameters" in cell["metadata"].get("tags", []))
    assert "".join(cell["source"]) == parameters_cell(system), f"{path.name} is out of step: run python .ci/parameters.py"
    told = notebook_parameters(path)
    options = system_named(system).Options
    homes = [(f.name, home) for home in (RunOptions, Preset, TrainSettings, options) for f in fields(home) if f.name not in ("settings", "options")]
    assert list(told) == [name for name, _ in homes]
    assert {name: one.default for name, one in told.items() if one.default is not None} == dict(preset="smoke", device="auto")
    for name, home in homes:
        assert len(told[name].help) > 4, f"{name} has no comment"
        default = getattr(home, name, None) if home is options else None
        assert told[name].help.endswith(f" [{default}]") == (default is not None)


def test_a_namespace_gives_only_what_is_a_parameter(tmp_path: Path) -> None:
    run = experiment("dfa", dict(out=str(tmp_path), mu=.3, unrelated=object(), __name__="main"))
    assert run.plan.options == dict(dim=64, mu=.3) and run.plan.out == tmp_path


def test_scenes_are_drawn_once_and_never_mistaken_for_others(tmp_path: Path) -> None:
    folder = draw_scenes(tmp_path / "world", (3, 2, 2))
    stamp = (folder / "labels.txt").stat().st_mtime_ns
    assert draw_scenes(folder, (3, 2, 2)) == folder and (folder / "labels.txt").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="holds .*'train': 3.*choose another out"): draw_scenes(folder, (4, 2, 2))
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "rest").write_text("of a drawing that was killed")
    assert not (draw_scenes(tmp_path / "other", (1, 1, 1)) / "rest").exists()


def test_who_only_looks_is_shown_the_pictures_that_can_be_read(tmp_path: Path) -> None:
    folder = draw_scenes(tmp_path / "world", (4, 1, 1))
    pictures = open_folder(folder, "train")
    for index in (0, 2): Path(pictures.listing.images[index]).write_bytes(b"broken")
    assert [sample.id for sample in first_readable(pictures, 6)] == [pictures.ids[1], pictures.ids[3]]
    assert [sample.id for sample in first_readable(pictures, 1)] == [pictures.ids[1]]
    for path in pictures.listing.images: Path(path).write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be decoded"): first_readable(pictures, 6)


def test_a_notice_is_a_sentence_without_the_code_that_gives_it() -> None:
    before = warnings.formatwarning
    with plain_warnings():
        notice, other = (warnings.formatwarning(Warning("picture 7 was skipped"), kind, "train.py", 1, "warn()") for kind in (UserWarning, RuntimeWarning))
    assert warnings.formatwarning is before
    assert notice == "freqseg: picture 7 was skipped\n" and "RuntimeWarning" in other


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no training picture", "ignore:skipped picture", "ignore:validation without picture")
def test_a_training_without_damaged_pictures_says_so(tmp_path: Path) -> None:
    folder = draw_scenes(tmp_path / "world", (4, 3, 2))
    bad = {split: open_folder(folder, split).listing.images[0] for split in ("train", "val")}
    for path in bad.values(): Path(path).write_bytes(b"broken")
    run = experiment("weclip", dict(data=str(folder), out=str(tmp_path / "run"), iterations=3, par_iterations=2, skip_bad=True))
    name = Path(bad["train"]).stem
    assert len(first_readable(run.train, 6)) == 3
    assert f"without 1 picture that could not be read ({name})" in run.outcome
    told = json.loads(run.save().read_text())
    assert list(told["skipped"]) == [name] and name in told["report"]["training"] and told["report"]["training"].startswith("step 3, best.safetensors")
    assert f"- training: {told['report']['training']}" in markdown(run.report)
    assert any(Path(bad["val"]).name in text for text in told["report"]["skipped"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no training picture")
@pytest.mark.parametrize("system", known_systems())
def test_a_smoke_training_trains_resumes_and_reports(system: str, tmp_path: Path) -> None:
    parameters = dict(out=str(tmp_path), scenes=[4, 2, 2], iterations=3, save_every=2, snapshot_every=2)
    if system_named(system).supervision == "labels": parameters["par_iterations"] = 2
    run = experiment(system, parameters)
    assert run.result.resumed == 0 and {path.name for path in tmp_path.iterdir()} >= {"last.safetensors", "best.safetensors", "metrics.jsonl", "run.json"}
    kept = sorted((tmp_path / "snapshots").iterdir())
    assert kept and all(0 <= value.min() <= value.max() <= 20 and (system_named(system).supervision != "masks" or value.min() > 0)   # classes count from 1
                        for path in kept for name, value in np.load(path).items() if name.startswith("labels_"))
    told = json.loads(run.save().read_text())
    figures = {"labels": {"seed", "mask", "seg"}, "masks": {"seg", "seg_low"}}[system_named(system).supervision]
    assert told["system"] == system and set(told["report"]["figures"]) >= figures and told["best"]["miou"] >= 0
    assert ("zero_shot" in told["report"]) == (system_named(system).supervision == "masks")
    again = experiment(system, parameters)
    assert again.result.resumed == 3 and "gone on from step 3, best mIoU on val" in again.outcome
    with pytest.raises(InputError, match="crop"): experiment(system, {**parameters, "crop": 96}).result
