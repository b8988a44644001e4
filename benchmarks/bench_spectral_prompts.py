"""The spectral prompt, forward and backward, beside complex FFTs of the same result; and a block whose prompts are keys and values only.

Run `python benchmarks/bench_spectral_prompts.py` for tables (one thread, processor time, the forms in turns and medians of their ratios:
a busy machine disturbs these least), or `pytest benchmarks/bench_spectral_prompts.py` for pytest-benchmark's statistics of the same calls.
"""
from collections.abc import Callable
import statistics
import time
import pytest
import torch
from torch import Tensor
from freqseg.clip import Backbone, load_clip
from freqseg.memory import keep_memory
from freqseg.spectral_prompts import PromptedTower, spectral_prompt

BATCH, GRID, WIDTH = 4, (32, 32), 768   # ViT-B/16 on 512 x 512 pixels
PROMPTS = 100                           # as ZegCLIP on COCO-Stuff
Prompt = Callable[[Tensor, Tensor, Tensor], Tensor]   # tokens (B, N, D), CLS (B, D), gain -> S (B, N, D)
pytestmark = pytest.mark.benchmark


def ours(tokens: Tensor, cls: Tensor, gain: Tensor) -> Tensor:
    return spectral_prompt(tokens.mT.unflatten(2, GRID), cls, gain).flatten(2).mT


def real(tokens: Tensor, cls: Tensor, gain: Tensor) -> Tensor:
    "The real FFT where the tokens lie, and autograd's own backward pass."
    product = (tokens * cls[:, None]).unflatten(1, GRID)
    return torch.fft.irfft2(torch.fft.rfft2(product, dim=(1, 2), norm="ortho") * gain, s=GRID, dim=(1, 2), norm="ortho").flatten(1, 2)


def complex_in_place(tokens: Tensor, cls: Tensor, gain: Tensor) -> Tensor:
    "The complex FFT where the tokens lie; the gain is of the whole plane."
    product = (tokens * cls[:, None]).unflatten(1, GRID)
    return torch.fft.ifft2(torch.fft.fft2(product, dim=(1, 2), norm="ortho") * gain, dim=(1, 2), norm="ortho").real.flatten(1, 2)


def complex_turned(tokens: Tensor, cls: Tensor, gain: Tensor) -> Tensor:
    "The complex FFT with each channel turned into a map of its own first; the gain is of the whole plane, (D, h, w)."
    maps = (tokens * cls[:, None]).mT.unflatten(2, GRID)
    return torch.fft.ifft2(torch.fft.fft2(maps, norm="ortho") * gain, norm="ortho").real.flatten(2).mT


