"""What spectral prompts and the spectral-guided decoder add to a ZegCLIP training step: ViT-B/16 with random weights at 512, forward and backward.

Run `python benchmarks/bench_zero_shot.py [BATCH]` for a table with ratios to the base; forms take turns, one thread, processor time.
Figures: milliseconds per picture of a step, and what autograd keeps for the way back. Random weights: time does not depend on them.
"""
import statistics
import sys
import time

import pytest
import torch

from freqseg.systems.segmenter import system_named
from freqseg.clip import Backbone, load_clip
from freqseg.data import Batch
from freqseg.lists import UNLABELLED, VOC_CLASSES
from freqseg.systems.segmenter import System

pytestmark = pytest.mark.benchmark
SIDE = 512
FORMS = {"ZegCLIP": ("zegclip", {}), "+ spectral prompts": ("zegclip", dict(spectral="1-2", filter_size=SIDE)),
         "+ spectral-guided decoder": ("zegclip", dict(decoder="spectral")), "both, SSIM for dice (SPT-SEG)": ("sptseg", dict(filter_size=SIDE))}


def batch_of(pictures: int) -> Batch:
    "Random pictures with masks of a few seen classes, some pixels without a label."
    masks = torch.randint(0, 4, (pictures, 1, 8, 8)).repeat_interleave(SIDE // 8, 2).repeat_interleave(SIDE // 8, 3)[:, 0]
    return Batch(tuple(map(str, range(pictures))), torch.rand(pictures, 3, SIDE, SIDE), masks.masked_fill(masks == 3, UNLABELLED), None)


def built(backbone: Backbone, form: str) -> System:
    name, options = FORMS[form]
    torch.manual_seed(0)
    return system_named(name).build(backbone, VOC_CLASSES, **options).train()


def step(system: System, batch: Batch) -> int:
    "One forward and backward pass; bytes that autograd kept in between."
    kept: dict[int, int] = {}
    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    system.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): loss = sum(system.training_step(batch, 0.).values())
    loss.backward()
    return sum(kept.values())


def measure(pictures: int, turns: int = 5) -> dict[str, tuple[float, float, int]]:
    "Form -> (milliseconds per picture, ratio to the base, bytes kept per picture), medians over turns."
    torch.set_num_threads(1)
    backbone, batch = load_clip("ViT-B-16", None), batch_of(pictures)
    systems, seconds, kept = {form: built(backbone, form) for form in FORMS}, {form: [] for form in FORMS}, {}
    for system in systems.values(): step(system, batch)
    for _ in range(turns):
        for form, system in systems.items():
            begin = time.process_time()
            kept[form] = step(system, batch)
            seconds[form].append(time.process_time() - begin)
    ratios = {form: statistics.median(own / base for own, base in zip(its, seconds["ZegCLIP"])) for form, its in seconds.items()}
    return {form: (1000 * statistics.median(its) / pictures, ratios[form], kept[form] // pictures) for form, its in seconds.items()}


@pytest.mark.parametrize("form", FORMS)
def test_step(benchmark, form: str) -> None:
    system, batch = built(load_clip("ViT-B-16", None), form), batch_of(1)
    benchmark(step, system, batch)


if __name__ == "__main__":
    print("| training step, ViT-B/16 at 512, random weights | ms a picture | to ZegCLIP | kept for the way back, MiB a picture |\n|---|---:|---:|---:|")
    for form, (milliseconds, ratio, kept) in measure(int(sys.argv[1]) if sys.argv[1:] else 2).items():
        print(f"| {form} | {milliseconds:.0f} | {ratio:.2f} | {kept / 2**20:.0f} |")
