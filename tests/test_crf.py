"""The CRF room: the dense CRF is pydensecrf, in order and bounded; no death of any process hangs it or leaves one behind.

Whatever could wait for ever has a minute; the stacks of all threads are shown when it is over.
"""

import builtins
import contextlib
import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm
from PIL import Image

import freqseg.crf as crf_room
from freqseg.crf import CRF_PRESETS, CRFSettings, crf_image, crf_settings, dense_crf
from freqseg.files import InputError

AT_ONCE = CRFSettings(iterations=0)  # the pool with nothing to wait for but the pipes
MINUTES = CRFSettings(iterations=3_000)  # for a large picture
a_minute = pytest.mark.timeout(60)


def crf_case(number: int, classes: int = 3, size: tuple[int, int] = (24, 31)) -> tuple[np.ndarray, np.ndarray]:
    "A picture of noise and random probabilities."
    generator = np.random.default_rng(number)
    image = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
    logits = generator.normal(size=(classes, *size)).astype(np.float32)
    return image, np.exp(logits) / np.exp(logits).sum(0)


def exact_mean_field(image: np.ndarray, probs: np.ndarray, settings: CRFSettings) -> np.ndarray:
    "Dense CRF with every pair of pixels summed, kernels normalised symmetrically (Krähenbühl and Koltun, 2011)."
    classes, height, width = probs.shape
    place = np.stack(np.mgrid[:height, :width], -1).reshape(-1, 2).astype(float)
    colour = image.reshape(-1, 3).astype(float)

    def kernel(*features: np.ndarray) -> np.ndarray:
        f = np.concatenate(features, 1)
        k = np.exp(-((f[:, None] - f[None]) ** 2).sum(-1) / 2)
        scale = 1 / np.sqrt(k.sum(1) + 1e-20)
        return scale[:, None] * k * scale[None]

    pair = settings.gaussian_compat * kernel(place / settings.gaussian_sxy)
    pair += settings.bilateral_compat * kernel(place / settings.bilateral_sxy, colour / settings.bilateral_srgb)
    log_unary = np.log(probs.clip(1e-5, 1)).reshape(classes, -1)
    q = np.exp(log_unary) / np.exp(log_unary).sum(0)
    for _ in range(settings.iterations):
        logits = log_unary + q @ pair.T
        q = np.exp(logits - logits.max(0))
        q /= q.sum(0)
    return q.reshape(probs.shape)


@pytest.mark.parametrize("name", CRF_PRESETS)
def test_crf_is_close_to_exact_mean_field_over_all_pairs(pydensecrf, name: str) -> None:
    image = np.full((20, 22, 3), 60, np.uint8)
    image[:, 11:] = 180
    _, noise = crf_case(1, 3, (20, 22))
    probs = 0.6 * noise + 0.4 * np.stack([image[..., 0] < 100, image[..., 0] > 100, np.zeros((20, 22))]).astype(np.float32)
    found, expected = crf_image(image, probs, name), exact_mean_field(image, probs, CRF_PRESETS[name])
    # pydensecrf filters on a permutohedral lattice, which approximates the sums.
    assert np.abs(found - expected).mean() < 0.03
    assert (found.argmax(0) == expected.argmax(0)).mean() > 0.97


def test_presets_are_the_published_numbers() -> None:
    numbers = {name: tuple(vars(s).values()) for name, s in CRF_PRESETS.items()}
    assert numbers == {"weclip": (10, 3, 3, 64, 5, 4), "toco": (10, 1, 1, 121, 5, 4), "clip_es": (10, 1, 3, 67, 3, 4)}


def test_crf_sums_to_one_and_labels_are_its_argmax(pydensecrf) -> None:
    image, probs = crf_case(2)
    posterior = crf_image(image, probs)
    assert posterior.dtype == np.float32 and posterior.shape == probs.shape
    np.testing.assert_allclose(posterior.sum(0), 1, atol=1e-4)
    labels = crf_image(image, probs, labels=True)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, posterior.argmax(0))