def gains() -> dict[str, tuple[Prompt, Tensor]]:
    "Every form with the same gain, each in the layout that suits it."
    half = 0.02 * torch.randn(GRID[0], GRID[1] // 2 + 1, WIDTH, dtype=torch.complex64)
    whole = torch.fft.fft2(torch.fft.irfft2(half, s=GRID, dim=(0, 1)), dim=(0, 1))
    return {"freqseg": (ours, half), "real FFT": (real, half), "complex FFT": (complex_in_place, whole),
            "complex FFT, turned": (complex_turned, whole.permute(2, 0, 1).contiguous())}


def problem() -> tuple[Tensor, Tensor, Tensor]:
    "Patch tokens and CLS as they lie in the tower's sequence, and a gradient from above."
    sequence = torch.randn(BATCH, 1 + GRID[0] * GRID[1], WIDTH)
    return sequence[:, 1:], sequence[:, 0], torch.randn(BATCH, GRID[0] * GRID[1], WIDTH)


def training_step(form: Prompt, gain: Tensor, tokens: Tensor, cls: Tensor, upstream: Tensor) -> Callable[[], list[Tensor]]:
    "Tokens with their prompt, and the gradients of tokens and CLS, as one call."
    def step() -> list[Tensor]:
        learn = [x.detach().requires_grad_() for x in (tokens, cls, gain)]
        prompted = learn[0] + form(*learn)
        prompted.backward(upstream)
        return [prompted.detach(), learn[0].grad, learn[1].grad]

    return step


def kept_for_backward(form: Prompt, gain: Tensor, tokens: Tensor, cls: Tensor) -> int:
    "Bytes that the forward pass keeps for the backward pass, beside its own inputs."
    learn = [x.detach().requires_grad_() for x in (tokens, cls, gain)]
    given, kept = {x.untyped_storage().data_ptr() for x in learn}, {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in given: kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = form(*learn)   # alive while counting, so that no address is used twice
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", ("freqseg", "real FFT", "complex FFT", "complex FFT, turned"))
def test_spectral_prompt(benchmark, one_thread, name: str) -> None:
    forms, given = gains(), problem()
    result = benchmark.pedantic(training_step(*forms[name], *given), rounds=5, warmup_rounds=1)
    for found, expected in zip(result, training_step(*forms["complex FFT"], *given)(), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def block_step(literal: bool, backbone: Backbone, tower: PromptedTower, x: Tensor) -> Callable[[], Tensor]:
    "One block of the tower with its prompts, forward and backward: in the sequence and dropped afterwards, or as keys and values only."
    def step() -> Tensor:
        if literal: y = backbone.block(0, torch.cat([x[:, :1], tower.prompts(0, len(x)), x[:, 1:]], 1))
        else: y = tower._block(0, backbone.blocks[0], x)
        y = torch.cat([y[:, :1], y[:, -GRID[0] * GRID[1]:]], 1)
        y.square().mean().backward()
        return y.detach()

    return step


def blocks() -> dict[str, Callable[[], Tensor]]:
    "Both forms of a ViT-B/16 block with random weights, on one picture."
    backbone = load_clip("ViT-B-16", pretrained=None)
    tower = PromptedTower(backbone, PROMPTS, spectral=(), dropout=0.0)
    x = torch.randn(1, 1 + GRID[0] * GRID[1], WIDTH, requires_grad=True)
    return {"freqseg": block_step(False, backbone, tower, x), "in the sequence": block_step(True, backbone, tower, x)}


@pytest.mark.parametrize("name", ("freqseg", "in the sequence"))
def test_block(benchmark, one_thread, name: str) -> None:
    forms = blocks()
    result = benchmark.pedantic(forms[name], rounds=3, warmup_rounds=1)
    torch.testing.assert_close(result, forms["freqseg"](), atol=1e-4, rtol=1e-4)


def in_turns(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    "Milliseconds of processor time of each call, the calls in turns, a first round left out."
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if number: spent[name].append(1e3 * (time.process_time() - start))
    return spent


def table(spent: dict[str, list[float]], first: str = "freqseg") -> dict[str, str]:
    "Median milliseconds, and how many times longer than `first`, as the median over the rounds."
    ratios = {name: statistics.median(a / b for a, b in zip(times, spent[first], strict=True)) for name, times in spent.items()}
    return {name: f"{name:<20} {statistics.median(times):7.1f} ms  {ratios[name]:5.2f}x" for name, times in spent.items()}


def main() -> None:
    torch.set_num_threads(1)
    keep_memory()   # as in training: what fresh pages cost is not the question
    forms, given = gains(), problem()
    print(f"spectral prompt, {BATCH} pictures, {GRID[0]} x {GRID[1]} patches, width {WIDTH}, forward and backward, one thread, processor time")
    lines = table(in_turns({name: training_step(form, gain, *given) for name, (form, gain) in forms.items()}, rounds=15))
    for name, (form, gain) in forms.items():
        print(f"{lines[name]}   keeps {kept_for_backward(form, gain, *given[:2]) / 2**20:5.1f} MiB for the backward pass")
    print(f"a block with {PROMPTS} prompts, one picture")
    print(*table(in_turns(blocks(), rounds=9)).values(), sep="\n")


if __name__ == "__main__":
    main()
