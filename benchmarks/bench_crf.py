"""Dense CRF on 500 x 375 pictures with 21 labels: freqseg's process pool beside the same calls one after the other.

Run `python benchmarks/bench_crf.py [images]` for a table with the speed-up, with and without the seconds in which
the pool's processes start; `pytest benchmarks/bench_crf.py` for pytest-benchmark's statistics.
"""
import os
import resource
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from freqseg.refine import crf_image, dense_crf

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


def cases(count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    generator = np.random.default_rng(0)
    images = [(255 * smooth(generator, 3)).astype(np.uint8).transpose(1, 2, 0) for _ in range(count)]
    scores = [np.exp(6 * smooth(generator, CLASSES)) for _ in range(count)]
    return images, [(s / s.sum(0)).astype(np.float32) for s in scores]


def finish_times(results: Iterator[np.ndarray]) -> list[float]:
    "Seconds from now at which each result arrives."
    start = time.perf_counter()
    return [time.perf_counter() - start for _ in results]


@pytest.mark.parametrize("workers", sorted({1, CORES}))
def test_dense_crf(benchmark, workers: int) -> None:
    images, scores = cases(2 * workers)
    labels = benchmark.pedantic(lambda: list(dense_crf(images, scores, workers=workers, labels=True, progress=False)), rounds=1)
    assert np.array_equal(labels[0], crf_image(images[0], scores[0], labels=True))


def processor_seconds() -> float:
    "User and system time of this process and of the finished ones it started."
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def main(count: int) -> None:
    images, scores = cases(count)
    before = processor_seconds()
    serial = finish_times(crf_image(i, s, labels=True) for i, s in zip(images, scores, strict=True))
    between = processor_seconds()
    pool = finish_times(dense_crf(images, scores, labels=True, progress=False))
    after = processor_seconds()
    first = 2 * CORES  # from here on every process has started
    steady = (pool[-1] - pool[first - 1]) / (count - first)
    print(f"{count} pictures {SIZE[1]} x {SIZE[0]}, {CLASSES} labels, {CORES} cores")
    print(f"one after the other  {serial[-1] / count:6.2f} s a picture")
    print(f"pool, steady         {steady:6.2f} s a picture   {serial[-1] / count / steady:.2f}x = {serial[-1] / count / steady / CORES:.2f} x cores")
    print(f"pool, with start-up  {pool[-1] / count:6.2f} s a picture   {serial[-1] / pool[-1]:.2f}x = {serial[-1] / pool[-1] / CORES:.2f} x cores")
    # On a busy machine the clock says little; processor time says what the pool itself costs.
    print(f"processor time a picture: {(between - before) / count:.2f} s alone, {(after - between) / count:.2f} s in the pool with start-up")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 24)
