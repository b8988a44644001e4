"""The frozen tower beside its own matrix products: how much of the time goes into what cannot be left out.

The products alone have the tower's shapes, random data and the same number of threads: for every block the four of its linear
layers and the two of its attention, before them that of the patches. What remains is the tower's overhead: normalisation,
softmax, activations, residuals, and taking out what a method asks for.

    python benchmarks/bench_encoder.py [threads]     pictures per second of both, and the share reached
    pytest benchmarks/bench_encoder.py               the same calls through pytest-benchmark

Processor time, medians over rounds that alternate.
"""
import statistics, sys, time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from freqseg.clip import Backbone, load_clip

IMAGES, SIZE = 4, 320
REQUESTS = {   # what is asked for beside running all blocks
    "tokens of all blocks but the last (a prediction)": lambda depth: dict(tokens=range(depth - 1), joint=False),
    "tokens, attention of 8 blocks, last input (WeCLIP's training)":
        lambda depth: dict(tokens=range(depth - 1), attention=range(depth - 8, depth), qkv=(depth - 1,), joint=False, last_input=True),
    "embeddings in joint space": lambda depth: dict(joint=True),
}
pytestmark = pytest.mark.benchmark


def products(backbone: Backbone, blocks: int) -> Callable[[], None]:
    "The matrix products of so many blocks, on random data."
    n, width, heads = (SIZE // backbone.patch_size) ** 2 + 1, backbone.width, backbone.heads
    rows, hidden = IMAGES * n, backbone.blocks[0].mlp.c_fc.out_features
    pixels, patches = torch.randn(IMAGES * (n - 1), 3 * backbone.patch_size ** 2), torch.randn(3 * backbone.patch_size ** 2, width)
    sides = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
    linear = [(torch.randn(rows, a), torch.randn(b, a).T) for a, b in sides]
    query, key, value = (torch.randn(IMAGES * heads, n, width // heads) for _ in range(3))
    mixing = torch.rand(IMAGES * heads, n, n)

    def run() -> None:
        pixels @ patches
        for _ in range(blocks):
            for a, b in linear: a @ b
            query @ key.mT
            mixing @ value
    return run


def blocks_of(request: dict, depth: int) -> int:
    "How many blocks run to their end."
    return depth if request["joint"] else max(request["tokens"]) + 1


def calls(backbone: Backbone, images: Tensor, name: str) -> tuple[Callable[[], object], Callable[[], None]]:
    "The tower on this request, and its products."
    request = REQUESTS[name](backbone.depth)
    def tower() -> object:
        with torch.no_grad(): return backbone.encode(images, **request)
    return tower, products(backbone, blocks_of(request, backbone.depth))


def alternating_medians(pair: tuple[Callable[[], object], ...], rounds: int) -> list[float]:
    "Seconds of processor time of each call."
    spent: list[list[float]] = [[] for _ in pair]
    for _ in range(rounds + 1):   # the first round warms up
        for call, seconds in zip(pair, spent, strict=True):
            start = time.process_time()
            call()
            seconds.append(time.process_time() - start)
    return [statistics.median(seconds[1:]) for seconds in spent]


@pytest.fixture(scope="module")
def problem() -> tuple[Backbone, Tensor]:
    return load_clip("ViT-B-16", pretrained=None), torch.randn(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.benchmark(group=f"frozen ViT-B/16, {IMAGES} x {SIZE}")
@pytest.mark.parametrize("part", ["tower", "products"])
def test_encoder(benchmark, problem, part: str) -> None:
    benchmark.pedantic(calls(*problem, next(iter(REQUESTS)))[part == "products"], rounds=2, warmup_rounds=1)
    assert benchmark.stats["rounds"] == 2


def main(threads: int = 1, rounds: int = 3) -> None:
    torch.set_num_threads(threads)
    backbone, images = load_clip("ViT-B-16", pretrained=None), torch.randn(IMAGES, 3, SIZE, SIZE)
    print(f"frozen ViT-B/16, {IMAGES} pictures of {SIZE} x {SIZE}, fp32, {threads} thread(s), processor time")
    for name in REQUESTS:
        tower, alone = alternating_medians(calls(backbone, images, name), rounds)
        print(f"{name:<62} {IMAGES / tower:5.2f} pictures/s   products alone {IMAGES / alone:5.2f}   share reached {alone / tower:4.0%}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