def test_crf_without_kernels_returns_the_probabilities(pydensecrf) -> None:
    image, probs = crf_case(3)
    np.testing.assert_allclose(crf_image(image, probs, CRFSettings(gaussian_compat=0, bilateral_compat=0)), probs, atol=1e-5)


def test_crf_is_equivariant_to_class_order(pydensecrf) -> None:
    image, probs = crf_case(4)
    np.testing.assert_allclose(crf_image(image, probs[[2, 0, 1]]), crf_image(image, probs)[[2, 0, 1]], atol=1e-4)


def test_nothing_is_read_before_the_first_result_is_asked_for(pydensecrf) -> None:
    def never():
        raise AssertionError("read too early")
        yield

    results = dense_crf(never(), never(), progress=False)
    assert iter(results) is results
    results.close()


def test_stopping_early_closes_the_sources(pydensecrf) -> None:
    closed = []

    def images():
        try:
            while True:
                yield crf_case(0)[0]
        finally:
            closed.append(True)

    results = dense_crf(images(), itertools.repeat(crf_case(0)[1]), workers=1, progress=False, labels=True)
    assert next(results).shape == (24, 31)
    results.close()
    del results
    assert closed


def test_progress_bar_counts_images_on_standard_error(pydensecrf, capsys) -> None:
    image, probs = crf_case(5)
    list(dense_crf([Image.fromarray(image)] * 2, [probs] * 2, workers=1))
    shown = capsys.readouterr()
    assert "dense CRF" in shown.err and "2/2" in shown.err and not shown.out
    list(dense_crf([image], [probs], workers=1, progress=False))
    assert not capsys.readouterr().err


def test_wrong_items_are_named_by_their_number(pydensecrf) -> None:
    image, probs = crf_case(6)

    def run(images, maps):
        return list(dense_crf(images, maps, workers=1, progress=False))

    with pytest.raises(InputError, match=r"image 1 is float64 \(24, 31, 3\): .*uint8 RGB"):
        run([image, image / 255], [probs, probs])
    with pytest.raises(InputError, match="image 0 is uint8 .*uint8 RGB"):
        run([image[..., 0]], [probs])
    with pytest.raises(InputError, match=r"probabilities 1 .*needs \(classes, 24, 31\)"):
        run([image, image], [probs, probs[:, :20]])
    with pytest.raises(InputError, match="only one of the two has an item 1"):
        run([image], [probs, probs])


def test_wrong_settings_are_reported_at_once(pydensecrf) -> None:
    with pytest.raises(InputError, match="'voc': use one of weclip, toco, clip_es"):
        dense_crf([], [], preset="voc")
    with pytest.raises(InputError, match="at least 1, got 0"):
        dense_crf([], [], workers=0)
    assert crf_settings(CRFSettings(iterations=3)).iterations == 3


def test_missing_package_says_what_to_install(monkeypatch) -> None:
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pydensecrf"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install pydensecrf2==1\.1.*Python 3\.13"):
        dense_crf([], [])

# --- the pool ------------------------------------------------------------------------------------------------------

def open_files() -> int:
    "How many file descriptors this process holds; 0 where that cannot be seen."
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen]]:
    "Every process that is started in the test. Afterwards there must have been some, and nothing is left of them."
    started: list[subprocess.Popen] = []

    class Recorded(crf_room._Child):
        def __init__(self) -> None:
            super().__init__()
            started.append(self.process)

    monkeypatch.setattr(crf_room, "_Child", Recorded)
    tqdm.tqdm(disable=True).close()  # the first of all bars starts a thread that stays
    gc.collect()
    before = threading.active_count(), open_files()
    yield started
    assert started
    for process in started:
        assert process.returncode is not None
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)
    gc.collect()
    assert (threading.active_count(), open_files()) == before


