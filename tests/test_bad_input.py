"""What a user can get wrong, through the real command line: one sentence, the right exit status, nothing half-written."""

import errno
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freqseg.faces.cli import main
from freqseg.files import shipped
from freqseg.world.scenes import World, write_world

COMMAND = [sys.executable, "-c", "import sys; from freqseg.faces.cli import main; sys.exit(main())"]
FAST = ["--model", "world", "--side", "112", "--device", "cpu"]


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A picture of the embedded world."
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(World(0, "test", 112)[0].image).save(path)
    return path


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    "Run a command line that has to fail with exit status 2 and one line on stderr, and give that line."
    def run(*words: object, status: int = 2) -> str:
        assert main([str(word) for word in words]) == status
        error = capsys.readouterr().err
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if line.startswith("freqseg: ")]
        assert lines
        return lines[-1].removeprefix("freqseg: ")
    return run


def everything_in(folder: Path) -> list[str]:
    "All files under a folder, hidden ones too."
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def freqseg(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    "The command as a process of its own."
    return subprocess.run([*COMMAND, *map(str, words)], text=True, capture_output=True, timeout=240, **options)


# ---- pictures -------------------------------------------------------------------------------------------------------

def test_a_missing_picture_names_the_nearest_file(says: Callable, scene: Path, tmp_path: Path) -> None:
    message = says("cam", scene.with_name("scnee.png"), "--classes", "fish", *FAST, "--out", tmp_path)
    assert re.search(r"scnee\.png does not exist\. Did you mean .*scene\.png\?", message)


def test_an_empty_folder_has_no_pictures(says: Callable, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    assert "no pictures in" in says("cam", tmp_path, "--classes", "fish", *FAST, "--out", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"not a picture at all", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"], ids=["empty", "text", "cut"])
def test_a_file_that_is_no_picture_is_named(says: Callable, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.png"
    path.write_bytes(content)
    assert "odd.png cannot be decoded" in says("cam", path, "--classes", "fish", *FAST, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_picture_among_others_is_reported_and_the_others_are_made(
        scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(scene, tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(scene.read_bytes()[:3000])
    assert main(["cam", str(tmp_path), "--classes", "fish", "--methods", "gradcam", *FAST, "--out", str(tmp_path / "out")]) == 2
    assert "bad.png cannot be decoded" in capsys.readouterr().err
    assert everything_in(tmp_path / "out") == ["good.npz", "good.png"]


def test_a_folder_without_read_permission_or_a_directory_as_picture_is_no_crash(says: Callable, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    assert "no pictures in" in says("cam", tmp_path / "folder.png", "--classes", "fish", *FAST, "--out", tmp_path / "out")


@pytest.mark.parametrize("size", [(1, 1), (5000, 4000), (3, 900)], ids=["one pixel", "20 megapixels", "a strip"])
def test_pictures_of_any_size_work_and_unusual_ones_are_resized_with_a_notice(
        size: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.linear_gradient("L").resize(size).convert("RGB").save(tmp_path / "p.png")
    assert main(["cam", str(tmp_path / "p.png"), "--classes", "fish, star", *FAST, "--out", str(tmp_path / "out")]) == 0
    assert re.search(rf"p\.png is {size[0]} x {size[1]} pixels; resized to \d+ x \d+\.", capsys.readouterr().err)
    stored = np.load(tmp_path / "out" / "p.npz")
    assert all(np.isfinite(stored[name]).all() for name in stored.files if name != "classes")


def test_a_size_whose_affinity_would_not_fit_into_memory_is_refused(says: Callable, scene: Path, tmp_path: Path) -> None:
    message = says("cam", scene, "--classes", "fish", "--model", "world", "--side", 4000, "--out", tmp_path)
    assert "250,000 patches" in message and "Take --side 512 or less" in message


# ---- classes --------------------------------------------------------------------------------------------------------

def test_an_unknown_class_of_the_world_model_names_the_nearest(says: Callable, scene: Path, tmp_path: Path) -> None:
    message = says("cam", scene, "--classes", "star, buterfly", *FAST, "--out", tmp_path)
    assert "unknown class 'buterfly'. Did you mean 'butterfly'?" in message


@pytest.mark.parametrize(("classes", "expected"), [("", "no class names given"), (" , ,", "no class names given"),
                                                   ("fish, star, fish", "named twice: fish")])
def test_an_empty_or_doubled_class_list_is_refused(says: Callable, scene: Path, tmp_path: Path, classes: str, expected: str) -> None:
    assert expected in says("cam", scene, "--classes", classes, *FAST, "--out", tmp_path)


def test_an_unknown_method_names_the_nearest(says: Callable, scene: Path, tmp_path: Path) -> None:
    assert "Did you mean 'gradcam'?" in says("cam", scene, "--classes", "fish", "--methods", "gradcan", *FAST, "--out", tmp_path)


def test_a_class_that_the_picture_lacks_gets_a_low_score_and_no_nan(scene: Path, tmp_path: Path) -> None:
    shown = World(0, "test", 112)[0].classes
    absent = next(name for name in ("fish", "moon", "comb", "key") if name not in shown)
    assert main(["cam", str(scene), "--classes", f"{shown[0]}, {absent}", *FAST, "--out", str(tmp_path)]) == 0
    stored = np.load(tmp_path / "scene.npz")
    assert stored["scores"][1] < 0.1 and stored["scores"][1] < stored["scores"][0]
    assert all(np.isfinite(stored[name]).all() for name in stored.files if name != "classes")


# ---- masks ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def whole_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A few scenes on disk, never changed."
    folder = tmp_path_factory.mktemp("world") / "scenes"
    write_world(str(folder), train=2, val=2, test=2, size=64, workers=1)
    return folder


@pytest.fixture
def broken_world(whole_world: Path, tmp_path: Path) -> Path:
    "The same scenes, with the value 37 on six pixels of one mask."
    folder = Path(shutil.copytree(whole_world, tmp_path / "scenes"))
    mask = np.array(Image.open(folder / "SegmentationClass" / "test_000000.png"))
    mask[:2, :3] = 37
    Image.fromarray(mask).save(folder / "SegmentationClass" / "test_000000.png")
    return folder


def test_check_names_the_value_37_the_file_and_the_count(broken_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(broken_world)]) == 1
    table = capsys.readouterr().out
    assert "test_000000" in table and "mask value 37 on 6 pixels" in table and "not ok" in table


def test_seeds_stop_at_a_mask_with_value_37(says: Callable, broken_world: Path, tmp_path: Path) -> None:
    message = says("seeds", broken_world, "--split", "test", "--methods", "gradcam", "--model", "world", "--side", 64, "--out", tmp_path / "out")
    assert "test_000000.png: mask value 37 on 6 pixels" in message
    assert not (tmp_path / "out").exists() or not everything_in(tmp_path / "out")


def test_check_writes_a_list_without_the_broken_picture(broken_world: Path, tmp_path: Path) -> None:
    assert main(["check", str(broken_world), "--split", "test", "--fix-list", str(tmp_path / "list.txt")]) == 1
    assert (tmp_path / "list.txt").read_text() == "test_000001\n"


def test_a_folder_that_is_no_dataset_says_what_was_looked_for(says: Callable, tmp_path: Path) -> None:
    assert "looked for classes.txt and JPEGImages" in says("check", tmp_path)
    assert "does not exist" in says("check", tmp_path / "nowhere").lower() or "no" in says("check", tmp_path / "nowhere")


# ---- checkpoints ----------------------------------------------------------------------------------------------------

class Malicious:
    "Unpickles into a call of `os.mkdir`."

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.proof),)


def test_a_truncated_checkpoint_is_refused(says: Callable, scene: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(shipped("world_clip.safetensors").read_bytes()[:100_000])
    assert "cut.safetensors is truncated" in says("cam", scene, "--classes", "fish", "--model", path, "--out", tmp_path / "out")


def test_a_truncated_torch_checkpoint_is_refused(says: Callable, scene: Path, tmp_path: Path) -> None:
    whole = io.BytesIO()
    torch.save({"w": torch.zeros(1000)}, whole)
    (tmp_path / "cut.pt").write_bytes(whole.getvalue()[:2000])
    message = says("cam", scene, "--classes", "dog", "--model", "ViT-B-32", "--pretrained", tmp_path / "cut.pt", "--out", tmp_path / "out")
    assert "cut.pt" in message and ("truncated" in message or "damaged" in message)


def test_a_checkpoint_of_another_architecture_is_refused(says: Callable, scene: Path, tmp_path: Path) -> None:
    message = says("cam", scene, "--classes", "dog", "--model", "ViT-B-32", "--pretrained", shipped("world_clip.safetensors"), "--out", tmp_path)
    assert "is of another architecture" in message


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_executed(says: Callable, scene: Path, tmp_path: Path, save: Callable) -> None:
    proof, path = tmp_path / "executed", tmp_path / "evil.pt"
    save(Malicious(proof), path)
    message = says("cam", scene, "--classes", "dog", "--model", "ViT-B-32", "--pretrained", path, "--out", tmp_path / "out")
    assert "evil.pt" in message and "refused" in message
    assert not proof.exists()
    pickle.loads(pickle.dumps(Malicious(proof)))
    assert proof.exists(), "the trap itself does not work, so the test proves nothing"


def test_a_misspelled_model_names_the_nearest(says: Callable, scene: Path, tmp_path: Path) -> None:
    assert "ViT-B-16" in says("cam", scene, "--classes", "dog", "--model", "ViT-B16", "--out", tmp_path)


def test_a_failing_download_says_how_to_go_on_without(says: Callable, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route to host")
    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    message = says("cam", scene, "--classes", "dog", "--out", tmp_path)
    assert "could not download ViT-B-16 (openai): no route to host" in message and "--model world works at once" in message


# ---- disks ----------------------------------------------------------------------------------------------------------

def full_disk(*_: object, **__: object) -> None:
    "What writing to a full disk raises."
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("writer", ["numpy.savez_compressed", "matplotlib.figure.Figure.savefig"])
def test_a_full_disk_leaves_nothing_half_written(says: Callable, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    monkeypatch.setattr(writer, full_disk)
    message = says("cam", scene, "--classes", "fish", "--methods", "gradcam", *FAST, "--out", tmp_path / "out")
    assert "No space left on device" in message and "Nothing was left half-written" in message
    assert everything_in(tmp_path / "out") in ([], ["scene.npz"])


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Path:
    "A file system of 64 KiB; skips where it may not be mounted."
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_really_fills_up_leaves_nothing_half_written(says: Callable, scene: Path, tiny_disk: Path) -> None:
    message = says("cam", scene, "--classes", "fish", *FAST, "--out", tiny_disk)
    assert "No space left on device" in message
    assert everything_in(tiny_disk) in ([], ["scene.npz"])


def test_a_world_that_does_not_fit_on_the_disk_is_not_there_at_all(says: Callable, tiny_disk: Path) -> None:
    assert "No space left" in says("world", "--out", tiny_disk / "world", "--train", 20, "--val", 0, "--test", 0, "--size", 112)
    assert not list(tiny_disk.iterdir())


def test_an_output_folder_that_is_a_file_is_named(says: Callable, scene: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("kept")
    message = says("cam", scene, "--classes", "fish", "--methods", "gradcam", *FAST, "--out", tmp_path / "taken")
    assert "cannot write" in message and "taken" in message
    assert everything_in(tmp_path) == ["taken"] and (tmp_path / "taken").read_text() == "kept"


def test_a_world_is_never_written_over_something_else(says: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    assert "is not empty" in says("world", "--out", tmp_path, "--train", 1, "--val", 0, "--test", 0)
    assert everything_in(tmp_path) == ["mine.txt"]


# ---- options --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [["cam", "x.png"], ["cam", "x.png", "--classes", "a", "--mu", "0.9"], ["cam", "x.png", "--classes", "a", "--side", "0"],
                                   ["world", "--out", "x", "--train", "-3"], ["nothing"], []], ids=" ".join)
def test_wrong_options_show_the_usage_and_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and "usage: freqseg" in capsys.readouterr().err


def test_an_unknown_difficulty_or_an_empty_world_is_refused(says: Callable, tmp_path: Path) -> None:
    assert "Did you mean 'hard'?" in says("world", "--out", tmp_path / "w", "--difficulty", "hrad")
    assert "Known: easy, medium, hard" in says("world", "--out", tmp_path / "w", "--difficulty", "nightmare")
    assert "at least one scene" in says("world", "--out", tmp_path / "w", "--train", 0, "--val", 0, "--test", 0)
    assert not (tmp_path / "w").exists()


# ---- processes: signals and pipes -----------------------------------------------------------------------------------

def test_an_error_of_the_process_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = freqseg("run", tmp_path / "nowhere.ipynb")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("freqseg: ") and done.stderr.count("\n") == 1


def interrupt_when(ready: Callable[[], bool], words: list[object]) -> tuple[int, str]:
    "Start the command, send SIGINT to its process group as a terminal does once `ready()`, give status and stderr."
    # Without coverage in the processes that are killed: its tracer and its own signal handler are not what users run.
    bare = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    process = subprocess.Popen([*COMMAND, *map(str, words)], text=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, start_new_session=True, env=bare)
    deadline = time.monotonic() + 200
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.mark.slow
def test_ctrl_c_among_pictures_leaves_whole_files_only(scene: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(40):
        shutil.copy(scene, tmp_path / "in" / f"{number}.png")
    out = tmp_path / "out"
    status, error = interrupt_when(lambda: any(out.glob("[!.]*.png")), ["cam", tmp_path / "in", "--classes", "fish", *FAST, "--batch", 2, "--out", out])
    assert status == 130 and "Traceback" not in error and error.rstrip().endswith("freqseg: interrupted")
    assert 0 < len(list(out.glob("[!.]*.png"))) < 40 and not list(out.glob(".*"))
    assert all(np.load(path)["classes"].tolist() == ["fish"] for path in out.glob("[!.]*.npz"))
    for path in out.glob("[!.]*.png"):
        Image.open(path).load()


@pytest.mark.slow
def test_ctrl_c_while_a_world_is_written_by_several_processes_leaves_nothing(tmp_path: Path) -> None:
    status, error = interrupt_when(lambda: any(tmp_path.glob(".world-*/JPEGImages/*.png")), ["world", "--out", tmp_path / "world"])
    assert status == 130 and "Traceback" not in error and error.rstrip().endswith("freqseg: interrupted")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(whole_world: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as broken:
        done = subprocess.run([*COMMAND, "check", str(whole_world)], stdout=broken, stderr=subprocess.PIPE, text=True, timeout=240)
    assert done.returncode == 141 and done.stderr == ""
