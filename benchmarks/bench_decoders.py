"""One training step of the decoder's fusion: freqseg's two products beside a loop over the blocks, plain PyTorch.

Run `python benchmarks/bench_decoders.py` for a table with ratios (one thread, processor time: a busy machine disturbs it
least), or `pytest benchmarks/bench_decoders.py` for pytest-benchmark's statistics of the same calls.
"""
from collections.abc import Callable
import time
import pytest
import torch
from torch import Tensor, nn
import torch.nn.functional as F
from freqseg.decoders import BlockFusion

# blocks, pictures, side of the grid, width
SIZES = {"ViT-B/16, 320 x 320": (11, 4, 20, 768), "world CLIP, 112 x 112": (5, 8, 14, 128)}
Fusion = Callable[[BlockFusion, list[Tensor]], Tensor]
pytestmark = pytest.mark.benchmark


def ours(fusion: BlockFusion, tokens: list[Tensor]) -> Tensor:
    return fusion(tokens)


def batched(fusion: BlockFusion, tokens: list[Tensor]) -> Tensor:
    "Both layers batched over the blocks, the fusion after them."
    hidden = fusion.inner(torch.stack([x.flatten(2).mT for x in tokens]).flatten(1, 2)).relu()
    fused = fusion.fuse(fusion.outer(hidden).transpose(0, 1).flatten(1))
    return fused.unflatten(0, (len(tokens[0]), -1)).mT.unflatten(2, tokens[0].shape[2:])


def looped(fusion: BlockFusion, tokens: list[Tensor]) -> Tensor:
    "An MLP per block, one after the other."
    weights = zip(fusion.inner.weight, fusion.inner.bias, fusion.outer.weight, fusion.outer.bias, strict=True)
    maps = [F.linear(F.linear(x.flatten(2).mT, w1, b1).relu(), w2, b2) for x, (w1, b1, w2, b2) in zip(tokens, weights, strict=True)]
    return fusion.fuse(torch.cat(maps, -1)).mT.unflatten(2, tokens[0].shape[2:])


FORMS: dict[str, Fusion] = {"freqseg": ours, "batched": batched, "loop": looped}


def problem(size: str) -> tuple[BlockFusion, list[Tensor]]:
    "A fusion and tokens laid out as the backbone gives them: channels last, the CLS token sliced off."
    blocks, batch, side, width = SIZES[size]
    tokens = [torch.randn(batch, side * side + 1, width)[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for _ in range(blocks)]
    return BlockFusion(width, blocks), tokens


def training_step(form: Fusion, fusion: nn.Module, tokens: list[Tensor], half: bool = False) -> Callable[[], None]:
    "Forward and backward pass as one call, optionally under bfloat16 autocast."
    def step() -> None:
        fusion.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            fused = form(fusion, tokens)
        fused.float().square().mean().backward()

    return step


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FORMS)
def test_fusion(benchmark, name: str, size: str) -> None:
    benchmark.group = size
    fusion, tokens = problem(size)
    benchmark.pedantic(training_step(FORMS[name], fusion, tokens), rounds=5, warmup_rounds=1)
    assert torch.allclose(FORMS[name](fusion, tokens), looped(fusion, tokens), atol=1e-4)


def least_seconds(steps: dict[str, Callable[[], None]], rounds: int = 7) -> dict[str, float]:
    "Least processor time of each call; rounds alternate."
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    torch.set_num_threads(1)
    for size in SIZES:
        for half in (False, True):
            problems = problem(size)
            best = least_seconds({name: training_step(form, *problems, half) for name, form in FORMS.items()})
            print(f"{size:22} {'bfloat16' if half else 'float32':8}", *(f"  {name} {1e3 * t:6.1f} ms" for name, t in best.items()),
                  f"  loop/freqseg {best['loop'] / best['freqseg']:.2f}x")


if __name__ == "__main__":
    main()