def endless(settings: CRFSettings = AT_ONCE, classes: int = 3, size: tuple[int, int] = (24, 31)) -> Iterator[np.ndarray]:
    "One small result and then others for ever, from two processes."
    (small, few), (image, probs) = crf_case(0, 2, (5, 6)), crf_case(1, classes, size)
    images, maps = itertools.chain([small], itertools.repeat(image)), itertools.chain([few], itertools.repeat(probs))
    return dense_crf(images, maps, settings, workers=2, progress=False)


def assert_reported(results: Iterator[np.ndarray]) -> None:
    "The killed process is reported within seconds, even on a busy machine."
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"a CRF process died \(signal 9, Killed\).*fewer workers"):
        for _ in results:
            pass
    assert time.monotonic() - start < 30


@a_minute
@pytest.mark.parametrize("labels", [False, True])
def test_pool_gives_the_serial_results_in_order_and_stays_bounded(pydensecrf, children, labels: bool) -> None:
    cases = [crf_case(n, size=(10 + n, 12)) for n in range(9)]
    serial = list(dense_crf([i for i, _ in cases], [p for _, p in cases], workers=1, labels=labels, progress=False))
    progress = {"read": 0, "behind": 0}

    def images() -> Iterator[np.ndarray]:
        for progress["read"], (image, _) in enumerate(cases, 1):
            yield image

    results = dense_crf(images(), (torch.from_numpy(p) for _, p in cases), workers=2, labels=labels, progress=False)
    for done, (found, expected) in enumerate(zip(results, serial, strict=True)):
        progress["behind"] = max(progress["behind"], progress["read"] - done)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert progress["read"] == 9 and progress["behind"] <= 4 and len(children) == 2


@a_minute
def test_any_tensor_in_any_layout_arrives_as_it_is(pydensecrf, children) -> None:
    image, probs = crf_case(1)
    maps = [torch.from_numpy(probs).requires_grad_(), torch.from_numpy(probs).double(), np.asfortranarray(probs),
            torch.from_numpy(probs.transpose(1, 2, 0).copy()).permute(2, 0, 1), probs.astype(np.float64)]
    pictures = [image, Image.fromarray(image), np.asfortranarray(image), torch.from_numpy(image), image[::-1].copy()[::-1]]
    for found in dense_crf(pictures, maps, workers=2, progress=False):
        np.testing.assert_allclose(found, crf_image(image, probs), atol=1e-5)


def test_there_are_never_more_processes_than_images(pydensecrf, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(crf_room, "_crf_pool", lambda pairs, settings, labels, workers: asked.append(workers) or pairs)
    images, maps = zip(*(crf_case(n) for n in range(3)), strict=True)
    given = [(images, maps), (iter(images), maps), (images[:1], maps[:1]), ([], [])]
    assert [len(list(dense_crf(i, m, workers=64, progress=False))) for i, m in given] == [3, 3, 1, 0]
    assert asked == [3, 64]


@a_minute
def test_a_wrong_item_ends_the_pool_under_its_own_name(pydensecrf, children) -> None:
    image, probs = crf_case(6)
    with pytest.raises(InputError, match="probabilities 3 "):
        list(dense_crf([image] * 5, [probs] * 3 + [probs[:, 1:]] * 2, AT_ONCE, workers=2, progress=False))


# --- a process that dies -------------------------------------------------------------------------------------------

def kill_after(seconds: float, children: list[subprocess.Popen], which: int = 0) -> None:
    "From now on, as soon as both processes are there, wait and kill one, whatever it is doing."
    def kill() -> None:
        while len(children) < 2:
            time.sleep(0.001)
        time.sleep(seconds)
        children[which].kill()
    threading.Thread(target=kill).start()


@a_minute
def test_a_process_killed_while_idle_is_reported(pydensecrf, children) -> None:
    results = endless()
    next(results)
    time.sleep(0.3)
    children[0].kill()
    assert_reported(results)


@a_minute
def test_a_process_killed_while_computing_is_reported(pydensecrf, children) -> None:
    results = endless(CRFSettings(), 21, (120, 120))
    next(results)
    kill_after(0.5, children, 1)
    assert_reported(results)


@a_minute
@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(n, marks=pytest.mark.slow) for n in range(6, 20))])
def test_a_process_killed_at_any_moment_is_reported(pydensecrf, children, seed: int) -> None:
    chance = random.Random(seed)
    results = endless(AT_ONCE, 400, (40, 40))  # 2.5 MB each way, and hardly anything to compute
    if seed % 4:  # else while it starts
        next(results)
    kill_after(chance.uniform(0, 0.3), children, seed % 2)
    assert_reported(results)


