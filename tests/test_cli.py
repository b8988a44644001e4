"""The command line end to end: what each command makes, and that it says so."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import freqseg
from freqseg.faces.cli import build_parser, cam_prompts, fitted_size, main
from freqseg.faces.terminal import class_list, interruptible, named_classes, output_names, picture_files
from freqseg.clip import Backbone, load_clip
from freqseg.pictures import read_mask
from freqseg.affinity import SOURCES
from freqseg.maps import METHODS, CamSettings
from freqseg.work.training_free import segment_with_map, usual_showing
from freqseg.lists import VOC_CLASSES
from freqseg.world.scenes import WORLD_CLASSES, World

FEW = "gradcam,high,dual,transport"
WORLD = ["--model", "world", "--device", "cpu"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A small world on disk, written by the command."
    folder = tmp_path_factory.mktemp("cli") / "scenes"
    assert main(["world", "--out", str(folder), "--train", "4", "--val", "4", "--test", "5", "--size", "112", "--seed", "3"]) == 0
    return folder


def arrays(path: Path) -> dict[str, np.ndarray]:
    "The maps of an .npz, without the names and scores."
    stored = np.load(path)
    return {name: stored[name] for name in stored.files if name not in ("classes", "scores")}


# ---- help -----------------------------------------------------------------------------------------------------------

def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"freqseg {freqseg.__version__}\n"


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    program = "import sys; from freqseg.faces.cli import main\ntry: main(['--help'])\nfinally: print(sorted({n.split('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0
    assert all(f"\n    {command} " in done.stdout for command in ("demo", "cam", "seeds", "cost", "check", "world", "run"))
    loaded = done.stdout.splitlines()[-1]
    assert not [heavy for heavy in ("torch", "numpy", "PIL", "matplotlib", "papermill", "scipy", "tqdm") if f"'{heavy}'" in loaded]


def test_the_installed_command_is_this_command() -> None:
    command = Path(sys.executable).with_name("freqseg")
    if not command.exists():
        pytest.skip("freqseg is imported from the source folder, not installed")
    done = subprocess.run([command, "--version"], text=True, capture_output=True, timeout=120)
    assert done.stdout == f"freqseg {freqseg.__version__}\n"


@pytest.mark.parametrize("command", ["demo", "cam", "seeds", "train", "sweep", "evaluate", "segment", "cost", "check", "world", "run"])
def test_every_command_explains_itself_with_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert f"usage: freqseg {command}" in text and len(text.splitlines()) > 6 and "Parameters" not in text


# ---- one word for one thing -----------------------------------------------------------------------------------------

def parse(words: list[str]) -> argparse.Namespace:
    "What the parser makes of a command."
    return build_parser().parse_args(words)


def test_an_option_of_several_commands_is_the_same_on_each() -> None:
    commands = next(iter(parse(["check", "x"]) and build_parser()._subparsers._group_actions)).choices
    meanings: dict[str, set] = {}
    for command in commands.values():
        for name, action in command.options.items(): meanings.setdefault(name, set()).add((action.dest, action.type, action.metavar, str(action.choices)))
    assert len(commands) == 13 and {"--model", "--methods", "--data", "--classes", "--out", "--side"} <= meanings.keys()
    assert {name for name, kinds in meanings.items() if len(kinds) > 1} == {"--out", "--method", "--methods"}   # --out PATH may be a file; segment takes one map


OLD_SPELLINGS = [
    (["segment", "a.png", "--checkpoint", "dfa"], "--model", "dfa"), (["cam", "a.png", "--classes", "a", "--size", "64"], "--side", 64),
    (["seeds", "world", "--size", "64"], "--side", 64), (["seeds", "world", "--tune-split", "val"], "--threshold-split", "val"),
    (["cost", "--json", "c.json"], "--out", "c.json")]


@pytest.mark.parametrize(("words", "today", "value"), OLD_SPELLINGS, ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "")
def test_an_old_spelling_works_and_says_what_it_is_called_now(words: list[str], today: str, value: object, capsys: pytest.CaptureFixture[str]) -> None:
    args = parse(words)
    assert getattr(args, today[2:].replace("-", "_")) == value
    assert capsys.readouterr().err == f"freqseg: {words[-2]} is now called {today}.\n"
    assert vars(parse([*words[:-2], today, words[-1]])) == vars(args) and not capsys.readouterr().err


@pytest.mark.parametrize("words", [["seeds", "world"], ["cam", "a.png", "--classes", "a"]])
def test_method_and_methods_are_one_option(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert parse([*words, "--method", "low"]) == parse([*words, "--methods", "low"]) and not capsys.readouterr().err


@pytest.mark.parametrize("words", [["seeds", "scenes"], ["check", "scenes"], ["evaluate", "dfa"]])
def test_what_stands_alone_may_have_its_option(words: list[str]) -> None:
    option = "--model" if words[0] == "evaluate" else "--data"
    assert parse(words) == parse([words[0], option, words[1]])


@pytest.mark.parametrize(("words", "usage", "message"), [
    ("trian dfa", "freqseg", "unknown command 'trian'; did you mean 'train'?"),
    ("cam x.png --clases dog", "freqseg cam", "there is no --clases here; did you mean --classes?"),
    ("cam x.png --classes dog --grid mu=1,2", "freqseg cam", "there is no --grid here; --grid NAME=A,B,... is an option of freqseg sweep"),
    ("cost --side 3", "freqseg cost", "did you mean --size? --side PIXELS is an option of freqseg cam, freqseg seeds, freqseg evaluate, freqseg segment"),
    ("seeds world --device cdua", "freqseg seeds", "did you mean 'cuda'?"),
    ("evaluate dfa --precision bf61", "freqseg evaluate", "did you mean 'bf16'?"),
    ("--verison", "freqseg", "did you mean --version?"),
    ("check x y", "freqseg check", "unrecognized arguments: y"),
    ("train --preset smoke", "freqseg train", "the following arguments are required: SYSTEM")])
def test_a_typing_error_gets_the_nearest_name_and_the_usage_of_its_command(words: str, usage: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught: main(words.split())
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith(f"usage: {usage} [-h]") and said.rstrip().endswith(message)


@pytest.mark.parametrize(("words", "message"), [
    ("cost dfaa", "Did you mean 'dfa'?"), ("seeds world --methods gradcan", "Did you mean 'gradcam'?"), ("world --out w --difficulty hrad", "Did you mean 'hard'?"),
    ("lab compare_sistems", "Did you mean 'compare_systems'?"),
    ("evaluate weclip --data {scenes} --split test --crf wclip", "Did you mean 'weclip'?"), ("evaluate weclip --data {scenes} --split tst", "the folder has test"),
    ("evaluate weclip --data {scenes} --split test --corrupt nose", "Did you mean 'noise'?"), ("segment {scenes}/JPEGImages --model wecilp", "there is no wecilp"),
    ("segment {scenes}/JPEGImages", "name a trained system with --model"), ("evaluate", "name a trained system with --model"), ("check", "name the data set's folder"),
    ("seeds", "name the data set"), ("check {scenes} --fix-list {scenes}", "it is a folder"), ("world --measure {scenes}", "it is a folder")])
def test_a_wrong_value_gets_the_nearest_one(words: str, message: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.format(scenes=scenes).split()) == 2
    assert message in capsys.readouterr().err


def test_letters_that_the_terminal_lacks_stop_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "from freqseg.faces.cli import main; raise SystemExit(main())", "world", "--out", str(tmp_path / "猫"), "--train", "0", "--val", "0", "--test", "1",
                           "--size", "64"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=120)
    assert done.returncode == 0 and b"\\u732b" in done.stdout


@pytest.mark.parametrize(("text", "names", "said"), [
    ("VOC", list(VOC_CLASSES), ""), ("world", list(WORLD_CLASSES), ""), ("voc,", ["voc"], ""), ("voc, dog", ["voc", "dog"], ""), ("dog", ["dog"], ""),
    ("vocc", ["vocc"], "freqseg: vocc is taken as the name of one class; the list is called voc.\n")])
def test_a_list_of_classes_has_a_name_on_every_command(text: str, names: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named_classes(text) == names and capsys.readouterr().err == said


# ---- names and sizes ------------------------------------------------------------------------------------------------

@given(st.lists(st.text("abc ", min_size=1).filter(str.strip), min_size=1, unique_by=lambda name: " ".join(name.split())))
def test_class_names_survive_spaces_and_order(names: list[str]) -> None:
    assert class_list(" ,".join(names)) == [" ".join(name.split()) for name in names]


@given(st.lists(st.sampled_from(["a.png", "b/a.png", "c/a.jpg", "a_2.png", "d/a_2.gif", "e.png"]), unique=True))
def test_output_names_are_different(files: list[str]) -> None:
    names = output_names([Path(file) for file in files])
    assert len(set(names)) == len(files)


@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([8, 14, 16, 32]))
def test_a_fitted_size_is_whole_patches_of_about_the_picture_s_shape(width: int, height: int, patch: int) -> None:
    high, wide = fitted_size((width, height), 448, patch)
    assert high % patch == 0 and wide % patch == 0 and max(high, wide) == round(448 / patch) * patch
    assert abs(high - max(patch, height * 448 / max(width, height))) <= patch / 2 + 1
    assert abs(wide - max(patch, width * 448 / max(width, height))) <= patch / 2 + 1


def test_files_folders_and_patterns_name_each_picture_once(scenes: Path) -> None:
    folder = scenes / "JPEGImages"
    found = picture_files([str(folder / "test_000001.png"), str(folder), str(folder / "val_*.png")])
    assert len(found) == 13 and found[0].name == "test_000001.png"


def test_work_in_the_background_gives_its_result_and_its_error() -> None:
    assert interruptible(lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 / 0)


# ---- cam ------------------------------------------------------------------------------------------------------------

def test_cam_makes_a_picture_and_arrays_of_every_map(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = scenes / "JPEGImages" / "test_000000.png"
    assert main(["cam", str(picture), "--classes", "fish, star", *WORLD, "--out", str(tmp_path)]) == 0
    assert f"1 picture, {len(METHODS)} maps each: {tmp_path / 'test_000000.png'} (to look at), {tmp_path / 'test_000000.npz'} (arrays)\n" == capsys.readouterr().out
    maps = arrays(tmp_path / "test_000000.npz")
    assert set(maps) == set(METHODS)
    assert all(cam.shape == (2, 28, 28) and cam.min() >= 0 and cam.max() <= 1 + 1e-5 for cam in maps.values())
    with Image.open(tmp_path / "test_000000.png") as panel:
        assert panel.width > 100 * len(METHODS)


@pytest.mark.parametrize("model", ["dfa", "sptseg"])
def test_cam_of_a_trained_system_shows_its_own_map_beside_those_of_its_clip(model: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cam", str(scenes / "JPEGImages" / "test_000000.png"), "--classes", "fish, star", "--device", "cpu", "--side", "112"]
    assert main([*words, "--model", model, "--methods", "gradcam,trained", "--out", str(tmp_path / "own")]) == 0
    assert main([*words, "--model", "world", "--methods", "gradcam", "--out", str(tmp_path / "clip")]) == 0
    own, clip = (arrays(tmp_path / folder / "test_000000.npz") for folder in ("own", "clip"))
    np.testing.assert_allclose(own["gradcam"], clip["gradcam"], atol=1e-5)
    assert own["trained"].shape == (2, 14, 14) and 0 <= own["trained"].min() < own["trained"].max() <= 1
    assert main([*words, "--model", "world", "--methods", "trained", "--out", str(tmp_path)]) == 2
    assert "unknown map 'trained'" in capsys.readouterr().err


def test_a_link_that_leads_nowhere_is_one_bad_picture(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(scenes / "JPEGImages" / "test_000000.png", tmp_path / "good.png")
    (tmp_path / "bad.png").symlink_to(tmp_path / "nowhere.png")
    for command in (["cam", "--classes", "fish", "--methods", "gradcam", *WORLD, "--side", "112"], ["segment", "--model", "weclip", "--device", "cpu", "--no-flip"]):
        assert main([command[0], str(tmp_path), *command[1:], "--out", str(tmp_path / command[0])]) == 2
        said = capsys.readouterr()
        assert "bad.png" in said.err and str(tmp_path / command[0] / "good.png") in said.out


@pytest.mark.slow
def test_cam_gives_a_picture_in_a_batch_the_maps_that_it_gets_alone(scenes: Path, tmp_path: Path) -> None:
    options = ["--classes", "key, moon, comb", *WORLD, "--side", "112"]
    assert main(["cam", str(scenes / "JPEGImages" / "test_*.png"), *options, "--methods", FEW, "--batch", "3", "--out", str(tmp_path / "many")]) == 0
    assert main(["cam", str(scenes / "JPEGImages" / "test_000003.png"), *options, "--methods", FEW, "--out", str(tmp_path / "one")]) == 0
    assert len(list((tmp_path / "many").glob("*.npz"))) == 5
    many, one = (arrays(tmp_path / folder / "test_000003.npz") for folder in ("many", "one"))
    for name in one:
        np.testing.assert_allclose(many[name], one[name], atol=2e-3)


def test_cam_takes_pictures_of_different_shapes_together(scenes: Path, tmp_path: Path) -> None:
    for name, size in (("wide", (200, 100)), ("tall", (100, 200)), ("square", (100, 100)), ("wide2", (400, 200))):
        Image.open(scenes / "JPEGImages" / "val_000000.png").resize(size).save(tmp_path / f"{name}.jpg")
    assert main(["cam", str(tmp_path), "--classes", "fish", "--methods", "gradcam", *WORLD, "--side", "112", "--out", str(tmp_path / "out")]) == 0
    shapes = {path.stem: np.load(path)["gradcam"].shape for path in (tmp_path / "out").glob("*.npz")}
    assert shapes == {"wide": (1, 7, 14), "wide2": (1, 7, 14), "tall": (1, 14, 7), "square": (1, 14, 14)}


def test_the_cut_off_moves_the_bands_and_nothing_else(scenes: Path, tmp_path: Path) -> None:
    for mu in ("0.1", "0.3"):
        assert main(["cam", str(scenes / "JPEGImages" / "val_000001.png"), "--classes", "house", *WORLD, "--mu", mu, "--out", str(tmp_path / mu)]) == 0
    a, b = (arrays(tmp_path / mu / "val_000001.npz") for mu in ("0.1", "0.3"))
    assert {name for name in a if np.abs(a[name] - b[name]).max() > 1e-4} == {name for name in METHODS if "low" in name or "high" in name}


@pytest.mark.slow
def test_scores_tell_classes_that_are_there_from_others(tmp_path: Path) -> None:
    world = World(0, "test", 112)
    for index in range(8):
        Image.fromarray(world[index].image).save(tmp_path / f"{index}.png")
    words = ["cam", str(tmp_path), "--classes", ",".join(WORLD_CLASSES), "--methods", "patch_text", *WORLD, "--side", "112", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    there, absent = [], []
    for index in range(8):
        for name, score in zip(WORLD_CLASSES, np.load(tmp_path / "out" / f"{index}.npz")["scores"], strict=True):
            (there if name in world[index].classes else absent).append(score)
    assert np.mean(there) > 4 * np.mean(absent)


def test_the_tower_looks_once_at_a_picture(scenes: Path, tmp_path: Path, monkeypatch) -> None:
    looks, encode = [], Backbone.encode
    def counted(self, images, **options):
        looks.append(encode(self, images, **options))
        return looks[-1]
    monkeypatch.setattr(Backbone, "encode", counted)
    picture = str(scenes / "JPEGImages" / "val_000001.png")
    assert main(["cam", picture, "--classes", "house, star", "--methods", "all", *WORLD, "--out", str(tmp_path)]) == 0
    seen, = looks
    prompts = torch.cat(cam_prompts(load_clip("world"), ["house", "star"]))
    cosines = torch.nn.functional.normalize(seen.cls_embedding, dim=-1) @ prompts.T
    expected = (load_clip("world").logit_scale * cosines).softmax(-1)[0, :2]
    np.testing.assert_allclose(np.load(tmp_path / "val_000001.npz")["scores"], expected, atol=1e-6)


@pytest.mark.slow
def test_cam_of_a_photograph_with_random_weights(real_data: Path, tmp_path: Path) -> None:
    photo = sorted((real_data / "voc12_mini" / "JPEGImages").glob("*.jpg"))[0]
    words = ["cam", str(photo), "--classes", "person, dog, traffic light", "--model", "ViT-B-32", "--pretrained", "none", "--device", "cpu", "--out", str(tmp_path)]
    assert main(words) == 0
    maps = arrays(tmp_path / f"{photo.stem}.npz")
    assert set(maps) == set(METHODS)
    assert all(cam.shape[0] == 3 and max(cam.shape[1:]) == 14 and np.isfinite(cam).all() for cam in maps.values())


# ---- world, check, run ----------------------------------------------------------------------------------------------

def test_the_world_on_disk_is_the_world_in_memory(scenes: Path) -> None:
    scene = World(3, "test", 112)[2]
    assert (np.array(Image.open(scenes / "JPEGImages" / "test_000002.png")) == scene.image).all()
    assert (read_mask(scenes / "SegmentationClass" / "test_000002.png", 21) == scene.mask).all()


def test_a_split_without_scenes_has_no_list_and_the_folder_is_still_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["world", "--out", str(tmp_path / "w"), "--train", "0", "--val", "1", "--test", "2", "--size", "64"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w"]
    assert main(["check", str(tmp_path / "w")]) == 0
    assert "test 2, val 1" in capsys.readouterr().out


def test_check_finds_a_written_world_whole(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(scenes)]) == 0
    assert "13 pictures and 13 masks" in capsys.readouterr().out


def test_check_of_real_photographs(real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(real_data / "voc12_mini")]) == 0
    assert "(voc)" in capsys.readouterr().out


def test_run_lists_parameters_and_runs_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [nbformat.v4.new_code_cell("mu = 0.1  # the cut-off", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("print(mu * 2)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}),
                   tmp_path / "n.ipynb")
    assert main(["run", str(tmp_path / "n.ipynb")]) == 0
    assert capsys.readouterr().out == "mu = 0.1  # the cut-off\n"
    assert main(["run", str(tmp_path / "n.ipynb"), "--out", str(tmp_path / "out"), "-p", "mu=0.25"]) == 0
    assert "0.5" in json.dumps(json.loads((tmp_path / "out" / "n.ipynb").read_text())["cells"][-1]["outputs"])
    assert main(["run", str(tmp_path / "n.ipynb"), "--out", str(tmp_path / "out"), "-p", "nu=0.25"]) == 2
    assert "Did you mean 'mu'?" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "n.ipynb"), "--out", str(tmp_path / "out"), "-p", "mu"]) == 2
    assert "-p mu: give a name and a value" in capsys.readouterr().err


# ---- seeds and demo -------------------------------------------------------------------------------------------------

def test_seeds_print_a_table_and_write_it_as_markdown_json_and_chart(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["seeds", str(scenes), "--split", "test", "--threshold-split", "val", "--methods", "gradcam,smoothed", *WORLD, "--side", "112", "--out", str(tmp_path)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "gradcam" in printed and "smoothed" in printed
    assert sorted({path.suffix for path in tmp_path.iterdir()}) == [".json", ".md", ".png"]
    assert "gradcam" in next(tmp_path.glob("*.md")).read_text() and json.loads(next(tmp_path.glob("*.json")).read_text())


def test_seeds_of_something_else_are_not_replaced_unasked(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["seeds", str(scenes), "--split", "test", "--methods", "gradcam", *WORLD, "--side", "112", "--limit", "2"]
    assert main(words) == 0 and main(words) == 0   # the same command may make its own result again
    assert [path.as_posix() for path in Path("runs").rglob("*.json")] == ["runs/seeds/scenes-test-world-CLIP/seeds.json"]
    before = Path("runs/seeds/scenes-test-world-CLIP/seeds.json").read_bytes()
    assert main([*words, "--mu", "0.2"]) == 2
    said = capsys.readouterr().err
    assert "is the result of another command" in said and "--limit 2)" in said and "--overwrite" in said
    assert Path("runs/seeds/scenes-test-world-CLIP/seeds.json").read_bytes() == before
    assert main([*words, "--mu", "0.2", "--overwrite"]) == 0


@pytest.mark.slow
def test_seeds_of_the_world_draw_their_own_scenes_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["seeds", "world", "--methods", "gradcam", *WORLD, "--side", "112", "--limit", "3", "--out", str(tmp_path)]
    assert main(words) == 0
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "world").rglob("*.png")}
    assert len(first) == 12
    assert main(words) == 0
    assert first == {path: path.stat().st_mtime_ns for path in (tmp_path / "world").rglob("*.png")}


@pytest.mark.slow
def test_the_demo_makes_everything_that_it_announces(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("freqseg.faces.cli.DEMO", dict(preset="smoke", scenes=(16, 8, 8), iterations=6))
    assert main(["demo", "--scenes", "6"]) == 0
    announced = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  demo/")]
    assert len(announced) >= 5
    assert all((tmp_path / name).exists() for name in announced)


def test_world_measures_instead_of_drawing_when_asked(tmp_path, monkeypatch, capsys):
    from freqseg.world import report as world_report
    from freqseg.files import shipped
    known = json.loads(shipped("world_report.json").read_text())
    monkeypatch.setattr(world_report, "measure_world", lambda backbone, seed: {**known, "seed": seed})
    assert main(["world", "--measure", str(tmp_path/"r.json"), "--seed", "3"]) == 0
    assert json.loads((tmp_path/"r.json").read_text())["seed"] == 3
    assert "same-class AUC" in capsys.readouterr().out


def test_world_either_draws_or_measures(tmp_path, capsys):
    with pytest.raises(SystemExit): main(["world", "--out", str(tmp_path/"w"), "--measure", str(tmp_path/"r.json")])
    assert "not allowed with" in capsys.readouterr().err


# ---- files of one's own ---------------------------------------------------------------------------------------------

MINE = '''
from torch.nn.functional import softmax
from freqseg.affinity import register_source
from freqseg.maps import register_map
from freqseg.systems.weclip import WeCLIP

@register_map("again", "GradCAM, under another name", needs=("evidence",))
def again(parts): return parts.evidence

@register_source("even", "everybody with everybody", needs=("tokens",))
def even(features, block):
    tokens = features.of(features.tokens, block, "tokens").flatten(2)
    return softmax(0 * tokens.mT @ tokens, -1)

class Mine(WeCLIP):
    "WeCLIP, under another name."
'''


@pytest.fixture
def plugin(tmp_path: Path, own_registry: None) -> Iterator[Path]:
    "A file with a map, a relation and a system, which is forgotten after the test."
    (tmp_path / "mine.py").write_text(MINE)
    yield tmp_path / "mine.py"
    for registry, name in ((METHODS, "again"), (SOURCES, "even")): registry._entries.pop(name, None)


def test_maps_and_relations_of_my_own_have_their_names_on_every_command(plugin: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, out = str(scenes / "JPEGImages" / "test_000000.png"), str(tmp_path / "out")
    cam = ["cam", picture, "--classes", "fish, star", *WORLD, "--side", "112", "--out", out]
    assert main([*cam, "--methods", "again"]) == 2 and "unknown map 'again'" in capsys.readouterr().err
    assert main([*cam, "--methods", "smoothed", "-p", "source=even"]) == 2 and "even" in capsys.readouterr().err
    mine = ["--plugin", str(plugin)]
    assert main([*cam, *mine, "--methods", "gradcam,again,smoothed", "-p", "source=even", "-p", "walk_steps=1", "-p", "box=none"]) == 0
    maps = arrays(Path(out) / "test_000000.npz")
    assert (maps["again"] == maps["gradcam"]).all() and np.ptp(maps["smoothed"], axis=(1, 2)).max() < 1e-3   # everybody gives everybody the same
    assert main(["seeds", str(scenes), "--split", "test", "--methods", "again", *mine, *WORLD, "--side", "112", "--out", out]) == 0
    assert json.loads((tmp_path / "out" / "seeds.json").read_text())["rows"][0]["method"] == "again"
    assert main(["segment", picture, "--method", "again", "--classes", "fish, star", "--model", "world", *mine, "--device", "cpu", "--out", out]) == 0
    with pytest.raises(SystemExit): main(["cam", *mine, "--names"])
    assert "again              GradCAM, under another name" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["nowhere.py", "mine.txt"])
def test_a_plugin_that_is_none_is_said(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "--plugin", str(tmp_path / wrong)]) == 2 and f"{wrong}: there is no such Python file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_system_of_my_own_is_trained_and_used_by_every_command(plugin: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, mine, world = str(tmp_path / "run"), ["--plugin", str(plugin)], ["--model", "world", "--device", "cpu", "--size", "64", "--repeats", "1"]
    assert main(["cost", f"{plugin}:Mine", *world]) == 0 and main(["cost", "mine", *mine, *world]) == 0
    assert main(["train", "mine", *mine, "-p", "iterations=2", "-p", "warmup=0", "-p", "source=even", "--device", "cpu", "--out", run]) == 0   # in a kernel of its own
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["options"]["source"] == "even"
    picture = str(scenes / "JPEGImages" / "test_000000.png")
    use = ["--model", run, "--device", "cpu", *mine]
    assert main(["evaluate", *use, "--limit", "2", "--workers", "0"]) == 0
    assert main(["segment", picture, *use, "--out", str(tmp_path / "masks")]) == 0
    assert main(["cam", picture, "--classes", "fish", *use, "--methods", "trained", "--side", "112", "--out", str(tmp_path / "cams")]) == 0
    assert main(["cost", *use, "--size", "64", "--repeats", "1"]) == 0
    assert main(["seeds", str(scenes), "--split", "test", "--methods", "gradcam", *use, "--side", "112", "--limit", "2", "--out", str(tmp_path / "seeds")]) == 0


# ---- without training -----------------------------------------------------------------------------------------------

def test_a_map_segments_for_any_names_without_a_checkpoint(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = scenes / "JPEGImages" / "test_000000.png"
    words = ["segment", str(picture), "--method", "smoothed", "--model", "world", "--device", "cpu", "--side", "128", "--out", str(tmp_path)]
    names = [*World(3, "test", 112)[0].classes, "fish"]
    assert main([*words, "--classes", ", ".join(names)]) == 0
    with Image.open(picture) as image:
        expected = segment_with_map(load_clip("world"), image, names, "smoothed", inference=replace(usual_showing(load_clip("world")), side=128),
                                    settings=CamSettings(mu=0.12)).labels
    mask = np.asarray(Image.open(tmp_path / "test_000000.png"))
    assert (mask == expected).all()
    assert len(np.unique(mask)) > 1
    cosines = [*words, "--classes", ", ".join(names), "--background", "none"]
    cosines[cosines.index("smoothed")] = "patch_text"
    assert main(cosines) == 0
    assert 0 not in np.asarray(Image.open(tmp_path / "test_000000.png"))   # nothing else may be there
    assert main(words) == 2 and "give them with --classes" in capsys.readouterr().err
    assert main([*words, "--classes", "fish", "-p", "walk_stepz=3"]) == 2 and "Did you mean 'walk_steps'?" in capsys.readouterr().err
    words[words.index("smoothed")] = "smothed"
    assert main([*words, "--classes", "fish"]) == 2 and "Did you mean 'smoothed'?" in capsys.readouterr().err


def test_a_map_answers_to_its_older_name_with_a_notice(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cam", str(scenes / "JPEGImages" / "test_000000.png"), "--classes", "fish", *WORLD, "--side", "112", "--out", str(tmp_path)]
    assert main([*words, "--methods", "inverse"]) == 0
    assert capsys.readouterr().err == "freqseg: the map inverse is now called dual.\n" and set(arrays(tmp_path / "test_000000.npz")) == {"dual"}


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "freqseg", "trian"], text=True, capture_output=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("usage: freqseg [-h]") and "did you mean 'train'?" in done.stderr
