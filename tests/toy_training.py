"""A system of three convolutions that obeys the trainer's protocol, and a program that trains it, for tests that kill processes."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqseg.data import Batch, open_folder
from freqseg.transforms import TrainTransform
from freqseg.work.train import TrainSettings, fit, seeded


class Toy(nn.Module):
    "Shown the masks. Its losses are means over images, so passes and processes of equal size average to those of the whole."

    def __init__(self, classes: tuple[str, ...], width: int = 8, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"width": width, "dropout": dropout}
        self.classes, self.num_classes = tuple(classes), len(classes) + 1
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.progress: list[float] = []
        with seeded(seed):
            self.net = nn.Sequential(nn.Conv2d(3, width, 5, 4, 2), nn.GELU(), nn.Dropout2d(dropout), nn.Conv2d(width, self.num_classes, 1))

    def training_step(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        self.seen += 1
        self.progress.append(progress)
        logits = F.interpolate(self.predict(batch.images), batch.masks.shape[1:], mode="bilinear")
        losses = F.cross_entropy(logits, batch.masks, ignore_index=255, reduction="none").mean((1, 2))
        return {"segmentation": losses.mean(), "decay": 1e-3 * logits.square().mean()}

    def predict(self, images: Tensor) -> Tensor:
        return self.net(images)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.net[0].parameters()), "lr_scale": 0.5}, {"params": list(self.net[3].parameters()), "lr_scale": 1.0}]

    def trainable_state(self) -> dict[str, Tensor]:
        return self.state_dict()

    def load_trainable(self, state: Mapping[str, Tensor]) -> None:
        self.load_state_dict(state)


def main() -> None:
    "Train the toy: --data FOLDER --out FOLDER and any setting as JSON."
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    parser.add_argument("--dropout", type=float, default=0.0)
    given = parser.parse_args()
    train = open_folder(given.data, "train", TrainTransform(32))
    val = open_folder(given.data, "val")
    fit(Toy(train.classes, dropout=given.dropout), train, given.out, TrainSettings(**given.settings), val)


if __name__ == "__main__":
    main()
