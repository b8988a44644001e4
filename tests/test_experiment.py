"""Experiments: presets, flat parameters, one small training from end to end."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from freqseg.checkpoints import SYSTEMS
from freqseg.experiment import PRESETS, draw_scenes, experiment, known_parameters, plan
from freqseg.files import InputError


def test_every_system_has_the_four_presets_and_they_build_its_options() -> None:
    assert set(PRESETS) == set(SYSTEMS)
    for name, presets in PRESETS.items():
        assert set(presets) == {"smoke", "world", "voc", "coco"}
        for preset in presets.values():
            known = {field.name for field in fields(SYSTEMS[name].Options)}
            assert set(preset.options) <= known and preset.settings.warmup < preset.settings.iterations


def test_the_papers_schedules_are_the_papers() -> None:
    found = {(name, preset): (p.settings.iterations, p.settings.batch, p.settings.lr, p.settings.power, p.settings.warmup, p.crop)
             for name, presets in PRESETS.items() for preset, p in presets.items() if preset in ("voc", "coco")}
    assert found == {("weclip", "voc"): (30_000, 4, 2e-3, 1.0, 50, 320), ("weclip", "coco"): (80_000, 4, 2e-3, 1.0, 50, 320),
                     ("wtclip", "voc"): (30_000, 4, 2e-3, 1.0, 50, 320), ("wtclip", "coco"): (80_000, 4, 2e-3, 1.0, 50, 320),
                     ("dfa", "voc"): (30_000, 4, 1e-4, 1.0, 50, 320), ("dfa", "coco"): (80_000, 8, 1e-4, 1.0, 50, 320),
                     ("ffr", "voc"): (20_000, 4, 6e-5, .9, 2000, 320), ("ffr", "coco"): (80_000, 8, 6e-5, .9, 2000, 320)}
    assert PRESETS["weclip"]["coco"].options == dict(late_layers=10, box=.7) and PRESETS["dfa"]["voc"].scales == (1.0, 1.2, 1.5)


@pytest.mark.parametrize("system", SYSTEMS)
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


def test_a_namespace_gives_only_what_is_a_parameter(tmp_path: Path) -> None:
    run = experiment("dfa", dict(out=str(tmp_path), mu=.3, unrelated=object(), __name__="main"))
    assert run.plan.options == dict(mu=.3) and run.plan.out == tmp_path


def test_scenes_are_drawn_once_and_never_mistaken_for_others(tmp_path: Path) -> None:
    folder = draw_scenes(tmp_path / "world", (3, 2, 2))
    stamp = (folder / "labels.txt").stat().st_mtime_ns
    assert draw_scenes(folder, (3, 2, 2)) == folder and (folder / "labels.txt").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="holds .*'train': 3.*choose another out"): draw_scenes(folder, (4, 2, 2))
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "rest").write_text("of a drawing that was killed")
    assert not (draw_scenes(tmp_path / "other", (1, 1, 1)) / "rest").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no training picture")
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_smoke_training_trains_resumes_and_reports(system: str, tmp_path: Path) -> None:
    parameters = dict(out=str(tmp_path), scenes=[4, 2, 2], iterations=3, save_every=2, par_iterations=2, snapshot_every=2)
    run = experiment(system, parameters)
    assert run.result.resumed == 0 and {path.name for path in tmp_path.iterdir()} >= {"last.safetensors", "best.safetensors", "metrics.jsonl", "run.json"}
    assert any((tmp_path / "snapshots").iterdir())
    told = json.loads(run.save().read_text())
    assert told["system"] == system and set(told["report"]["figures"]) >= {"seed", "mask", "seg"} and told["best"]["miou"] >= 0
    assert experiment(system, parameters).result.resumed == 3
    with pytest.raises(InputError, match="crop"): experiment(system, {**parameters, "crop": 96}).result