class KilledHalfway:
    "A pipe to a process that dies in the middle of the first message."

    def __init__(self, process: subprocess.Popen, pipe: object) -> None:
        self.process, self.pipe = process, pipe

    def __getattr__(self, name: str) -> object:
        return getattr(self.pipe, name)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.pipe)

    def die(self) -> None:
        self.pipe.flush()
        self.process.kill()
        self.process.wait()

    def peek(self, size: int) -> bytes:  # pickle is not to read ahead
        return b""

    def read(self, size: int) -> bytes:
        "The first byte of the message, and then no more."
        if self.process.poll() is not None:
            return b""
        begun = self.pipe.read(1)
        self.die()
        return begun

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")
        self.pipe.write(view[:len(view) // 2])
        self.die()
        return len(view) // 2 + self.pipe.write(view[len(view) // 2:])


@a_minute
@pytest.mark.parametrize("direction", ["stdin", "stdout"])
def test_a_process_killed_halfway_through_a_message_is_reported(pydensecrf, children, monkeypatch, direction: str) -> None:
    class Fragile(crf_room._Child):
        def __init__(self) -> None:
            super().__init__()
            setattr(self.process, direction, KilledHalfway(self.process, getattr(self.process, direction)))

    monkeypatch.setattr(crf_room, "_Child", Fragile)
    assert_reported(endless(AT_ONCE, 400, (40, 40)))


@a_minute
@pytest.mark.parametrize("leave", ["close", "forget"])
def test_leaving_early_ends_the_processes_in_the_middle_of_their_work(pydensecrf, children, leave: str) -> None:
    results = endless(MINUTES, 21, (250, 250))
    assert next(results).shape == (2, 5, 6)
    start = time.monotonic()
    if leave == "close":
        results.close()
    del results
    gc.collect()
    assert time.monotonic() - start < 20


# --- what a process says, with a stand-in for pydensecrf that misbehaves ----------------------------------------------

STAND_IN = """
import os, signal, sys
import numpy as np

class Odd(Exception):
    def __init__(self, one, other): super().__init__(one + other)

class DenseCRF2D:
    def __init__(self, *size): self.size = size
    def setUnaryEnergy(self, unary): self.unary = unary
    def addPairwiseGaussian(self, **kernel): pass
    addPairwiseBilateral = addPairwiseGaussian
    def inference(self, iterations):
        {misbehave}
        return np.exp(-self.unary)
"""


@pytest.fixture
def odd_child(children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Makes a process in which `pydensecrf` does as told before it returns the probabilities."
    monkeypatch.syspath_prepend(tmp_path)
    with contextlib.ExitStack() as leaving:
        def make(misbehave: str) -> crf_room._Child:
            (tmp_path / "pydensecrf").mkdir()
            (tmp_path / "pydensecrf" / "densecrf.py").write_text(STAND_IN.format(misbehave=misbehave))
            (tmp_path / "pydensecrf" / "__init__.py").touch()
            return leaving.enter_context(crf_room._Child())
        yield make


@a_minute
def test_what_a_library_prints_goes_to_standard_error(odd_child, capfd: pytest.CaptureFixture) -> None:
    image, probs = crf_case(8)
    child = odd_child("print('stray', flush=True); os.write(1, b'compiled stray' * 10_000)")
    for _ in range(2):
        np.testing.assert_allclose(child.compute(image, probs, AT_ONCE, False), probs.clip(1e-5), rtol=1e-4)
    shown = capfd.readouterr()
    assert "compiled stray" in shown.err and "stray" not in shown.out


@a_minute
def test_what_is_printed_while_python_starts_does_no_harm(odd_child, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('B' * 5000 + '.', end='', flush=True)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    image, probs = crf_case(8)
    labels = odd_child("pass").compute(image, probs, AT_ONCE, True)
    np.testing.assert_array_equal(labels, probs.argmax(0))


@a_minute
def test_an_error_in_a_process_keeps_its_type_and_says_where_it_was(odd_child) -> None:
    child = odd_child("if iterations: raise ValueError('too many')")
    image, probs = crf_case(8)
    with pytest.raises(ValueError, match="^too many$") as caught:
        child.compute(image, probs, CRFSettings(), False)
    assert "in crf_image" in str(caught.value.__cause__)
    assert child.compute(image, probs, AT_ONCE, True).shape == (24, 31)  # an error is no reason to die


@a_minute
def test_an_error_that_cannot_travel_arrives_as_its_text(odd_child) -> None:
    with pytest.raises(RuntimeError, match="^Odd: onetwo$"):
        odd_child("raise Odd('one', 'two')").compute(*crf_case(8), AT_ONCE, False)


@a_minute
def test_a_package_that_only_the_process_lacks_is_an_input_error(odd_child, tmp_path: Path) -> None:
    child = odd_child("pass")
    (tmp_path / "pydensecrf" / "densecrf.py").unlink()
    with pytest.raises(InputError, match="pip install"):
        child.compute(*crf_case(8), AT_ONCE, False)


@a_minute
@pytest.mark.parametrize(("death", "cause"), [("os._exit(3)", "exit status 3"), ("os.kill(os.getpid(), signal.SIGSEGV)", "signal 11, ")])
def test_the_cause_of_death_is_named(odd_child, death: str, cause: str) -> None:
    with pytest.raises(RuntimeError, match=rf"a CRF process died \({cause}.*standard error"):
        odd_child(death).compute(*crf_case(8), AT_ONCE, False)


# --- other programs --------------------------------------------------------------------------------------------------

STREAM = """
import itertools, os, sys, time
import numpy as np
import freqseg.crf as room

class Announced(room._Child):
    def __init__(self):
        super().__init__()
        print(self.process.pid, flush=True)

room._Child = Announced
images = itertools.chain([np.zeros((5, 6, 3), np.uint8)], itertools.repeat(np.zeros((150, 150, 3), np.uint8)))
maps = itertools.chain([np.full((2, 5, 6), 1 / 2)], itertools.repeat(np.full((21, 150, 150), 1 / 21)))
results = room.dense_crf(images, maps, room.CRFSettings(iterations={iterations}), workers=2, progress=False)
next(results)
print("busy", flush=True)
"""


def stream(iterations: int, then: str) -> tuple[subprocess.Popen, list[int]]:
    "A program in a session of its own that has its first result and goes on, and the numbers of its two processes."
    program = subprocess.Popen([sys.executable, "-c", STREAM.format(iterations=iterations) + then], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    lines = [program.stdout.readline().strip() for _ in range(3)]
    assert lines[2] == "busy"
    return program, [int(line) for line in lines[:2]]


@a_minute
@pytest.mark.parametrize("then", ["time.sleep(600)", "for result in results: pass"], ids=["idle", "busy"])
def test_processes_end_with_a_program_that_was_killed(pydensecrf, then: str) -> None:
    program, children = stream(10, then)
    time.sleep(0.5)
    for number in children:
        os.kill(number, 0)  # raises if there is none
    program.kill()
    # They hold the program's standard error: it ends when the last of them has.
    assert program.stderr.read() == "" and program.wait() == -signal.SIGKILL
    program.stdout.close()
    program.stderr.close()


@a_minute
def test_ctrl_c_ends_everything_in_the_middle_of_the_work(pydensecrf) -> None:
    program, children = stream(5_000, "try: next(results)\nexcept KeyboardInterrupt: print('interrupted', flush=True); time.sleep(600)")
    time.sleep(0.5)
    assert [os.getsid(number) for number in children] == children  # a terminal's Ctrl-C does not reach them
    os.killpg(program.pid, signal.SIGINT)
    assert program.stdout.readline() == "interrupted\n"
    for number in children:  # gone while the program lives on
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
    program.kill()
    assert program.stderr.read() == "" and program.wait() == -signal.SIGKILL
    program.stdout.close()
    program.stderr.close()


UNGUARDED = """
import numpy as np
from freqseg.crf import dense_crf

images, maps = [np.zeros((9, 9, 3), np.uint8)] * 5, [np.full((2, 9, 9), 1 / 2)] * 5
print(len(list(dense_crf(images, maps, workers=2))))
"""


@a_minute
@pytest.mark.parametrize("way", ["a file", "standard input"])
def test_scripts_need_no_guard(pydensecrf, tmp_path: Path, way: str) -> None:
    (tmp_path / "script.py").write_text(UNGUARDED)
    (tmp_path / "elsewhere").mkdir()
    command, given = ([sys.executable, "../script.py"], "") if way == "a file" else ([sys.executable, "-"], UNGUARDED)
    if way == "a file":  # the folder one stands in is not where a script's modules come from
        (tmp_path / "elsewhere" / "numpy.py").write_text("raise ImportError('the wrong one')")
    done = subprocess.run(command, input=given, cwd=tmp_path / "elsewhere", text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr
    assert "5/5" in done.stderr and "Error" not in done.stderr


WANDERER = """
import os
import freqseg.crf as room

os.chdir("..")
with room._Child() as child: print(child.process.communicate()[0].decode())
"""


@a_minute
def test_a_process_uses_the_program_s_own_package_after_a_change_of_folder(tmp_path: Path) -> None:
    copy, room = tmp_path / "here" / "freqseg", Path(crf_room.__file__)
    copy.mkdir(parents=True)
    for name in ("__init__.py", "files.py", "memory.py", "options.py", "crf.py"):
        (copy / name).write_bytes((room.parent / name).read_bytes())
    with (copy / "crf.py").open("a") as file:
        file.write("\nprint('the copy', flush=True)\n")
    done = subprocess.run([sys.executable, "-c", WANDERER], cwd=copy.parent, text=True, capture_output=True)
    assert done.stdout.splitlines()[:2] == ["the copy", "the copy"], done.stderr  # in the program, and in its process


@a_minute
def test_neither_the_room_nor_its_processes_import_torch(children) -> None:
    with crf_room._Child() as child:
        command = child.process.args
    for program in ([sys.executable, "-c", "import freqseg.crf"], command):
        done = subprocess.run([program[0], "-X", "importtime", *program[1:]], stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
        assert done.returncode == 0 and "freqseg.crf" in imported
        assert not {name.split(".")[0] for name in imported} & {"torch", "torchvision", "tqdm", "PIL", "matplotlib", "scipy"}


def test_real_pictures_keep_their_clear_labels(pydensecrf, real_data) -> None:
    picture = next(iter(sorted(real_data.rglob("*.jpg"))))
    image = np.asarray(Image.open(picture).convert("RGB").resize((120, 90)))
    bright = image.mean(-1) > np.median(image.mean(-1))
    probs = np.stack([np.where(bright, 0.1, 0.9), np.where(bright, 0.9, 0.1)]).astype(np.float32)
    agreement = (crf_image(image, probs, labels=True) == bright).mean()
    assert agreement > 0.7
