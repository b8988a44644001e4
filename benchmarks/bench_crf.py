"""Dense CRF on 500 x 375 pictures with 21 labels: freqseg's pool of processes beside the same calls one after the other.

Run `python benchmarks/bench_crf.py [images]` for a table; `pytest benchmarks/bench_crf.py` for pytest-benchmark's
statistics. Cores that share memory and caches do not give twice the speed of one. What the machine itself can give is
measured too: as many plain processes as the pool has, each with its own share of the pictures and nothing to send. The
pool is timed once all its processes work, from the first picture to the last result, and once more with their start. It can do
better than plain processes, because its children keep the memory they once had.
"""
import importlib.util
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from freqseg.crf import crf_image, dense_crf

SIZE, CLASSES = (375, 500), 21
CORES = len(os.sched_getaffinity(0))
pytestmark = pytest.mark.benchmark


def smooth(generator: np.random.Generator, channels: int) -> np.ndarray:
    "Random `(channels, H, W)` maps in [0, 1] that vary over about 50 pixels, as pictures and scores do."
    coarse = generator.random((channels, SIZE[0] // 50 + 2, SIZE[1] // 50 + 2))
    rows, columns = (np.linspace(0, coarse.shape[axis] - 1.001, n) for axis, n in ((1, SIZE[0]), (2, SIZE[1])))
    i, j, y, x = rows.astype(int)[:, None], columns.astype(int), rows[:, None] % 1, columns % 1
    top, bottom = ((1 - x) * coarse[:, k, j] + x * coarse[:, k, j + 1] for k in (i, i + 1))
    return (1 - y) * top + y * bottom


def case(number: int) -> tuple[np.ndarray, np.ndarray]:
    "Picture `(H, W, 3)` uint8 and probabilities `(21, H, W)` float32; the same for the same number in any process."
    generator = np.random.default_rng(number)
    image, scores = (255 * smooth(generator, 3)).astype(np.uint8), np.exp(6 * smooth(generator, CLASSES))
    return np.ascontiguousarray(image.transpose(1, 2, 0)), (scores / scores.sum(0)).astype(np.float32)


def cases(numbers: Iterable[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    images, scores = zip(*map(case, numbers), strict=True)
    return list(images), list(scores)


def one_after_the_other(images: list[np.ndarray], scores: list[np.ndarray]) -> float:
    "Seconds for all."
    start = time.perf_counter()
    for image, probs in zip(images, scores, strict=True):
        crf_image(image, probs, labels=True)
    return time.perf_counter() - start


def pool_seconds(images: list[np.ndarray], scores: list[np.ndarray], workers: int, warm: bool) -> float:
    "Seconds for all; if `warm`, counted from the moment at which all processes have started and wait."
    begin = [time.perf_counter()]
    tiny = np.zeros((4, 4, 3), np.uint8), np.full((CLASSES, 4, 4), 1 / CLASSES, np.float32)
    first = 4 * workers if warm else 0

    def pictures() -> Iterator[np.ndarray]:
        for _ in range(first):
            yield tiny[0]
        if warm:
            time.sleep(5)
            begin[0] = time.perf_counter()
        yield from images

    results = dense_crf(pictures(), [tiny[1]] * first + scores, workers=workers, labels=True, progress=False)
    assert sum(1 for _ in results) == first + len(images)
    return time.perf_counter() - begin[0]


def share(numbers: range) -> None:
    "What one plain process does: make its pictures, say so, wait for the start, compute, say so."
    work = cases(numbers)
    crf_image(work[0][0][:4, :4], work[1][0][:, :4, :4])  # loads the compiled code
    print("ready", flush=True)
    sys.stdin.readline()
    one_after_the_other(*work)
    print("done", flush=True)


def plain_processes(count: int, workers: int) -> list[subprocess.Popen]:
    "As many plain processes as `workers`, which have made their shares of `count` pictures and wait for the start."
    command, environment = [sys.executable, __file__, "--share"], {**os.environ, "OMP_NUM_THREADS": "1"}
    plain = [subprocess.Popen([*command, str(first), str(count), str(workers)], text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, env=environment) for first in range(workers)]
    assert [process.stdout.readline() for process in plain] == ["ready\n"] * workers
    return plain


def independent_seconds(plain: list[subprocess.Popen]) -> float:
    "Seconds from the common start of waiting processes until the last has done its share."
    start = time.perf_counter()
    for process in plain:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.stdout.readline() for process in plain] == ["done\n"] * len(plain)
    return time.perf_counter() - start


@pytest.mark.parametrize("workers", sorted({1, CORES}))
def test_dense_crf(benchmark, workers: int) -> None:
    images, scores = cases(range(2 * workers))
    labels = benchmark.pedantic(lambda: list(dense_crf(images, scores, workers=workers, labels=True, progress=False)), rounds=1)
    assert np.array_equal(labels[0], crf_image(images[0], scores[0], labels=True))


def test_independent_processes(benchmark) -> None:
    plain = plain_processes(2 * CORES, CORES)
    assert benchmark.pedantic(independent_seconds, (plain,), rounds=1) > 0
    assert [process.communicate() and process.returncode for process in plain] == [0] * CORES


def processor_seconds() -> float:
    "User and system time of this process and of the finished ones it started."
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def main(count: int) -> None:
    if importlib.util.find_spec("pydensecrf") is None: return print("left out: pydensecrf2 is not installed (pip install 'freqseg[crf]')")
    work = cases(range(count))
    clock = [processor_seconds()]
    serial = one_after_the_other(*work) / count
    clock.append(processor_seconds())
    cold = pool_seconds(*work, CORES, warm=False) / count
    clock.append(processor_seconds())
    warm = pool_seconds(*work, CORES, warm=True) / count
    plain = independent_seconds(plain_processes(count, CORES)) / count
    print(f"{count} pictures {SIZE[1]} x {SIZE[0]}, {CLASSES} labels, {CORES} cores")
    print(f"one after the other    {serial:6.3f} s a picture")
    for name, seconds in (("independent processes", plain), ("pool, started", warm), ("pool, with its start", cold)):
        print(f"{name:<22} {seconds:6.3f} s a picture   {serial / seconds:5.2f}x = {serial / seconds / CORES:.2f} x cores"
              f" = {plain / seconds:.2f} x independent processes")
    # On a busy machine the clock says little; processor time says what the pool itself costs.
    alone, pooled = (after - before for before, after in zip(clock, clock[1:], strict=False))
    print(f"processor time a picture: {alone / count:.3f} s alone, {pooled / count:.3f} s in the pool with its start")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--share"]:
        share(range(*map(int, sys.argv[2:])))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
