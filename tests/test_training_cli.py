"""`freqseg train` and `freqseg evaluate` from the command line: what they make, what they refuse, and what a failure leaves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from PIL import Image

from freqseg.faces.cli import main
from freqseg.pictures import palette
from freqseg.work.experiments import draw_scenes, parse_parameters, plan
from freqseg.files import InputError
from freqseg.work.runs import launch_command
from freqseg.files import locked
from freqseg.systems.segmenter import known_systems
from freqseg.work.checkpoints import read_checkpoint

FEW = ["-p", "iterations=4", "-p", "workers=0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A short training, by the command."
    out = tmp_path_factory.mktemp("train") / "weclip"
    assert main(["train", "weclip", "--device", "cpu", "--out", str(out), *FEW]) == 0
    return out


def says(capsys: pytest.CaptureFixture[str], words: list[str], status: int) -> str:
    "What a command that must fail prints on stderr."
    capsys.readouterr()
    assert main(words) == status
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


# ---- parameters from text -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, value", [
    ("relate=false", False), ("relate=yes", True), ("iterations=12", 12), ("lr=1e-3", 1e-3), ("lr=1", 1.0), ("scales=1.0,1.5", (1.0, 1.5)), ("scales=1.5", (1.5,)),
    ("crf=weclip", "weclip"), ("side=512", 512), ("decoder=wavelet", "wavelet"), ("data=a folder/of mine", "a folder/of mine"), ("crf=none", "none"),
    ("background=clear sky, grass", ("clear sky", "grass")), ("background=sky", ("sky",))])
def test_text_becomes_what_the_parameter_is(text: str, value: object) -> None:
    found = parse_parameters("dfa", [text])[text.partition("=")[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text, message", [
    ("relate=perhaps", "relate='perhaps': give true or false"), ("iterations=1.5", "iterations=1.5: give a whole number"), ("lambda_hh=1", "Did you mean 'lambda_h'"), ("iterations", "give a name and a value"),
    ("seed=one", "seed='one': give a whole number")])
def test_text_that_means_no_value_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_parameters("dfa", [text])


def test_a_plan_knows_the_command_that_gives_it() -> None:
    planned = plan("dfa", dict(preset="voc", data="VOC2012", lambda_h=0.2, scales=(1.0, 1.5), vote_window="none"))
    assert planned.command == "freqseg train dfa --preset voc --data VOC2012 -p scales=1.0,1.5 -p lambda_h=0.2 -p vote_window=none"


@pytest.mark.parametrize("values", [dict(flip="false"), dict(iterations=1.5), dict(lr="1e-3"), dict(scales=1.0), dict(relate=1)])
def test_a_value_of_another_kind_is_refused_by_the_plan(values: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(values))}=.*: give "):
        plan("dfa", values)


# ---- train ----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_train_leaves_record_figures_report_and_checkpoints(run: Path) -> None:
    told = json.loads((run / "metrics.json").read_text())
    assert told["system"] == "weclip" and told["settings"]["iterations"] == 4 and told["report"]["caveat"]
    assert {"device", "begun", "precision", "freqseg", "torch", "python"} <= set(told["record"]) and told["seconds"] > 0
    assert {"seed", "mask", "seg", "seg_low", "seg_high"} <= set(told["report"]["figures"])
    assert read_checkpoint(run / "last.safetensors").step == 4
    assert (run / "report.html").exists() and (run / "report.md").exists()


@pytest.mark.slow
def test_the_record_is_the_notebook_with_its_parameters_and_versions(run: Path) -> None:
    record = nbformat.read(run / "run.ipynb", 4)
    assert record.metadata.papermill.parameters["iterations"] == 4
    shown = "".join(output.get("data", {}).get("text/markdown", "") for cell in record.cells for output in cell.get("outputs", []))
    assert "| torch |" in shown and "| device |" in shown and "weclip, preset smoke" in shown


@pytest.mark.slow
def test_the_same_command_does_not_train_twice(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "last.safetensors").stat().st_mtime_ns
    assert main(["train", "weclip", "--device", "cpu", "--out", str(run), *FEW]) == 0
    assert (run / "last.safetensors").stat().st_mtime_ns == before
    said = capsys.readouterr()
    assert "  seg       network output" in said.out and "all 4 steps" in said.err and "are done" in said.err


@pytest.mark.slow
@pytest.mark.parametrize("words, message", [
    (["train", "wtclip", *FEW], "holds another run"),
    (["train", "weclip", "-p", "iterations=4", "-p", "lr=0.5"], "settings.lr")])
def test_a_folder_of_another_run_is_refused_with_what_differs(run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    record = (run / "run.ipynb").stat().st_mtime_ns
    said = says(capsys, [*words, "--device", "cpu", "--out", str(run)], 2)
    assert message in said and "are done" not in said
    assert (run / "run.ipynb").stat().st_mtime_ns == record   # said at once: no notebook has run
    assert read_checkpoint(run / "last.safetensors").config["system"] == "weclip"


@pytest.mark.slow
def test_a_training_that_diverges_leaves_notebook_traceback_and_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = says(capsys, ["train", "weclip", "--device", "cpu", "--out", str(tmp_path / "run"), *FEW, "-p", "lr=1e30", "-p", "warmup=0"], 1)
    assert "training diverged at step" in said and "last good checkpoint" in said
    assert "TrainingDiverged" in (tmp_path / "run" / "run.traceback.txt").read_text()
    assert nbformat.read(tmp_path / "run" / "run.ipynb", 4).cells and read_checkpoint(tmp_path / "run" / "last.safetensors").step < 4


@pytest.mark.parametrize("words, message", [
    (["train", "dfaa"], "Did you mean 'dfa'"),
    (["train", "dfa", "--preset", "vocc"], "Did you mean 'voc'"),
    (["train", "dfa", "--preset", "voc"], "needs the data"),
    (["train", "dfa", "-p", "lambda_hh=0.2"], "Did you mean 'lambda_h'"),
    (["train", "dfa", "-p", "preset=world", "--preset", "world"], "given twice"),
    (["train", "dfa", "-p", "out=here"], "--out"),
    (["train", "dfa", "-p", "warmup=10"], "leaves nothing of iterations"),
    (["train", "dfa", "--devices", "2", "--nodes", "2"], "--rendezvous HOST:PORT"),
    (["train", "dfa", "-p", "devices=2", "-p", "nodes=2"], "--rendezvous HOST:PORT")])
def test_what_cannot_be_trained_is_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                             words: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in says(capsys, words, 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["train", "dfa"], ["train", "dfa", "--devices", "2"], ["sweep", "dfa", "--seeds", "1"]], ids=["train", "devices", "sweep"])
def test_data_that_are_not_there_are_no_matter_for_a_kernel(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in says(capsys, [*words, "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")], 2)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_and_its_record_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("freqseg.work.runs.run_notebook", lambda *_, **__: pytest.fail("a notebook was run"))
    with locked(tmp_path / "run"):
        said = says(capsys, ["train", "dfa", "-p", "scenes=1,1,1", "--out", str(tmp_path / "run")], 2)
    assert re.search(r"run is in use by process \d+ on .*choose another", said)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    world = draw_scenes(tmp_path / "world", (1, 1, 1))
    assert "cannot write" in says(capsys, ["train", "dfa", "--data", str(world), "--out", str(tmp_path / "file" / "run")], 2)


@pytest.mark.slow
def test_two_processes_train_and_one_shows_it(tmp_path: Path) -> None:
    words = ["train", "weclip", "--device", "cpu", "--devices", "2", "--out", str(tmp_path / "run"), *FEW, "-p", "batch=1"]
    done = subprocess.run([sys.executable, "-c", "from freqseg.faces.cli import main; raise SystemExit(main())", *words], text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "  seg       network output" in done.stdout
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["settings"]["pictures_per_step"] == 2 and read_checkpoint(tmp_path / "run" / "last.safetensors").step == 4


def test_the_launch_names_machines_and_the_meeting_point() -> None:
    alone = launch_command(["train", "dfa"], 4)
    assert "--standalone" in alone and alone[-2:] == ["train", "dfa"]
    many = launch_command(["train", "dfa"], 8, nodes=2, node_rank=1, rendezvous="head:29500")
    assert many[many.index("--master-addr") + 1] == "head" and many[many.index("--node-rank") + 1] == "1"
    for wrong in (dict(nodes=2), dict(nodes=2, rendezvous="head"), dict(nodes=2, rendezvous="head:1", node_rank=2), dict(node_rank=1)):
        with pytest.raises(InputError):
            launch_command([], 1, **wrong)


# ---- evaluate -------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_evaluate_reports_and_writes_masks_in_voc_s_colours(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(run), "--split", "val", "--scales", "1.0,1.5", "--no-flip", "--bands", "0.2", "--workers", "0", "--out", str(tmp_path / "report"),
             "--save-masks", str(tmp_path / "masks")]
    assert main(words) == 0
    assert "seg_low" in capsys.readouterr().out
    told = json.loads((tmp_path / "report" / "report.json").read_text())
    assert told["settings"]["inference"]["scales"] == [1.0, 1.5] and told["settings"]["band_cutoff"] == 0.2 and told["command"].startswith("freqseg evaluate")
    assert told["weights"] == "the CLIP of the embedded world"
    masks = sorted((tmp_path / "masks").iterdir())
    assert len(masks) == told["images"] == 8
    with Image.open(masks[0]) as mask:
        assert mask.mode == "P" and mask.getpalette()[:63] == palette().ravel()[:63].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("change, message", [
    (["--split", "tst"], "the folder has test"), (["--crf", "weclipp"], "Did you mean 'weclip'"), (["--scales", "1.0,1.0"], "each scale once"),
    (["--data", "nowhere"], "nowhere"),
    pytest.param(["--device", "cuda"], "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"))])
def test_what_cannot_be_evaluated_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str) -> None:
    assert message in says(capsys, ["evaluate", str(run), "--out", str(tmp_path), *change], 2)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no checkpoint" in says(capsys, ["evaluate", str(tmp_path), "--data", str(tmp_path)], 2)
    assert "no scenes of its own" in says(capsys, ["evaluate", str(tmp_path)], 2)


@pytest.mark.slow
def test_a_checkpoint_for_other_classes_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "two"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("a\n")
    Image.new("RGB", (64, 64)).save(folder / "JPEGImages" / "a.jpg")
    Image.new("P", (64, 64)).save(folder / "SegmentationClass" / "a.png")
    assert "cat" in says(capsys, ["evaluate", str(run), "--data", str(folder), "--out", str(tmp_path / "report")], 2)


# ---- zero-shot systems ----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_zero_shot_training_reports_seen_and_unseen_and_is_evaluated_on_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sptseg"
    assert main(["train", "sptseg", "--device", "cpu", "--out", str(out), *FEW]) == 0
    told = json.loads((out / "metrics.json").read_text())["report"]["zero_shot"]
    assert set(told) >= {"pixel_accuracy", "miou_seen", "miou_unseen", "hiou", "curve", "confused"} and len(told["unseen"]) == 5
    assert "Seen and unseen classes" in (out / "report.html").read_text() and "(unseen)" in (out / "report.md").read_text()
    (out / "world" / "classes.txt").write_text((out / "world" / "classes.txt").read_text().replace("ring", "sand"))   # a class that training did not have
    (out / "world" / "labels.txt").unlink()
    assert main(["evaluate", str(out), "--limit", "4", "--workers", "0", "--device", "cpu", "--save-masks", str(tmp_path / "masks")]) == 0
    other = json.loads((out / "evaluation-test" / "report.json").read_text())
    assert "sand" in other["zero_shot"]["unseen"] and other["names"][0] == "sand" and len(list((tmp_path / "masks").iterdir())) == 4
    assert main(["evaluate", str(out), "--limit", "3", "--workers", "0", "--device", "cpu", "--corrupt", "noise", "--out", str(tmp_path / "worse")]) == 0
    assert "noise" in (tmp_path / "worse" / "robustness.md").read_text()


def test_a_protocol_is_where_the_options_of_inference_start_from() -> None:
    from dataclasses import replace
    from freqseg.faces.cli import build_parser
    from freqseg.work.inference import INFERENCE
    from freqseg.faces.segment_cli import shown_as
    args = build_parser().parse_args(["evaluate", "run", "--protocol", "zegclip", "--flip", "--batch", "2"])
    assert shown_as(args, None) == replace(INFERENCE["zegclip"], flip=True, batch=2)
    args.protocol = "zegklip"
    with pytest.raises(InputError, match="Did you mean 'zegclip'"): shown_as(args, None)


@pytest.mark.parametrize("words", [["dfa", "--model", "dfa"], ["--model", "dfa", "--model", "dfa"]], ids=["place", "option"])
def test_a_model_is_named_once(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit): main(["evaluate", *words])
    assert "argument --model: named twice" in capsys.readouterr().err or "argument MODEL: named twice" in capsys.readouterr().err


def test_masks_are_never_written_over_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freqseg.work.checkpoints.load_system", lambda *_, **__: pytest.fail("the system was opened"))
    folder = draw_scenes(tmp_path / "world", (1, 1, 1))
    for name in ("SegmentationClass", "JPEGImages"):
        assert "would be written over" in says(capsys, ["evaluate", "--model", "weclip", "--data", str(folder), "--save-masks", str(folder / name)], 2)


def test_a_report_on_other_data_is_not_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (draw_scenes(tmp_path / name, (1, 1, 1)) for name in "ab")
    words = ["evaluate", "weclip", "--workers", "0", "--device", "cpu", "--no-flip", "--out", str(tmp_path / "out")]
    assert main([*words, "--data", str(a)]) == 0 and main([*words, "--data", str(a), "--limit", "1"]) == 0
    assert "another dataset (the embedded world, folder a)" in says(capsys, [*words, "--data", str(b)], 2)
    assert main([*words, "--data", str(b), "--overwrite"]) == 0
