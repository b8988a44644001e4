"""A system from a file of the user's: the registry that it enters, its presets, its training, and the checkpoint that never runs it."""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from PIL import Image

from freqseg import plugins
from freqseg.clip import Backbone, load_clip
from freqseg.faces.explorer import open_model
from freqseg.files import InputError, sha256
from freqseg.plugins import load_plugin
from freqseg.systems import segmenter as room
from freqseg.systems.segmenter import Segmenter, System, known_systems, system_named
from freqseg.systems.weclip import WeCLIP
from freqseg.work.checkpoints import Checkpoint, load_system, read_checkpoint, save_system, write_checkpoint
from freqseg.work.cost import measure_costs
from freqseg.work.experiments import BASES, experiment, parameters_cell, plan, presets_of, training_notebook
from freqseg.work.evaluation import evaluate_system
from freqseg.work.inference import segment_picture
from freqseg.work.runs import notebook_parameters, run_notebook
from freqseg.work.sweep_design import new_design, run_plans, trained_system
from freqseg.work.sweeps import sweep
from freqseg.world.scenes import WORLD_CLASSES, World

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs" / "guide" / "own_system.md"
CODE = re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
SMALL = dict(scenes=[4, 2, 2], iterations=3, save_every=2, par_iterations=2, device="cpu")
MINE = """from freqseg.systems.segmenter import Segmenter
class Mine(Segmenter):
    "Declares nothing."
"""


pytestmark = pytest.mark.usefixtures("own_registry")


@pytest.fixture
def world() -> Backbone:
    return load_clip("world")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A working folder with my_system.py, the file of the guide's page, and mine.py."
    (tmp_path / "my_system.py").write_text(CODE)
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the registry ---------------------------------------------------------------------------------------------------

def test_the_systems_of_the_package_are_the_classes_in_its_folder() -> None:
    modules = [importlib.import_module(f"freqseg.systems.{path.stem}") for path in (ROOT / "freqseg" / "systems").glob("[!_]*.py")]
    defined = [kind for module in modules for kind in vars(module).values()
               if isinstance(kind, type) and issubclass(kind, System) and kind.__module__ == module.__name__]
    text = "\n".join(path.read_text() for path in (ROOT / "freqseg" / "systems").glob("*.py"))
    abstract = {"System", *re.findall(r"^class (\w+)\([^)]*abstract=True\)", text, re.MULTILINE)}
    concrete = sorted(kind.__name__.lower() for kind in defined if kind.__name__ not in abstract)
    assert known_systems() == concrete and len(concrete) >= 6
    assert all(system_named(name).name == name and issubclass(system_named(name), System) for name in known_systems())


def test_a_fresh_process_finds_them_without_importing_one() -> None:
    said = subprocess.run([sys.executable, "-c", "from freqseg.systems.segmenter import *; print(*known_systems())"], text=True, capture_output=True)
    assert said.stdout.split() == known_systems()


def test_a_class_is_known_by_its_name_in_lower_case_or_the_one_it_says() -> None:
    class Newcomer(WeCLIP): "Has no name."
    class Other(Segmenter): name = "another"
    assert system_named("newcomer") is Newcomer and Newcomer.name == "newcomer" and system_named("another") is Other


def test_a_base_is_no_system_and_what_derives_from_it_is() -> None:
    class Base(Segmenter, abstract=True): "No system."
    class Made(Base): "A system."
    assert "base" not in known_systems() and "segmenter" not in known_systems() and "system" not in known_systems() and system_named("made") is Made


def test_a_system_of_a_file_is_named_by_file_and_class(here: Path) -> None:
    kind = system_named("mine.py:Mine")
    assert kind.name == "mine" and kind is system_named(f"{here}/mine.py:Mine") is system_named("mine") and "mine" in known_systems()
    with pytest.raises(InputError, match="defines no System called 'Nine'. It defines: Mine"): system_named("mine.py:Nine")
    with pytest.raises(InputError, match="no such Python file"): system_named("nine.py:Mine")
    with pytest.raises(InputError, match="which class"): system_named("mine.py")


def test_a_base_in_a_file_is_refused_as_a_system(here: Path) -> None:
    (here / "mine.py").write_text(MINE.replace("(Segmenter)", "(Segmenter, abstract=True)"))
    with pytest.raises(InputError, match="mine.py:Mine is a base of systems"): system_named("mine.py:Mine")


