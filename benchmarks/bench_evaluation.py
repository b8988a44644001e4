"""Evaluation at three scales and mirrored, with a dense CRF: are all cores busy?

The network works in one process, with one thread per core unless told otherwise, CRFs in a pool beside it: while they are
computed, the next pictures are looked at. Cores used = processor time of all processes / time on the clock. Other work on the
machine takes cores away, so what was to be had is measured, too: as many plain loops as there are cores, side by side. WeCLIP,
untrained, on the world's CLIP.

    python benchmarks/bench_evaluation.py [pictures] [threads]
    pytest benchmarks/bench_evaluation.py
"""
import importlib.util, os, resource, subprocess, sys, tempfile, time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from freqseg.clip import load_clip
from freqseg.data import SegmentationFolder, open_folder
from freqseg.work.evaluation import evaluate_system
from freqseg.systems.weclip import WeCLIP
from freqseg.world.scenes import write_world

CORES, SCALES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), (1.0, 1.25, 1.5)
pytestmark = pytest.mark.benchmark


def pictures(folder: Path, count: int) -> SegmentationFolder:
    "Scenes of the world, on disk."
    write_world(str(folder), train=0, val=count, test=0, size=224, workers=1)
    return open_folder(folder, "val", masks=True)


def processor_seconds() -> float:
    "User and system time of this process and of the finished ones it started."
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def cores_used(work: Callable[[], object]) -> tuple[float, float, float]:
    "Cores, seconds on the clock, seconds of processor time."
    clock, processor = time.perf_counter(), processor_seconds()
    work()
    clock, processor = time.perf_counter() - clock, processor_seconds() - processor
    return processor / clock, clock, processor


LOOP = "import time\nend = time.perf_counter() + {seconds}\nwhile time.perf_counter() < end: pass"

def cores_to_be_had(seconds: float = 2) -> float:
    "How many cores plain loops get, one process per core: what other work on the machine leaves."
    def loops() -> None:
        running = [subprocess.Popen([sys.executable, "-c", LOOP.format(seconds=seconds)]) for _ in range(CORES)]
        assert [process.wait() for process in running] == [0] * CORES
    return cores_used(loops)[0]


def evaluation(dataset: SegmentationFolder, crf: str | None) -> Callable[[], object]:
    "Seed, mask and seg of a WeCLIP that has learned nothing."
    system = WeCLIP.build(load_clip("world"), dataset.classes).eval()
    return lambda: evaluate_system(system, dataset, scales=SCALES, crf=crf, samples=10, examples=1, progress=False)


@pytest.mark.parametrize("crf", [None, "weclip"])
def test_evaluation(benchmark, one_thread, tmp_path: Path, crf: str | None) -> None:
    if crf: pytest.importorskip("pydensecrf", reason="pydensecrf2 is not installed")
    report = benchmark.pedantic(evaluation(pictures(tmp_path / "world", 4), crf), rounds=1)
    assert report.images == 4


def main(count: int = 6, threads: int = CORES) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        dataset = pictures(Path(folder) / "world", count)
        print(f"{count} scenes of 224 x 224, {len(SCALES)} scales, mirrored, seed + mask + seg, dense CRF of mask and seg, world CLIP; {threads} threads, {CORES} cores")
        for crf in (None, "weclip") if importlib.util.find_spec("pydensecrf") else (None,):
            before, (cores, clock, processor), after = cores_to_be_had(), cores_used(evaluation(dataset, crf)), cores_to_be_had()
            print(f"{'with CRF' if crf else 'without':<9} {clock / count:6.2f} s a picture, {processor / count:6.2f} s of processor time: {cores:.2f} cores used"
                  f"   (plain loops got {before:.2f} before, {after:.2f} after)", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
