"""GradCAM for 8 pictures x 2 classes at 320 x 320, ViT-B/16: freqseg against `pytorch_grad_cam`, in one run.

Both explain y = softmax(s cos(z, t)) over the present classes and 25 background prompts, z = mean of the projected patches, at
the last block's `ln_1` (WeCLIP). The maps are compared before the times are. Random weights: time does not depend on them.

    python benchmarks/bench_gradcam.py [rounds]   both peers and the ratio of their medians
    pytest benchmarks/bench_gradcam.py            the same through pytest-benchmark
"""
import copy, statistics, sys, time, warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from freqseg.cam import grad_cam, normalise_cam
from freqseg.clip import Backbone, load_clip, resize_position_embedding

IMAGES, CLASSES, BACKGROUND, SIZE = 8, 2, 25, 320


class Scores(nn.Module):
    "What pytorch_grad_cam needs: a trainable model from pixels to class scores, here of one fixed image size."

    def __init__(self, backbone: Backbone, prompts: Tensor, grid: tuple[int, int]):
        super().__init__()
        self.visual = copy.deepcopy(backbone.model.visual).requires_grad_(True)
        table = resize_position_embedding(self.visual.positional_embedding.data, backbone.native_grid, grid)
        self.visual.positional_embedding = nn.Parameter(table)
        self.register_buffer("prompts", prompts)
        self.scale = backbone.logit_scale

    def forward(self, images: Tensor) -> Tensor:
        x = self.visual.ln_post(self.visual.transformer(self.visual._embeds(images))) @ self.visual.proj
        return (self.scale * F.normalize(x[:, 1:].mean(1), dim=-1) @ self.prompts.T).softmax(-1)


def prepare(size: int = SIZE) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    "Two functions that return maps (images, classes, size, size) in [0, 1]: ours and pytorch_grad_cam's."
    generator = torch.Generator().manual_seed(0)
    backbone = load_clip("ViT-B-16", pretrained=None)
    # rows close to one another, as CLIP's text embeddings are
    prompts = F.normalize(torch.randn(CLASSES + BACKGROUND, 512, generator=generator) + 2 * torch.randn(512, generator=generator), dim=-1)
    images = torch.randn(IMAGES, 3, size, size, generator=generator)
    h, w = backbone.grid_of(images)
    peer = GradCAM(model := Scores(backbone, prompts, (h, w)), [model.visual.transformer.resblocks[-1].ln_1],
                   lambda tokens: tokens[:, 1:].mT.unflatten(2, (h, w)))
    present = torch.ones(IMAGES, CLASSES, dtype=torch.bool)

    def ours() -> np.ndarray:
        with torch.no_grad(): features = backbone.encode(images, joint=False, last_input=True)
        cam = grad_cam(backbone, features, prompts[:CLASSES], present, prompts[CLASSES:])
        cam = F.interpolate(cam, size=(size, size), mode="bilinear", align_corners=False)
        return normalise_cam(cam).numpy()   # pytorch_grad_cam scales once more after enlarging

    def theirs() -> np.ndarray:
        return np.stack([peer(images, [ClassifierOutputTarget(c)] * IMAGES) for c in range(CLASSES)], 1)

    return ours, theirs


@pytest.fixture(scope="module")
def peers():
    return prepare()


@pytest.mark.benchmark(group="gradcam: 8 images x 2 classes, 320 px")
@pytest.mark.parametrize("who", ["freqseg", "pytorch_grad_cam"])
def test_gradcam_speed(benchmark, peers, who):
    maps = benchmark.pedantic(peers[who != "freqseg"], rounds=3, iterations=1, warmup_rounds=1)
    assert maps.shape == (IMAGES, CLASSES, SIZE, SIZE) and np.isfinite(maps).all()


def main(rounds: int = 3) -> None:
    ours, theirs = prepare()
    warnings.simplefilter("ignore")
    difference = np.abs(ours() - theirs()).max()   # also the warm-up
    assert difference < 1e-3, f"the peers disagree by {difference:.1e}: their times cannot be compared"
    spent: dict[Callable, list[tuple[float, float]]] = {ours: [], theirs: []}
    for _ in range(rounds):
        for peer, seconds in spent.items():
            start = time.perf_counter(), time.process_time()
            peer()
            seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    (fast, fast_cpu), (slow, slow_cpu) = (map(statistics.median, zip(*seconds)) for seconds in spent.values())
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, maps equal to {difference:.1e}")
    print(f"freqseg           {fast:7.2f} s, {fast_cpu:7.2f} s of CPU")
    print(f"pytorch_grad_cam  {slow:7.2f} s, {slow_cpu:7.2f} s of CPU")
    print(f"ratio             {slow / fast:7.1f}    {slow_cpu / fast_cpu:7.1f}      (CPU seconds hold on a busy machine too)")


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