def test_two_systems_of_one_name_are_refused_and_both_places_named(here: Path) -> None:
    first = system_named("mine.py:Mine")
    (here / "other.py").write_text(MINE)
    with pytest.raises(InputError, match=r"two systems are called 'mine': Mine of .*/mine.py and Mine of .*/other.py. Give one of them a name"):
        system_named("other.py:Mine")
    assert system_named("mine") is first
    (here / "other.py").write_text(MINE.replace("Mine", "DFA"))
    with pytest.raises(InputError, match=r"two systems are called 'dfa': DFA of .*systems/dfa.py and DFA of .*/other.py"): system_named("other.py:DFA")
    (here / "other.py").write_text(MINE + MINE.replace("Mine", "Twin").replace('"Declares nothing."', 'name = "mine"'))
    with pytest.raises(InputError, match="two systems are called 'mine'"): system_named("other.py:Twin")


def test_a_file_that_was_edited_replaces_its_own_class(here: Path) -> None:
    first = system_named("mine.py:Mine")
    (here / "mine.py").write_text(MINE + "    levels = 7\n")
    second = system_named("mine.py:Mine")
    assert second is not first and second.levels == 7 and system_named("mine") is second
    (here / "mine.py").write_text(MINE.replace("Mine", "Renamed").replace('"Declares nothing."', 'name = "mine"'))
    assert system_named("mine.py:Renamed") is system_named("mine")


def test_a_file_that_failed_leaves_no_system_and_can_be_mended(here: Path) -> None:
    (here / "mine.py").write_text(MINE + "1/0\n")
    with pytest.raises(InputError, match="mine.py, line 4: ZeroDivisionError"): system_named("mine.py:Mine")
    assert "mine" not in known_systems()
    (here / "mine.py").write_text(MINE)
    assert system_named("mine.py:Mine") is system_named("mine")


def test_a_session_may_define_a_system_again_and_work_on_a_copy_of_one_that_ships() -> None:
    for _ in range(2): again = type("WeCLIP", (Segmenter,), {"__module__": "__main__"})
    assert system_named("weclip") is again
    with pytest.raises(InputError, match="DFA of .* and Mine of"): type("Mine", (Segmenter,), {"__module__": "__main__", "name": "dfa"})


# ---- presets --------------------------------------------------------------------------------------------------------

def test_a_system_that_declares_nothing_has_world_and_smoke_as_they_are(here: Path) -> None:
    assert presets_of("mine.py:Mine") == {name: BASES[name] for name in ("world", "smoke")}
    with pytest.raises(InputError, match="unknown preset 'voc'"): plan("mine.py:Mine", dict(preset="voc"))


def test_presets_lie_over_the_general_ones_and_over_those_of_parents() -> None:
    class Derived(WeCLIP): presets = {"coco": dict(lr=.5, crop=64), "smoke": dict(dim=8)}
    mine, theirs = presets_of("derived"), presets_of("weclip")
    assert mine["voc"] == theirs["voc"] and mine["world"] == theirs["world"]
    assert mine["coco"] == replace(theirs["coco"], crop=64, settings=replace(theirs["coco"].settings, lr=.5))
    assert mine["smoke"].options == theirs["smoke"].options | dict(dim=8)


def test_a_declaration_that_cannot_be_is_named() -> None:
    class Wrong(Segmenter): presets = {"vocc": {}}
    class Strange(Segmenter): presets = {"smoke": dict(learning_rate=1.)}
    with pytest.raises(InputError, match="unknown preset, declared by wrong, 'vocc'. Did you mean 'voc'"): presets_of("wrong")
    with pytest.raises(InputError, match="unknown parameter of strange 'learning_rate'"): presets_of("strange")


def test_options_may_come_as_a_dictionary(here: Path) -> None:
    planned = plan("my_system.py:Sharp", dict(options=dict(sharpness=3., dim=None), decoder_layers=1))
    assert planned.options == dict(dim=32, sharpness=3., decoder_layers=1) and planned.out == Path("runs/sharp")
    assert planned.command == "freqseg train my_system.py:Sharp --preset smoke -p sharpness=3.0 -p decoder_layers=1"
    assert experiment("my_system.py:Sharp", dict(options=dict(dim=8))).plan.options == dict(dim=8)
    with pytest.raises(InputError, match="options=3: give a dictionary"): plan("weclip", dict(options=3))
    with pytest.raises(InputError, match="'sharpnes'.*sharpness"): plan("my_system.py:Sharp", dict(options=dict(sharpnes=3)))


