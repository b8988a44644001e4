"""`freqseg segment`: nothing is overwritten, names are what was asked for, one bad picture stops no other, and messages name what exists."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import freqseg.work.checkpoints
from freqseg.work.checkpoints import SHIPPED, load_system
from freqseg.faces.cli import main
from freqseg.faces.terminal import class_list, output_names, require_apart
from freqseg.clip import Backbone, load_clip
from freqseg.files import InputError
from freqseg.work.inference import MOST_NAMES, segment_picture
from freqseg.faces.segment_cli import ENDINGS, with_names
from freqseg.systems.sptseg import SPTSEG
from freqseg.systems.weclip import WeCLIP
from freqseg.world.scenes import WORLD_CLASSES, World


@pytest.fixture(scope="module")
def world() -> Backbone:
    return load_clip("world")


@pytest.fixture(scope="module")
def zero_shot(world: Backbone) -> SPTSEG:
    torch.manual_seed(0)
    return SPTSEG.build(world, WORLD_CLASSES).eval()


@pytest.fixture(scope="module")
def weak(world: Backbone) -> WeCLIP:
    torch.manual_seed(0)
    return WeCLIP.build(world, WORLD_CLASSES).eval()


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    return Image.fromarray(World(0, "val")[0].image[:64, :80])


@pytest.fixture
def folder(scene: Image.Image, tmp_path: Path) -> Path:
    "A picture `a.png` in a folder `d`."
    (tmp_path/"d").mkdir()
    scene.save(tmp_path/"d"/"a.png")
    return tmp_path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Callable:
    "Have the command find this system, whatever the checkpoint."
    def set_system(system) -> None: monkeypatch.setattr(freqseg.work.checkpoints, "load_system", lambda *_, **__: system)
    return set_system


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    "Opening a checkpoint is a failure of the test."
    def load(*_, **__): raise AssertionError("the checkpoint was opened")
    monkeypatch.setattr(freqseg.work.checkpoints, "load_system", load)


def words(folder: Path, *more: object, pictures: tuple[str, ...] = ("a.png",), out: str = "out") -> list[str]:
    return ["segment", *(str(folder/"d"/name) for name in pictures), "--model", "any", "--out", str(folder/out), "--device", "cpu", *map(str, more)]


def values(path: Path) -> set[int]: return set(np.unique(np.asarray(Image.open(path))).tolist())


# ---- files ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", ["segment", "cam"])
def test_a_picture_is_never_replaced_by_what_is_made_of_it(command: str, folder: Path, unloaded: None, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder/"d"/"a.png").read_bytes()
    (folder/"elsewhere").symlink_to(folder/"d")
    model = ["--model", "sptseg"] if command == "segment" else ["--model", "none such", "--classes", "fish"]
    for out in (folder/"d", folder/"elsewhere", folder/"d"/".."/"d"):
        assert main([command, str(folder/"d"/"a.png"), *model, "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert "written over" in said and "a.png" in said and "--out" in said
    assert (folder/"d"/"a.png").read_bytes() == before and [path.name for path in (folder/"d").iterdir()] == ["a.png"]


def test_an_overlay_never_replaces_a_picture(folder: Path, unloaded: None, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folder/"d"/"a.png", folder/"a_over.png")
    shutil.copy(folder/"d"/"a.png", folder/"a.jpg")
    assert main(["segment", str(folder/"a_over.png"), str(folder/"a.jpg"), "--model", "any", "--out", str(folder)]) == 2
    assert "a_over.png would be written over" in capsys.readouterr().err


def test_files_that_are_not_read_may_be_replaced(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"): (tmp_path/name).write_text(name)
    require_apart([tmp_path/"a.png"], [tmp_path/"b.png", tmp_path/"new.png"])
    with pytest.raises(InputError, match="b.png.*--out"): require_apart([tmp_path/"b.png"], [tmp_path/"b.png"])


@pytest.mark.parametrize("stems", [("a", "a_over"), ("a_over", "a"), ("a", "a_2", "a"), ("a", "a", "a_over", "a_2_over"), ("a_over_over", "a_over", "a")])
def test_masks_and_overlays_of_all_pictures_have_names_of_their_own(stems: tuple[str, ...]) -> None:
    names = output_names([Path(f"{place}/{stem}.png") for place, stem in enumerate(stems)], ENDINGS)
    made = [name + ending for name in names for ending in ENDINGS]
    assert len(set(made)) == len(made) and names[0] == stems[0]
    assert output_names([Path("a.png"), Path("a_over.png")]) == ["a", "a_over"]        # where nothing is called so


def test_a_picture_called_like_an_overlay_gets_its_own_mask(folder: Path, zero_shot: SPTSEG, loads: Callable) -> None:
    loads(zero_shot)
    shutil.copy(folder/"d"/"a.png", folder/"d"/"a_over.png")
    assert main(words(folder, "--classes", "tree, key", pictures=("a.png", "a_over.png"))) == 0
    assert sorted(path.name for path in (folder/"out").iterdir()) == ["a.png", "a_over.png", "a_over_2.png", "a_over_2_over.png"]
    assert np.array_equal(Image.open(folder/"out"/"a.png"), Image.open(folder/"out"/"a_over_2.png"))


def test_a_file_in_the_place_of_the_folder_is_refused_at_once(folder: Path, unloaded: None, capsys: pytest.CaptureFixture[str]) -> None:
    (folder/"text.txt").write_text("mine")
    assert main(words(folder, out="text.txt")) == 2
    assert "text.txt: it is a file" in capsys.readouterr().err and (folder/"text.txt").read_text() == "mine"
    assert main(words(folder, out="text.txt/out")) == 2
    assert "cannot write into" in capsys.readouterr().err


# ---- names ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "told"), [("", "no class names"), (" , ", "no class names"), ("tree,,key", "name 2 of 3"), (",tree", "name 1 of 2"),
                                            ("tree,,", "name 2 of 2"), ("tree;key", "commas"), ("tree, tree", "twice")])
def test_names_that_are_no_list_are_refused_before_anything_is_opened(text: str, told: str, folder: Path, unloaded: None,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(folder, "--classes", text)) == 2
    assert told in capsys.readouterr().err
    assert class_list("tree, red  key,") == ["tree", "red key"]


@pytest.mark.parametrize(("text", "told"), [("the", "'the' names nothing"), ("tree, a photo of the", "'a photo of the' names nothing"), ("tree/key", "'tree/key' has signs"),
                                            ("key, zebra", "unknown class 'zebra'")])
def test_names_that_the_world_cannot_read_are_refused(text: str, told: str, folder: Path, zero_shot: SPTSEG, loads: Callable,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    loads(zero_shot)
    assert main(words(folder, "--classes", text)) == 2
    assert told in capsys.readouterr().err and not list((folder/"out").iterdir())


def test_of_a_system_with_fixed_classes_the_chosen_ones_and_the_background_answer(folder: Path, scene: Image.Image, weak: WeCLIP, loads: Callable,
                                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    loads(weak)
    everything = segment_picture(weak, scene)
    assert len(np.unique(everything)) > 3
    assert main(words(folder, "--classes", "key, tree")) == 0
    mask = np.asarray(Image.open(folder/"out"/"a.png"))
    assert set(np.unique(mask)) <= {0, 1, 2} and np.array_equal(mask, segment_picture(weak, scene, classes=["key", "tree"]))
    said = capsys.readouterr().out
    assert not any(name in said.split(": ")[1] for name in WORLD_CLASSES if name not in ("key", "tree"))
    for value, name in enumerate(("background", "key", "tree")):                       # who wins among all wins among few
        own = 0 if not value else WORLD_CLASSES.index(name) + 1
        assert (mask[everything == own] == value).all()
    assert main(words(folder, "--classes", "zebra")) == 2
    assert "no classifier for 'zebra'" in capsys.readouterr().err


def test_more_names_than_a_mask_holds_are_refused(zero_shot: SPTSEG, weak: WeCLIP, scene: Image.Image) -> None:
    many = [f"tree {number}" for number in range(MOST_NAMES + 1)]
    with pytest.raises(InputError, match="255 names.*254"): with_names(zero_shot, many)
    with pytest.raises(InputError, match="255 names.*254"): with_names(weak, many)


def test_labels_of_a_zero_shot_system_permute_with_the_names() -> None:
    system, scene = load_system("sptseg"), World(0, "val")[0]
    names, order = ("tree", "flower", "sand", "hammer", "comb"), [3, 0, 4, 2, 1]
    straight, turned = (segment_picture(with_names(system, given), Image.fromarray(scene.image)) for given in (names, [names[place] for place in order]))
    assert len(np.unique(straight)) > 1 and (np.array(order)[turned] == straight).mean() > .999


def test_the_handicap_of_a_single_name_has_no_effect(world: Backbone, scene: Image.Image) -> None:
    masks = []
    for bias in (0., .4):
        torch.manual_seed(0)
        system = with_names(SPTSEG.build(world, WORLD_CLASSES, bias=bias).eval(), ["ring"])
        assert system.handicap.item() == pytest.approx(bias)
        with torch.no_grad(): middle = system.predict(system.backbone.preprocess([scene], (64, 80))).sigmoid().median().item()
        masks.append(segment_picture(system, scene, floor=middle))
    assert np.array_equal(*masks) and set(np.unique(masks[0])) == {0, 255}


# ---- pictures and messages ------------------------------------------------------------------------------------------

class Full(torch.nn.Module):
    "A system for which pictures wider than 80 pixels are too large."
    def __init__(self, system: SPTSEG) -> None:
        super().__init__()
        self.system, self.asked = system, []
        for name in ("classes", "num_classes", "backbone", "name", "supervision", "activation", "handicap"): setattr(self, name, getattr(system, name))

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(images))
        if images.shape[-1] > 80: raise torch.OutOfMemoryError("CUDA out of memory")
        return self.system.predict(images)


def test_a_picture_too_large_for_the_memory_stops_no_other(folder: Path, zero_shot: SPTSEG, scene: Image.Image, loads: Callable,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    loads(Full(with_names(zero_shot, ["tree", "key"])))
    scene.resize((160, 64)).save(folder/"d"/"b.png")
    shutil.copy(folder/"d"/"a.png", folder/"d"/"c.png")
    assert main(words(folder, pictures=("a.png", "b.png", "c.png"))) == 2
    said = capsys.readouterr()
    assert f"{folder/'d'/'b.png'}: out of memory" in said.err and "1 image of 64 x 160" in said.err and "2 of 3 pictures" in said.out
    assert sorted(path.name for path in (folder/"out").iterdir()) == ["a.png", "a_over.png", "c.png", "c_over.png"]


def test_what_to_do_against_a_full_memory_are_options_of_the_command(folder: Path, zero_shot: SPTSEG, scene: Image.Image, loads: Callable,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit): main(["segment", "--help"])
    known = capsys.readouterr().out
    loads(system := Full(with_names(zero_shot, ["tree", "key"])))
    scene.resize((160, 64)).save(folder/"d"/"b.png")
    for more, told in (((), ("--scales", "--side", "--window")), (("--flip",), ("--batch", "--scales", "--side", "--window"))):
        assert main(words(folder, *more, pictures=("b.png",))) == 2
        said = capsys.readouterr()
        assert [word.strip(",.()") for word in said.err.split() if word.startswith("--")] == list(told) and all(option in known for option in told)
        assert "0 of 1 pictures: nothing was written" in said.out and "NAME" not in said.out
    system.asked.clear()
    assert main(words(folder, "--window", 80, "--stride", 40, "--batch", 2, pictures=("b.png",))) == 0 and system.asked == [2, 1]


@pytest.mark.parametrize("command", ["segment", "cam"])
def test_what_is_no_picture_gets_advice_for_a_single_picture(command: str, folder: Path, zero_shot: SPTSEG, loads: Callable,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    loads(zero_shot)
    (folder/"d"/"notes.txt").write_text("no picture")
    model = ["--model", "any"] if command == "segment" else ["--model", "world", "--classes", "fish"]
    assert main([command, str(folder/"d"/"notes.txt"), *model, "--device", "cpu", "--out", str(folder/"out")]) == 2
    said = capsys.readouterr()
    assert "notes.txt cannot be decoded" in said.err and "Is it a picture?" in said.err and "--fix-list" not in said.err and "NAME" not in said.out


@pytest.mark.parametrize("command", ["segment", "evaluate"])
def test_names_lists_the_systems_that_ship(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit): main([command, "--names"])
    assert ", ".join(SHIPPED) in " ".join(capsys.readouterr().out.split())


def test_a_system_that_ships_answers_for_some_of_its_classes(folder: Path) -> None:
    command = words(folder, "--classes", "tree")
    command[command.index("any")] = "weclip"
    assert main(command) == 0 and values(folder/"out"/"a.png") <= {0, 1}


def test_a_picture_from_a_camera_gets_a_notice(folder: Path, scene: Image.Image, zero_shot: SPTSEG, loads: Callable, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    loads(zero_shot)
    monkeypatch.setattr("freqseg.work.inference.segment_picture", lambda system, image, *_: np.zeros(image.size[::-1], np.uint8))
    scene.resize((1200, 900)).save(folder/"d"/"b.png")
    assert main(words(folder, "--classes", "tree, key", pictures=("a.png", "b.png"))) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("freqseg: ")]
    assert len(said) == 1 and "b.png has 1200 x 900 pixels" in said[0] and "--side" in said[0] and "--window" in said[0]
    assert main(words(folder, "--classes", "tree, key", "--side", "448", pictures=("b.png",))) == 0
    assert "1200 x 900" not in capsys.readouterr().err
