"""The public face: `import freqseg`, what it offers, and what its functions give."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import freqseg
from freqseg.faces.explorer import scene
from freqseg.files import InputError
from freqseg.maps import METHODS

ROOT = Path(__file__).resolve().parent.parent
IMPORT_SECONDS = 0.1


def python(*words: str) -> subprocess.CompletedProcess:
    "A fresh Python in the repository."
    return subprocess.run([sys.executable, *words], cwd=ROOT, text=True, capture_output=True)


# ---- the import -----------------------------------------------------------------------------------------------------

def test_the_import_is_quick_and_loads_nothing_heavy() -> None:
    rows = [line.split("|") for line in python("-X", "importtime", "-c", "import freqseg").stderr.splitlines() if "|" in line]
    names = {row[-1].strip().split(".")[0] for row in rows}
    microseconds = [int(row[1]) for row in rows if row[-1].strip() == "freqseg"]
    assert len(microseconds) == 1 and microseconds[0] < IMPORT_SECONDS * 1e6
    assert not names & {"torch", "numpy", "PIL", "matplotlib", "open_clip", "IPython", "nbdev"}


def test_tab_offers_verbs_that_exist() -> None:
    offered = set(dir(freqseg))
    assert {"cam", "explore", "load_clip", "load_system", "segment", "evaluate", "train", "seeds"} <= offered
    assert all(getattr(freqseg, name) is not None for name in offered)


def test_rooms_are_attributes_and_other_names_are_not() -> None:
    done = python("-c", "import freqseg; print(freqseg.spectra.split_bands is freqseg.split_bands, freqseg.work.__name__, hasattr(freqseg, 'speling'))")
    assert done.stdout.split() == ["True", "freqseg.work", "False"], done.stderr


def test_a_room_that_lacks_a_requirement_says_which() -> None:
    done = python("-c", "import sys; sys.modules['torch'] = None; import freqseg; freqseg.spectra")
    assert "ModuleNotFoundError: import of torch halted" in done.stderr


@pytest.mark.parametrize("begin", ["import freqseg.cam", "import freqseg; freqseg.cam", "from freqseg.cam import grad_cam",
                                   "from freqseg import cam", "import freqseg.cam as cam", "import freqseg.faces.api"])
def test_cam_is_a_room_and_a_function_however_it_is_imported(begin: str) -> None:
    program = f"{begin}; import freqseg, inspect; from freqseg.cam import grad_cam as one; from freqseg import cam\n" \
              "print(cam is freqseg.cam, cam.grad_cam is one, callable(cam), 'names' in inspect.signature(cam).parameters)"
    done = python("-c", program)
    assert done.stdout.split() == ["True"] * 4, done.stderr


def test_help_of_cam_explains_the_call() -> None:
    text = python("-c", "import freqseg; help(freqseg.cam)").stdout
    assert "freqseg.cam(picture, names" in text and "cycles per token, 0 to 0.5" in text and "FUNCTIONS" in text


def test_the_package_is_a_command() -> None:
    done = python("-m", "freqseg", "--version")
    assert done.stdout.strip() == f"freqseg {freqseg.__version__}"


# ---- maps -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def maps():
    "All maps of a scene that shows a star and a wheel."
    return freqseg.cam(scene(48))


def test_maps_hold_every_kind_in_their_range(maps) -> None:
    assert list(maps.maps) == list(METHODS) and maps.names == ["star", "wheel"]
    assert all(kind.shape == (2, 28, 28) and 0 <= kind.min() and kind.max() <= 1 for kind in maps.maps.values())
    assert maps["low", "wheel"].equal(maps["low"][1])


def test_a_picture_may_be_a_file_a_pil_image_or_an_array(maps, tmp_path: Path) -> None:
    Image.fromarray(maps.picture).save(tmp_path / "mine.png")
    for given in (str(tmp_path / "mine.png"), tmp_path / "mine.png", Image.fromarray(maps.picture), maps.picture):
        assert torch.allclose(freqseg.cam(given, "star, wheel", methods="gradcam")["gradcam"], maps["gradcam"], atol=1e-4)


def test_maps_show_themselves_and_are_saved(maps, tmp_path: Path) -> None:
    assert maps._repr_png_().startswith(b"\x89PNG") and "star (" in repr(maps)
    assert {path.suffix for path in maps.save(tmp_path)} == {".png", ".npz"}
    stored = np.load(next(tmp_path.glob("*.npz")))
    assert np.array_equal(stored["low"], maps["low"].numpy()) and stored["classes"].tolist() == ["star", "wheel"]
    assert [path.name for path in maps.save(tmp_path / "one.pdf")] == ["one.pdf"] and (tmp_path / "one.pdf").stat().st_size


def test_bands_of_another_cut_off_are_those_of_a_new_look(maps) -> None:
    again, anew = maps.bands(.3), freqseg.cam(scene(48), methods="gradcam,low,high", mu=.3)
    assert all(torch.allclose(again[kind], anew[kind], atol=1e-4) for kind in ("gradcam", "low", "high"))
    assert torch.allclose(sum(again.parts.bands), maps.parts.evidence, atol=1e-5)
    with pytest.raises(InputError, match="mu=0.7"): maps.bands(.7)


def test_labels_find_what_the_scene_shows(maps) -> None:
    labels, mask = maps.labels(), scene(48).truth(maps.names)
    assert labels.shape == mask.shape and labels.dtype == np.uint8
    assert freqseg.metrics.mean_iou(labels, mask) > .4


def test_a_trained_system_adds_its_own_maps() -> None:
    own = freqseg.cam(scene(48), model="dfa", methods="gradcam")
    assert list(own.maps) == ["gradcam", "trained"] and own["trained"].shape[0] == 2
    assert freqseg.cam(scene(48), model="sptseg", methods="gradcam")["trained"].max() <= 1


@pytest.mark.parametrize("call, sentence", [
    (lambda: freqseg.cam("no.png", "star"), "no.png"),
    (lambda: freqseg.cam(scene(48), "dog"), "ViT-B-16"),
    (lambda: freqseg.cam(scene(48), methods="lo"), "low"),
    (lambda: freqseg.cam(scene(48).image), "no class names"),
    (lambda: freqseg.cam(scene(48), model="dfaa"), "dfa"),
    (lambda: freqseg.cam(scene(48), model="dfa", names="dog"), "dog"),
    (lambda: freqseg.cam(scene(48), size=5), "patch"),
    (lambda: freqseg.segment(scene(48), "world"), "dfa"),
    (lambda: freqseg.segment(scene(48), "dfa", classes="dog"), "dog"),
    (lambda: freqseg.evaluate("world"), "dfa"),
    (lambda: freqseg.train("dfa", iteration=5), "iterations"),
    (lambda: freqseg.train("dfo"), "dfa"),
    (lambda: freqseg.explore("no.png", "star"), "no.png"),
])
def test_a_wrong_word_is_answered_in_a_sentence(call, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence): call()


# ---- masks, figures, trainings --------------------------------------------------------------------------------------

def test_segment_gives_a_mask_with_names(tmp_path: Path) -> None:
    seen = freqseg.segment(scene(48), "dfa")
    assert seen.mask.shape == (224, 224) and seen.names[0] == "background" and seen.mask.max() < len(seen.names)
    chosen = freqseg.segment(scene(48), "sptseg", classes=["star", "wheel", "sky"])
    assert chosen.names == ["nothing", "star", "wheel", "sky"] and set(np.unique(chosen.mask)) <= {0, 1, 2, 3}
    chosen.save(tmp_path), chosen.write(tmp_path / "flat.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "flat.png")), chosen.mask)


def test_figures_of_a_system_and_of_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = freqseg.evaluate("dfa", limit=2, figures=("seg",), samples=10, progress=False)
    assert 0 < report["seg"].scores.miou < 1 and Path("runs/evaluation/report.html").exists()
    table = freqseg.seeds(limit=2, methods="gradcam,low", samples=10, progress=False)
    assert [row.method for row in table.rows] == ["gradcam", "low"]


@pytest.mark.slow
def test_train_is_one_call(tmp_path: Path) -> None:
    run = freqseg.train("weclip", out=str(tmp_path), limit=2)
    assert 0 <= run.report["seg"].scores.miou <= 1 and (tmp_path / "report.html").exists()
    assert json.loads((tmp_path / "metrics.json").read_text())["system"] == "weclip"


def test_explore_opens_a_picture_of_mine() -> None:
    explorer = freqseg.explore(scene(48).image, "star")
    assert explorer.names.value == "star" and explorer.analysis.subject.image.shape == (224, 224, 3)
