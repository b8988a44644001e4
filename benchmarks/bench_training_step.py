"""One training step of WeCLIP, 4 crops of 320 x 320 with 2 classes each, ViT-B/16: freqseg beside one picture, one class at a time.

The peer is what one writes first with the package `grad-cam`: the same mathematics, the same decoder, losses and optimiser, but
tower, GradCAM, affinity and PAR run for one picture after the other, and GradCAM for one class after the other. How much of the
tower `grad-cam` is shown makes a large difference, so there are three of these peers:

    whole tower    the package as its README uses it: a model from pixels to scores, gradients of all its weights
    one gradient   the same, but nothing before the explained layer asks for a gradient
    last block     only the last block is shown, fed with the tokens that enter it; what WeCLIP's own code does

Weights are random: time does not depend on them. Pseudo-labels and losses are compared before times are.

    python benchmarks/bench_training_step.py [rounds]    ratios, peak memory, and where the time of our step goes
    pytest benchmarks/bench_training_step.py             the same steps through pytest-benchmark

One thread and processor time, which other work on the machine disturbs least.
"""
import copy, re, resource, statistics, subprocess, sys, time, warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scipy import ndimage
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from freqseg.clip import Features, load_clip, resize_position_embedding
from freqseg.data import Batch
from freqseg.lists import VOC_CLASSES
from freqseg.decoders import token_affinity
from freqseg.losses import affinity_loss, balanced_cross_entropy, pair_labels
from freqseg.systems.segmenter import enlarged
from freqseg.systems.weclip import WeCLIP
import freqseg.systems.weclip as weclip_room

IMAGES, CLASSES, SIZE, LATE = 4, 2, 320, 1.0   # progress 1: the decoder takes part in the affinity
PEERS = ("whole tower", "one gradient", "last block")
pytestmark = pytest.mark.benchmark


# --- the peer ------------------------------------------------------------------------------------------------------

