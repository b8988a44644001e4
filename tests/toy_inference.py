"""A system with fixed random weights and a folder of squares, for tests."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from freqseg.data import SegmentationFolder, open_folder
from freqseg.lists import write_labels
from freqseg.pictures import write_mask

NAMES = ("disc", "box", "bar")
PATCH = 4
SIZES = ((24, 32), (32, 24), (24, 32), (21, 30), (24, 32), (32, 24), (24, 32))   # of the toy pictures
QUIET = dict(progress=False, samples=20)
MEAN = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)


class Toy(torch.nn.Module):
    "A system with fixed random weights: patches of 4 pixels, tokens of width 8, one nonlinearity so that averages are not trivial."

    def __init__(self, names: tuple[str, ...] = NAMES, seed: int = 0) -> None:
        super().__init__()
        self.classes, self.num_classes = tuple(names), len(names) + 1
        generator = torch.Generator().manual_seed(seed)
        self.embed = torch.nn.Parameter(torch.randn(8, 3, PATCH, PATCH, generator=generator))
        self.head = torch.nn.Parameter(torch.randn(self.num_classes, 8, 1, 1, generator=generator))
        self.backbone = SimpleNamespace(patch_size=PATCH, device=torch.device("cpu"), normalise=lambda pixels: pixels - MEAN)
        self.config = {"seed": seed}
        self.asked: list[tuple[int, ...]] = []

    def predict(self, images: torch.Tensor, keep=None) -> torch.Tensor:
        assert not any(side % PATCH for side in images.shape[-2:]) and not self.training
        self.asked.append(tuple(images.shape))
        tokens = F.conv2d(images, self.embed, stride=PATCH)
        return F.conv2d(torch.tanh(tokens if keep is None else keep(tokens)), self.head)

    def cam(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        maps = self.predict(images)[:, 1:].sigmoid()
        return maps / maps.amax((2, 3), keepdim=True) * labels[..., None, None]

    def explain(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cams = self.cam(images, labels)
        large = F.interpolate(cams, images.shape[-2:], mode="bilinear")
        return cams, torch.cat([torch.full_like(large[:, :1], 0.7), large], 1).argmax(1)


def write_folder(folder: Path, sizes=SIZES, seed: int = 0, split: str = "val") -> Path:
    "Pictures of random squares with their masks, labels and list."
    generator = np.random.default_rng(seed)
    names = [f"{split}_{index}" for index in range(len(sizes))]
    present = np.zeros((len(sizes), len(NAMES)), bool)
    for row, (name, (height, width)) in enumerate(zip(names, sizes)):
        image = generator.integers(0, 90, (height, width, 3), np.uint8)
        mask = np.zeros((height, width), np.uint8)
        for value in generator.permutation(3)[:2] + 1:
            top, left = generator.integers(0, height - 9), generator.integers(0, width - 9)
            mask[top:top + 9, left:left + 9], image[top:top + 9, left:left + 9, value - 1] = value, 230
        mask[:2] = 255
        present[row, [value - 1 for value in np.unique(mask) if value not in (0, 255)]] = True
        (folder / "JPEGImages").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"JPEGImages/{name}.png")
        write_mask(folder / f"SegmentationClass/{name}.png", mask)
    lists = folder / "ImageSets/Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    earlier = dict(line.split(" ", 1) for line in (folder / "labels.txt").read_text().splitlines()) if (folder / "labels.txt").exists() else {}
    write_labels(folder / "labels.txt", names, present, NAMES)
    with open(folder / "labels.txt", "a") as file:
        file.writelines(f"{name} {rest}\n" for name, rest in earlier.items())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy") / "data"
    return write_folder(write_folder(root), SIZES[:4], seed=1, split="test")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> SegmentationFolder:
    return open_folder(folder, "val", masks=True)


@pytest.fixture
def system() -> Toy:
    return Toy().eval()


def by_hand(system: Toy, image: Image.Image, scales, flip: bool, average: str = "logits", keep=None) -> torch.Tensor:
    "Scores (C, H, W) of one picture, one view at a time: resize, pad with the mean, predict, enlarge, crop, mirror back, average."
    found = []
    for scale in scales:
        width, height = (max(1, round(side * scale)) for side in image.size)
        pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC))).permute(2, 0, 1).float() / 255 - MEAN
        for mirrored in (False, True)[:1 + flip]:
            shown = pixels.flip(-1) if mirrored else pixels
            logits = system.predict(F.pad(shown, (0, -width % PATCH, 0, -height % PATCH))[None], keep)
            # Pixel centres of the result, in tokens of the padded showing.
            y, x = ((torch.arange(n) + 0.5) * side / n / (PATCH * tokens) * 2 - 1
                    for n, side, tokens in zip((image.height, image.width), (height, width), logits.shape[-2:]))
            places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
            scores = F.grid_sample(logits, places, mode="bilinear", padding_mode="border", align_corners=False)[0]
            scores = scores.softmax(0) if average == "probabilities" else scores
            found.append(scores.flip(-1) if mirrored else scores)
    return torch.stack(found).mean(0)


class ZeroShotToy(Toy):
    "Every class by itself, seen ones held back."
    activation = "sigmoid"

    def __init__(self, handicap: float) -> None:
        super().__init__(seed=3)
        self.num_classes, self.handicap = len(self.classes), handicap*torch.tensor([1., 0., 1.])

    def predict(self, images, keep=None): return super().predict(images, keep)[:, 1:]