# ---- the notebook ---------------------------------------------------------------------------------------------------

def test_the_general_notebook_has_ten_cells_at_most_and_is_up_to_date() -> None:
    notebook = nbformat.read(ROOT / "nbs" / "train" / "system.ipynb", as_version=4)
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(notebook.cells) <= 10 and cell.source == parameters_cell("weclip", general=True)


def test_a_system_without_a_notebook_gets_one_with_its_own_parameters(here: Path) -> None:
    path = training_notebook("my_system.py:Sharp", here / "out")
    known = notebook_parameters(path)
    assert path == here / "out" / "train_sharp.ipynb" and known["system"].default == "my_system.py:Sharp" and "sharpness" in known
    assert not any(cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)
    assert trained_system(path) == "my_system.py:Sharp" and trained_system(path, {"system": "weclip"}) == "weclip"
    assert training_notebook("weclip", here / "none") == ROOT / "nbs" / "train" / "weclip.ipynb" and not (here / "none").exists()
    plans = run_plans(new_design(path, {"sharpness": [1., 2.]}, 1))
    assert [one.options["sharpness"] for one in plans] == [1., 2.] and plans[0].system == "my_system.py:Sharp"


@pytest.mark.slow
def test_the_general_notebook_trains_a_foreign_system_by_papermill(here: Path) -> None:
    given = {name: value for name, value in SMALL.items() if name != "par_iterations"}
    given |= {"system": "my_system.py:Sharp", "options": {"sharpness": 3.0, "par_iterations": 2}, "out": str(here / "run")}
    run_notebook(ROOT / "nbs" / "train" / "system.ipynb", here / "run" / "run.ipynb", given)
    told = json.loads((here / "run" / "metrics.json").read_text())
    assert told["system"] == "sharp" and told["options"]["sharpness"] == 3.0 and read_checkpoint(here / "run" / "last.safetensors").step == 3


@pytest.mark.slow
def test_options_of_a_foreign_system_can_be_swept(here: Path) -> None:
    found = sweep(training_notebook("my_system.py:Sharp", here / "out"), here / "out", {"sharpness": [1.0, 3.0]}, 1, SMALL, progress=False)
    assert not found.failed and [row.point for row in found.rows] == [{"sharpness": 1.0}, {"sharpness": 3.0}]


# ---- the guide's page, as it stands ---------------------------------------------------------------------------------

def test_the_page_holds_a_file_of_about_thirty_lines() -> None:
    assert 25 <= len(CODE.splitlines()) <= 35 and max(map(len, CODE.splitlines())) <= 120


@pytest.mark.filterwarnings("ignore:no training picture")
def test_the_file_of_the_page_trains_goes_on_after_a_kill_and_is_loaded_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = experiment("my_system.py:Sharp", dict(SMALL, out=str(here / "whole")))
    assert whole.result.resumed == 0 and whole.result.best["step"] == 3
    kind, steps = system_named("sharp"), iter(range(2))
    step = kind.training_step
    def killed(*parts: object) -> dict:
        if next(steps, None) is None: raise KeyboardInterrupt
        return step(*parts)
    monkeypatch.setattr(kind, "training_step", killed)
    with pytest.raises(KeyboardInterrupt): experiment("my_system.py:Sharp", dict(SMALL, out=str(here / "run"))).result
    monkeypatch.setattr(kind, "training_step", step)
    again = experiment("my_system.py:Sharp", dict(SMALL, out=str(here / "run")))
    assert again.result.resumed == 2
    ends = [read_checkpoint(here / name / "last.safetensors") for name in ("whole", "run")]
    assert all(torch.equal(value, ends[1].weights[name]) for name, value in ends[0].weights.items())
    assert ends[0].config["plugin"] == {"file": "my_system.py", "sha256": sha256("my_system.py"), "class": "Sharp"}
    assert json.loads(again.save().read_text())["system"] == "sharp"
    # in this process the file is loaded: figures, masks, the explorer's model
    system, scene = again.trained, World(0, "test", size=96)[0]
    assert evaluate_system(system, again.test, figures=("seg",), progress=False, limit=1).figures["seg"].miou.value >= 0
    assert segment_picture(system, Image.fromarray(scene.image)).shape == scene.mask.shape and type(open_model(here / "run")).name == "sharp"
    # in another it is named
    program = ("import torch; from freqseg.work.checkpoints import load_system; from freqseg.world.scenes import World\n"
               "system = load_system('run', plugin='my_system.py')\n"
               "print(type(system).__name__, tuple(system.predict(system.backbone.preprocess(World(0, 'test')[0].image, 96)).shape))")
    said = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert said.stdout.strip() == "Sharp (1, 21, 12, 12)", said.stderr
    # the file has changed: this is another run
    before = sha256("my_system.py")[:12]
    (here / "my_system.py").write_text(CODE + "# changed\n")
    with pytest.raises(InputError, match=rf"holds another run:\n  system.config.plugin.sha256: {before} there, {sha256('my_system.py')[:12]} now"):
        experiment("my_system.py:Sharp", dict(SMALL, out=str(here / "run"))).result