class Scores(nn.Module):
    "What `grad-cam` needs: a trainable model from pixels, or from the tokens that enter the last block, to class scores."

    def __init__(self, system: WeCLIP, how: str):
        super().__init__()
        self.visual = copy.deepcopy(system.backbone.model.visual).requires_grad_(how == "whole tower")
        self.explained, self.scale, self.embed = self.visual.transformer.resblocks[-1].ln_1, system.backbone.logit_scale, system.backbone.embed
        self.explained.requires_grad_(True)
        self.blocks = self.visual.transformer.resblocks[-1:] if how == "last block" else self.visual.transformer.resblocks
        if how == "whole tower":   # a table of positions of this size, differentiated as every other weight
            grid = (SIZE // system.backbone.patch_size,) * 2
            self.visual.positional_embedding = nn.Parameter(resize_position_embedding(
                self.visual.positional_embedding.data, system.backbone.native_grid, grid))

    def tokens(self, x: Tensor) -> Tensor:
        "What enters the first of the blocks."
        if x.ndim == 3: return x
        return self.visual._embeds(x) if self.visual.conv1.weight.requires_grad else self.embed(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks: x = block(x)
        z = (self.visual.ln_post(x) @ self.visual.proj)[:, 1:].mean(1)
        return (self.scale * F.normalize(z, dim=-1) @ self.prompts.T).softmax(-1)


class GridCAM(GradCAM):
    "`GradCAM` with maps on the grid of patches: WeCLIP walks them over the affinity before it enlarges them."
    def get_target_width_height(self, input_tensor: Tensor) -> tuple[int, int]:
        return SIZE // 16, SIZE // 16


def neighbours(x: Tensor, dilations: tuple[int, ...]) -> Tensor:
    "(C, H, W) -> (C, 8 per dilation, H, W), edges replicated: a dilated convolution with a single 1 per direction."
    kernel = torch.eye(9)[[0, 1, 2, 3, 5, 6, 7, 8]].view(8, 1, 3, 3)
    return torch.cat([F.conv2d(F.pad(x[:, None], (d,) * 4, mode="replicate"), kernel, dilation=d) for d in dilations], 1)


def plain_par(image: Tensor, scores: Tensor, iterations: int = 20, dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)) -> Tensor:
    "Pixel-adaptive refinement of one picture (3, H, W) and its scores (k, H, W)."
    colours = neighbours(image, dilations)
    likeness = -((colours - image[:, None]) / (colours.std(1, keepdim=True) + 1e-8) / 0.3).square().mean(0)
    distance = torch.tensor([d * r for d in dilations for r in (2 ** .5, 1, 2 ** .5, 1, 1, 2 ** .5, 1, 2 ** .5)])
    nearness = -(distance / (distance.std() + 1e-8) / 0.3).square()
    weights = likeness.softmax(0) + 0.01 * nearness.softmax(0)[:, None, None]
    for _ in range(iterations): scores = (neighbours(scores, dilations) * weights).sum(1)
    return scores


def boxes(cam: np.ndarray, threshold: float) -> np.ndarray:
    "Where the boxes around the strong regions of one map lie."
    mask = np.zeros_like(cam)
    for box in ndimage.find_objects(ndimage.label(cam >= threshold * cam.max(), np.ones((3, 3)))[0]): mask[box] = 1
    return mask


def plain_affinity(attention: Tensor, reference: Tensor) -> Tensor:
    "WeCLIP's affinity of one picture from the last blocks' attention (L, N, N) and the decoder's affinity (N, N)."
    distance = (reference - attention).sum((1, 2))
    affinity = attention[distance <= distance.mean() * (1 + 1e-6)].mean(0) * reference   # sums of 160,000 numbers are not exact
    for _ in range(3):
        affinity = affinity / affinity.sum(0, keepdim=True)
        affinity = affinity / affinity.sum(1, keepdim=True)
    affinity = (affinity + affinity.T) / 2
    return affinity @ affinity


@dataclass
class Peer:
    "WeCLIP's training step, one picture and one class at a time."
    system: WeCLIP
    how: str

    def __post_init__(self) -> None:
        self.scores = Scores(self.system, self.how)
        side = SIZE // self.system.backbone.patch_size
        self.cam = GridCAM(self.scores, [self.scores.explained], lambda tokens: tokens[:, 1:].mT.unflatten(2, (side, side)))

    def maps(self, image: Tensor, features: Features, present: Tensor) -> np.ndarray:
        "GradCAM (k, h, w) of one picture."
        self.scores.prompts = torch.cat([self.system.text[present], self.system.background])
        shown = features.last_residual if self.how == "last block" else image[None]
        return np.concatenate([self.cam(shown, [ClassifierOutputTarget(c)]) for c in range(int(present.sum()))])

    def pseudo_label(self, image: Tensor, normalised: Tensor, features: Features, present: Tensor, reference: Tensor) -> Tensor:
        "Labels (H, W) of one picture."
        o = self.system.options
        cam = self.maps(normalised, features, present)
        boxed = torch.from_numpy(cam * np.stack([boxes(one, o.box) for one in cam])).flatten(1)
        last = range(self.system.backbone.depth - o.late_layers, self.system.backbone.depth)
        affinity = plain_affinity(torch.stack([features.attention[block][0, 1:, 1:] for block in last]), reference)
        walked = (affinity @ boxed.T).T
        low, high = walked.amin(1, keepdim=True), walked.amax(1, keepdim=True)
        walked = ((walked - low) / (high - low + 1e-7)).view(cam.shape)
        scores = F.interpolate(walked[None], image.shape[-2:], mode="bilinear", align_corners=False)[0]
        best = plain_par(image, torch.cat([1 - scores.amax(0, keepdim=True), scores])).argmax(0)
        return torch.cat([torch.zeros(1, dtype=torch.int64), present.nonzero()[:, 0] + 1])[best]

    def training_step(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        system, images = self.system, self.system.backbone.normalise(batch.images)
        features = [system.look(image[None]) for image in images]
        decoded = system.decoder([torch.cat([f.tokens[block] for f in features]) for block in system.token_blocks])
        related = token_affinity(decoded.features)
        labels = torch.stack([self.pseudo_label(*one) for one in zip(batch.images, images, features, batch.labels, related.detach())])
        return {"seg": balanced_cross_entropy(enlarged(decoded.logits, labels), labels),
                "affinity": system.options.affinity_weight * affinity_loss(related, *pair_labels(labels, features[0].grid, system.options.radius))}


# --- the step ------------------------------------------------------------------------------------------------------

def pictures() -> Batch:
    "Smooth random pictures, so that PAR has outlines to find, with two classes each."
    generator = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.rand(IMAGES, 3, 20, 20, generator=generator), (SIZE, SIZE), mode="bicubic").clamp(0, 1)
    labels = torch.zeros(IMAGES, len(VOC_CLASSES), dtype=torch.bool)
    for row in range(IMAGES): labels[row, torch.randperm(len(VOC_CLASSES), generator=generator)[:CLASSES]] = True
    return Batch(tuple(map(str, range(IMAGES))), images, None, labels)


def build_system() -> WeCLIP:
    "WeCLIP on a tower and a decoder with random weights, and prompts close to one another, as CLIP's are."
    torch.manual_seed(0)
    system = WeCLIP.build(load_clip("ViT-B-16", pretrained=None), VOC_CLASSES).train()
    for block in system.backbone.blocks:   # sharper attention, for random maps are all alike and rounding would choose among them
        block.attn.in_proj_weight[:2 * system.backbone.width] *= 4
    generator = torch.Generator().manual_seed(0)
    common = 2 * torch.randn(system.text.shape[1], generator=generator)
    for prompts in (system.text, system.background):
        prompts.copy_(F.normalize(torch.randn(prompts.shape, generator=generator) + common, dim=-1))
    return system


class Step:
    "One optimiser step of a system, or of the peer on it, as a call; keeps the last losses and pseudo-labels."

    def __init__(self, form: str):
        self.system, self.batch = build_system(), pictures()
        self.form = self.system if form == "freqseg" else Peer(self.system, form)
        self.optimiser = torch.optim.AdamW(self.system.parameter_groups()[0]["params"], lr=1e-4)

    def losses(self) -> dict[str, Tensor]:
        torch.manual_seed(1)   # dropout falls alike
        return self.form.training_step(self.batch, LATE)

    def __call__(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        sum(self.losses().values()).backward()
        self.optimiser.step()


@contextmanager
def noted() -> Iterator[list[Tensor]]:
    "The pseudo-labels that the losses are given meanwhile."
    found = []
    rooms = [(room, room.balanced_cross_entropy) for room in (weclip_room, sys.modules[__name__])]
    for where, loss in rooms: where.balanced_cross_entropy = lambda logits, labels, loss=loss: found.append(labels) or loss(logits, labels)
    try: yield found
    finally:
        for where, loss in rooms: where.balanced_cross_entropy = loss


def answers(step: Step) -> tuple[Tensor, list[float]]:
    "Pseudo-labels and losses, before anything is learned."
    with noted() as labels: losses = [float(loss) for loss in step.losses().values()]
    return labels[0], losses


def agreement(ours: Step, peer: Step) -> float:
    "Share of pixels with the same pseudo-label. Raises if the two do not compute the same."
    (labels, losses), (theirs, their_losses) = answers(ours), answers(peer)
    share = float((labels == theirs).float().mean())
    assert share > 0.999, f"{peer.form.how}: only {share:.2%} of the pseudo-labels agree: the times cannot be compared"
    assert np.allclose(losses, their_losses, rtol=1e-3), f"{peer.form.how}: losses {their_losses} instead of {losses}"
    assert len(labels.unique()) > 2, "the pseudo-labels are all background: nothing was compared"
    return share


# --- where the time goes -------------------------------------------------------------------------------------------

PRODUCTS = ("addmm", "mm", "bmm", "baddbmm", "convolution", "scaled_dot_product")
PARTS = {"look": "frozen encoder", "grad_cam": "GradCAM", "affinity": "affinity", "assign": "pseudo-labels, PAR", "decode": "decoder forward"}

class Clock(TorchDispatchMode):
    "Processor time by part of the step, and within each part that of the matrix products."

    def __init__(self) -> None:
        super().__init__()
        self.part, self.spent, self.products = "losses", Counter(), Counter()

    def __torch_dispatch__(self, operator, types, given=(), options=None):
        start = time.thread_time()
        try: return operator(*given, **(options or {}))
        finally:
            name = operator.name().removeprefix("aten::").lstrip("_").split(".")[0]
            if name.startswith(PRODUCTS): self.products[self.part] += time.thread_time() - start

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        before, self.part, start, inner = self.part, part, time.thread_time(), self.spent.total()
        try: yield
        finally:
            self.spent[part] += time.thread_time() - start - (self.spent.total() - inner)   # its own time, without parts inside
            self.part = before

    def watch(self, system: WeCLIP) -> None:
        "From now on, the system's methods count as parts."
        for name, part in PARTS.items():
            def timed(*given, method=getattr(system, name), part=part, **options):
                with self.within(part): return method(*given, **options)
            setattr(system, name, timed)


def profiled(step: Step) -> Clock:
    "One step under the clock."
    clock = Clock()
    clock.watch(step.system)
    with clock:
        step.optimiser.zero_grad(set_to_none=True)
        with clock.within("losses"): losses = step.losses()
        with clock.within("backward: decoder, losses"): sum(losses.values()).backward()
        with clock.within("optimiser"): step.optimiser.step()
    return clock


def print_profile(clock: Clock) -> None:
    total, frozen = clock.spent.total(), ("frozen encoder", "GradCAM")
    print(f"where our step goes   {'s':>6} {'share':>7} {'of it in matrix products':>26}")
    for part, seconds in clock.spent.most_common():
        print(f"{part:<26}{seconds:6.2f} {seconds / total:7.1%} {clock.products[part] / max(seconds, 1e-9):18.0%}")
    inside = sum(clock.products[part] for part in frozen)
    print(f"matrix products of the frozen encoder: {clock.products['frozen encoder'] / total:.0%} of the step forward, "
          f"{inside / total:.0%} with GradCAM's pass back through its last block")


# --- side by side --------------------------------------------------------------------------------------------------

def peak_megabytes(form: str) -> tuple[float, float]:
    "Resident memory of a fresh process before its first step and at its peak, in MB."
    told = subprocess.run([sys.executable, __file__, "--memory", form], check=True, capture_output=True, text=True).stdout
    before, peak = map(float, told.split()[-2:])
    return before, peak


def resident_peak() -> float:
    "Most memory that was resident so far, MB. Linux's own figure, for `ru_maxrss` begins with that of the parent."
    status = Path("/proc/self/status")
    if status.exists(): return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def report_memory(form: str) -> None:
    "What the fresh process does."
    torch.set_num_threads(1)
    step = Step(form)
    before = resident_peak()
    step()
    print(before, resident_peak())


def processor_seconds(step: Callable[[], None], rounds: int) -> float:
    "Median processor time of a call."
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        step()
        spent.append(time.process_time() - start)
    return statistics.median(spent)


@pytest.mark.benchmark(group=f"training step: {IMAGES} crops of {SIZE}, {CLASSES} classes each")
@pytest.mark.parametrize("form", ["freqseg", *PEERS])
def test_training_step(benchmark, one_thread, form: str) -> None:
    step = Step(form)
    if form != "freqseg": assert agreement(Step("freqseg"), step) > 0.999
    benchmark.pedantic(step, rounds=1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in step.system.decoder.parameters())


def main(rounds: int = 3) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ours = Step("freqseg")
    print(f"{IMAGES} crops of {SIZE} x {SIZE}, {CLASSES} classes each, ViT-B/16 with random weights, fp32, one thread, torch {torch.__version__}")
    print_profile(profiled(ours))
    seconds, memory = processor_seconds(ours, rounds), peak_megabytes("freqseg")   # the first step made the optimiser's moments
    print(f"\n{'':<22}{'CPU s a step':>12}{'ratio':>8}{'MB before':>11}{'MB at peak':>12}   pseudo-labels as ours")
    print(f"{'freqseg':<22}{seconds:12.2f}{1:8.1f}{memory[0]:11.0f}{memory[1]:12.0f}", flush=True)
    for how in PEERS:
        peer, fresh = Step(how), Step("freqseg")   # one peer in memory at a time
        same = agreement(fresh, peer)
        theirs, memory = processor_seconds(peer, max(1, rounds // 2)), peak_megabytes(how)
        print(f"grad-cam, {how:<12}{theirs:12.2f}{theirs / seconds:8.1f}{memory[0]:11.0f}{memory[1]:12.0f}   {same:.4%}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]: report_memory(sys.argv[2])
    else: main(*map(int, sys.argv[1:]))
