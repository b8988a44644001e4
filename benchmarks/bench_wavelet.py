"""Wavelet transform and its inverse, forward and backward: freqseg beside ptwt, on a (8, 256, 40, 40) map.

Run `python benchmarks/bench_wavelet.py` for a table with ratios, or `pytest benchmarks/bench_wavelet.py` for
pytest-benchmark's statistics of the same calls.
"""
from collections.abc import Callable
import statistics
import time
import ptwt
import pytest
import torch
from torch import Tensor
from freqseg.wavelet import WaveletConv2d, wavedec2, waverec2

SHAPE = (8, 256, 40, 40)
WAVELETS = ("haar", "db2", "db8")
pytestmark = pytest.mark.benchmark


def ours(x: Tensor, wavelet: str) -> Tensor:
    return waverec2(wavedec2(x, wavelet), wavelet)


def peer(x: Tensor, wavelet: str) -> Tensor:
    return ptwt.waverec2(ptwt.wavedec2(x, wavelet, mode="periodic", level=1), wavelet)


PEERS = {"freqseg": ours, "ptwt": peer}


def round_trip(transform: Callable[[Tensor, str], Tensor], wavelet: str) -> Callable[[], None]:
    "Transform, inverse and backward pass as one call."
    x = torch.randn(SHAPE, requires_grad=True)
    upstream = torch.randn(SHAPE)

    def step() -> None:
        x.grad = None
        transform(x, wavelet)[..., : SHAPE[-2], : SHAPE[-1]].backward(upstream)

    return step


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("name", PEERS)
def test_round_trip(benchmark, name: str, wavelet: str) -> None:
    benchmark.group = wavelet
    benchmark.pedantic(round_trip(PEERS[name], wavelet), rounds=7, warmup_rounds=1)
    x = torch.randn(SHAPE)
    assert torch.allclose(PEERS[name](x, wavelet)[..., : SHAPE[-2], : SHAPE[-1]], x, atol=1e-4)


@pytest.mark.parametrize("levels", (1, 2))
def test_wavelet_convolution(benchmark, levels: int) -> None:
    block, x = WaveletConv2d(SHAPE[1], levels=levels), torch.randn(SHAPE)
    benchmark.pedantic(lambda: block(x).sum().backward(), rounds=5, warmup_rounds=1)
    assert all(weight.grad is not None for weight in block.parameters() if weight.requires_grad)


def alternating_medians(steps: dict[str, Callable[[], None]], rounds: int = 9) -> dict[str, float]:
    "Median milliseconds of processor time of each call, in turns: on a busy machine a clock on the wall tells little."
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    print(f"{SHAPE}, one level, forward and backward, one thread, processor time")
    for wavelet in WAVELETS:
        times = alternating_medians({name: round_trip(transform, wavelet) for name, transform in PEERS.items()})
        print(f"{wavelet:5} freqseg {times['freqseg']:7.1f} ms  ptwt {times['ptwt']:7.1f} ms  ratio {times['ptwt'] / times['freqseg']:.1f}x")


if __name__ == "__main__":
    main()
