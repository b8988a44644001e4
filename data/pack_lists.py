"""Pack id lists and image-level label tables into the small npz files that ship beside this script.

    python data/pack_lists.py FOLDER

FOLDER holds, as their publishers give them: `train.txt`, `train_aug.txt`, `val.txt` (one VOC id per line),
`voc_cls_labels_onehot.npz` (arrays `ids` and `labels`, 12,031 x 20), `coco14/train.txt` and `coco14/val.txt`
(`COCO_train2014_<12 digits> class class ...`, classes 0-79) and `coco14/cocostuff_val_id.txt` (one 12-digit id per line).
Nothing is pickled; `freqseg.data` reads the result with `allow_pickle=False`."""
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def voc_number(name: str) -> int:
    "2007_000032 -> 2007000032"
    year, number = name.split("_")
    return int(year) * 1_000_000 + int(number)


def pack_voc(folder: Path) -> None:
    "All ids of train_aug and val, one membership bit per split, and one label bit per class."
    with np.load(folder/"voc_cls_labels_onehot.npz", allow_pickle=False) as table:
        ids, labels = table["ids"].tolist(), table["labels"].astype(bool)
    order = np.argsort([voc_number(name) for name in ids])
    member = np.zeros(len(ids), np.uint8)
    for bit, split in enumerate(("train", "train_aug", "val")):
        listed = set((folder/f"{split}.txt").read_text().split())
        member |= np.array([name in listed for name in ids], np.uint8) << bit
    numbers = np.array([voc_number(name) for name in ids], np.uint32)
    np.savez_compressed(HERE/"voc12.npz", numbers=numbers[order], member=member[order], labels=np.packbits(labels[order], axis=1))


def pack_coco(folder: Path) -> None:
    "Image numbers as differences (small numbers compress well) and one label bit per class, class-major."
    arrays = {}
    for split in ("train", "val"):
        rows = [line.split() for line in (folder/"coco14"/f"{split}.txt").read_text().splitlines()]
        labels = np.zeros((len(rows), 80), bool)
        for row, (_, *present) in enumerate(rows): labels[row, [int(index) for index in present]] = True
        arrays[f"{split}_steps"] = np.diff([int(row[0][-12:]) for row in rows], prepend=0).astype(np.uint16)
        arrays[f"{split}_labels"] = np.packbits(labels.T, axis=1)
    np.savez_compressed(HERE/"coco14.npz", **arrays)


def pack_cocostuff(folder: Path) -> None:
    "The 5,000 validation images, as differences."
    numbers = [int(line) for line in (folder/"coco14"/"cocostuff_val_id.txt").read_text().split()]
    np.savez_compressed(HERE/"cocostuff.npz", val_steps=np.diff(numbers, prepend=0).astype(np.uint16))


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    for pack in (pack_voc, pack_coco, pack_cocostuff): pack(Path(sys.argv[1]))
