"""Confusion matrices of a VOC-sized evaluation beside torchmetrics, in one run; prints the ratio.

    python benchmarks/bench_metrics.py     the ratios, in processor time
    pytest benchmarks/bench_metrics.py     the same calls through pytest-benchmark

100 masks of 500 x 375 with 21 classes arrive picture by picture, as in an evaluation loop, and one matrix comes out.
`validated` lets torchmetrics check its inputs as freqseg always does.
"""

import time

import pytest
import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from freqseg.metrics import boundary_confusion, confusion_matrix, trimap_confusion

pytestmark = pytest.mark.benchmark

CLASSES, IMAGES, HEIGHT, WIDTH = 21, 100, 375, 500


def two_maskings() -> tuple[torch.Tensor, torch.Tensor]:
    "Prediction and target, int64 (100, 375, 500): patches of 32 pixels, the prediction shifted, 3% ignored."
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(CLASSES, (IMAGES, 12, 16), generator=generator)
    target = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :HEIGHT, :WIDTH].contiguous()
    pred = target.roll(7, 2).contiguous()
    target[:, ::37] = 255
    return pred, target


@pytest.fixture(scope="module")
def masks() -> tuple[torch.Tensor, torch.Tensor]:
    return two_maskings()


def freqseg_matrix(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return sum(confusion_matrix(p, t, CLASSES) for p, t in zip(pred, target, strict=True))


def torchmetrics_matrix(pred: torch.Tensor, target: torch.Tensor, validated: bool = False) -> torch.Tensor:
    metric = MulticlassConfusionMatrix(CLASSES, ignore_index=255, validate_args=validated)
    for p, t in zip(pred, target, strict=True): metric.update(p, t)
    return metric.compute()


@pytest.mark.benchmark(group="confusion matrix, 100 masks")
def test_freqseg_int64(benchmark, masks):
    assert benchmark(freqseg_matrix, *masks).sum() > 0


@pytest.mark.benchmark(group="confusion matrix, 100 masks")
def test_freqseg_uint8(benchmark, masks):
    assert benchmark(freqseg_matrix, *(labels.byte() for labels in masks)).sum() > 0


@pytest.mark.benchmark(group="confusion matrix, 100 masks")
@pytest.mark.parametrize("validated", [False, True])
def test_torchmetrics(benchmark, masks, validated):
    assert benchmark.pedantic(torchmetrics_matrix, (*masks, validated), rounds=3).sum() > 0


@pytest.mark.benchmark(group="contours, 10 masks")
@pytest.mark.parametrize("count", [boundary_confusion, trimap_confusion])
def test_contours(benchmark, masks, count):
    few = [labels[:10].byte() for labels in masks]
    assert benchmark.pedantic(count, (*few, CLASSES), rounds=3).sum() > 0


def best_seconds(call, *arguments, rounds: int = 5) -> float:
    "Least processor time of `rounds`: other work on the machine only ever adds to it."
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call(*arguments)
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    "The same matrix; how many times faster is printed, not asserted."
    torch.set_num_threads(1)
    masks = two_maskings()
    assert (freqseg_matrix(*masks) == torchmetrics_matrix(*masks)).all()
    ours, ours_bytes = best_seconds(freqseg_matrix, *masks), best_seconds(freqseg_matrix, *(m.byte() for m in masks))
    peer, checked = best_seconds(torchmetrics_matrix, *masks), best_seconds(torchmetrics_matrix, *masks, True, rounds=2)
    print(f"confusion matrix, {IMAGES} masks of {WIDTH} x {HEIGHT}, {CLASSES} classes, one thread, processor time")
    print(f"  freqseg      int64 {ours:.3f} s   uint8 {ours_bytes:.3f} s   (inputs checked)")
    print(f"  torchmetrics int64 {peer:.3f} s   validate_args=True {checked:.3f} s")
    print(f"  torchmetrics / freqseg: {peer / ours:.1f} (int64), {peer / ours_bytes:.1f} (uint8), {checked / ours:.1f} (both checked)")


if __name__ == "__main__":
    main()
