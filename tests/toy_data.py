"""A small data folder for tests."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from freqseg import pictures

GREEN = (0, 200, 0)
masks = arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def noise(seed: int = 0, height: int = 24, width: int = 32) -> np.ndarray:
    "Random pixels, (height, width, 3) uint8."
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_list(root: Path, split: str, ids: list[str]) -> None:
    "A list file of a folder in VOC layout."
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(ids) + "\n")


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    "A custom folder: four pictures, two classes, masks, a label table, lists train (3) and val (1)."
    root = tmp_path / "zoo"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "classes.txt").write_text("ant\nfire bee\n")
    for index in range(4):
        Image.fromarray(noise(index)).save(root / "JPEGImages" / f"p{index}.jpg")
        mask = np.zeros((24, 32), np.uint8)
        mask[4:12, 4:20] = 1 + index % 2
        pictures.write_mask(root / "SegmentationClass" / f"p{index}.png", mask)
    write_list(root, "train", ["p0", "p1", "p2"])
    write_list(root, "val", ["p3"])
    (root / "labels.txt").write_text("p0 ant\np1 fire bee\np2 ant\np3 fire bee, ant\n")
    return root