def test_the_cost_of_a_foreign_system_is_measured(here: Path) -> None:
    cost, = measure_costs(["mine.py:Mine"], "world", device="cpu", size=64, repeats=1)
    assert cost.system == "mine" and cost.predict.flops > 0


# ---- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(here: Path, world: Backbone) -> Path:
    "A checkpoint of mine.py:Mine, and a process that has not loaded that file."
    path = save_system(system_named("mine.py:Mine").build(world, WORLD_CLASSES, dim=16), here / "mine.safetensors", step=0)
    plugins.PLUGINS.clear()
    del room.SYSTEMS["mine"]
    return path


def test_a_checkpoint_is_loaded_with_its_file_or_after_it(saved: Path, world: Backbone) -> None:
    assert load_system(saved, world, plugin="mine.py").config["plugin"]["sha256"] == sha256("mine.py")
    del room.SYSTEMS["mine"]
    plugins.PLUGINS.clear()
    load_plugin("mine.py")
    assert load_system(saved, world).name == "mine"


def test_a_checkpoint_whose_file_is_not_there_says_which_it_needs(saved: Path, world: Backbone, here: Path) -> None:
    digest = sha256("mine.py")[:12]
    with pytest.raises(InputError, match=rf"Mine of mine.py, SHA-256 {digest}, which is not loaded: name that file.*plugin=\"mine.py\""): load_system(saved, world)
    with pytest.raises(InputError, match=rf"SHA-256 {digest}, and there is no gone.py"): load_system(saved, world, plugin="gone.py")
    with pytest.raises(InputError, match=rf"SHA-256 {digest}, which my_system.py does not define"): load_system(saved, world, plugin="my_system.py")


def test_a_checkpoint_whose_file_has_changed_names_both_hashes(saved: Path, world: Backbone, here: Path) -> None:
    before = sha256("mine.py")[:12]
    (here / "mine.py").write_text(MINE + "# changed\n")
    with pytest.raises(InputError, match=rf"SHA-256 {before}; mine.py is now another, SHA-256 {sha256('mine.py')[:12]}: give the version"):
        load_system(saved, world, plugin="mine.py")


@pytest.mark.parametrize("config", [dict(system="evil.py:Evil"), dict(system="evil", plugin={"file": "evil.py", "sha256": "0" * 64, "class": "Evil"})])
def test_no_code_is_run_from_a_path_that_only_a_checkpoint_names(config: dict, here: Path, world: Backbone) -> None:
    (here / "evil.py").write_text("open('ran', 'w').write('it ran')\n" + MINE.replace("Mine", "Evil"))
    own = Segmenter(world, WORLD_CLASSES, room.SegmenterOptions(dim=16))
    write_checkpoint(here / "it.safetensors", Checkpoint(own.trainable_state(), dict(step=0), own.config | config, own.classes))
    with pytest.raises(InputError): load_system(here / "it.safetensors", world)
    assert not (here / "ran").exists()


def test_a_system_that_ships_records_no_file(world: Backbone) -> None:
    assert "plugin" not in system_named("weclip").build(world, WORLD_CLASSES, dim=16).config
