"""freqseg.lists: class names, seen and unseen ones, shipped lists, label tables."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from toy_data import zoo  # noqa: F401 (fixtures)

from freqseg import data, lists
from freqseg.files import InputError, shipped

names = st.lists(st.text("abcdefgh -", min_size=1, max_size=8).map(str.strip).filter(lambda name: name and name != "background"),
                 min_size=1, max_size=6, unique=True)


def test_the_published_zero_shot_splits_have_their_published_indices() -> None:
    assert lists.COCOSTUFF_ZERO_SHOT.unseen_index == [19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160]
    assert lists.VOC_ZERO_SHOT.seen_index == list(range(15))
    assert lists.VOC_ZERO_SHOT.unseen == ("pottedplant", "sheep", "sofa", "train", "tvmonitor")


@given(st.sets(st.sampled_from(lists.VOC_CLASSES), min_size=1, max_size=19))
def test_seen_and_unseen_share_nothing_and_cover_everything(unseen: set[str]) -> None:
    split = lists.zero_shot_split(lists.VOC_CLASSES, sorted(unseen))
    assert sorted(split.seen_index + split.unseen_index) == list(range(20))


@pytest.mark.parametrize(("unseen", "seen", "told"), [
    (["hores"], None, "Did you mean 'horse'"), (["Cat"], None, "Did you mean 'cat'"), (["zzzz"], None, "Known: aeroplane"),
    (["cat"], ["cat", "dog"], "both seen and unseen: cat"), (["cat", "cat"], None, "named twice: cat"), ([], None, "at least one"),
])
def test_a_wrong_zero_shot_split_is_explained(unseen: list[str], seen: list[str] | None, told: str) -> None:
    with pytest.raises(InputError, match=told):
        lists.zero_shot_split(lists.VOC_CLASSES, unseen, seen)


def test_shipped_lists_are_complete_disjoint_and_small() -> None:
    sizes = {("voc", "train"): 1464, ("voc", "train_aug"): 10582, ("voc", "val"): 1449, ("voc", "trainval"): 2913,
             ("coco", "train"): 82081, ("coco", "val"): 40137, ("cocostuff", "val"): 5000}
    assert {key: len(set(lists.shipped_ids(*key))) for key in sizes} == sizes
    assert not set(lists.shipped_ids("voc", "train_aug")) & set(lists.shipped_ids("voc", "val"))
    assert set(lists.shipped_ids("voc", "train")) < set(lists.shipped_ids("voc", "train_aug"))
    assert sum(shipped(f"{name}.npz").stat().st_size for name in ("voc12", "coco14", "cocostuff")) < 1_000_000


@pytest.mark.parametrize(("dataset", "pictures", "classes"), [("voc", 12031, 20), ("coco", 122218, 80)])
def test_every_shipped_picture_has_at_least_one_label(dataset: str, pictures: int, classes: int) -> None:
    table = lists.shipped_labels(dataset)
    assert table.present.shape == (pictures, classes) and table.present.any(1).all() and table.present.any(0).all()


def test_unknown_dataset_and_split_names_get_a_suggestion() -> None:
    with pytest.raises(InputError, match="Did you mean 'train_aug'"): lists.shipped_ids("voc", "trainaug")
    with pytest.raises(InputError, match="Did you mean 'coco'"): lists.shipped_ids("cocoo", "train")
    with pytest.raises(InputError, match="Known: voc, coco"): lists.shipped_labels("cityscapes")


def test_shipped_tables_say_what_the_published_lists_say(real_data: Path) -> None:
    published = real_data / "lists"
    for split in ("train", "train_aug", "val", "trainval"):
        assert lists.shipped_ids("voc", split) == tuple((published / f"{split}.txt").read_text().split())
    with np.load(published / "voc_cls_labels_onehot.npz", allow_pickle=False) as table:
        labels, known = lists.shipped_labels("voc").lookup(table["ids"].tolist())
        assert known.all() and (labels == table["labels"]).all()
    for split in ("train", "val"):
        rows = [line.split() for line in (published / "coco14" / f"{split}.txt").read_text().splitlines()]
        assert lists.shipped_ids("coco", split) == tuple(row[0] for row in rows)
        labels, known = lists.shipped_labels("coco").lookup([row[0][-12:] for row in rows])
        assert known.all() and [set(np.flatnonzero(label).tolist()) for label in labels] == [set(map(int, row[1:])) for row in rows]
    assert lists.shipped_ids("cocostuff", "val") == tuple((published / "coco14" / "cocostuff_val_id.txt").read_text().split())


def test_cocostuff_names_are_the_published_ones_without_the_dropped(real_data: Path) -> None:
    lines = (real_data / "lists" / "coco14" / "cocostuff_labels.txt").read_text().strip().splitlines()
    published = {int(number) - 1: name.strip() for number, name in (line.split(":") for line in lines)}
    assert {lists.COCOSTUFF_CLASSES[index]: published[value] for value, index in data.COCOSTUFF_PUBLISHED.items()} == {
        name: name for name in lists.COCOSTUFF_CLASSES}


@settings(max_examples=40)
@given(classes=names, rows=st.integers(1, 6), draw=st.data())
def test_a_label_table_survives_writing_and_reading(tmp_path_factory, classes: list[str], rows: int, draw) -> None:
    present = draw.draw(arrays(bool, (rows, len(classes))))
    ids, path = [f"p{row}" for row in range(rows)], tmp_path_factory.mktemp("table") / "labels.txt"
    lists.write_labels(path, ids, present, classes)
    again, known = lists.read_labels(path, classes).lookup(ids)
    assert known.all() and (again == present).all()


@pytest.mark.parametrize("text", ["a,cat,dog\r\nb,\r\n", "id,labels\na,\"cat,dog\"\nb,\"\"\n", "id,x\na,cat;dog\nb\n",
                                  "\ufeffa.jpg,dog,cat\nb.jpg,\n"])
def test_label_tables_of_spreadsheets_are_understood(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    labels, known = lists.read_labels(tmp_path / "labels.csv", ("cat", "dog", "eel")).lookup(["a", "b", "c"])
    assert labels.tolist() == [[True, True, False], [False] * 3, [False] * 3] and known.tolist() == [True, True, False]


@pytest.mark.parametrize(("text", "told"), [("p0 ant,fire be", "p0: unknown class 'fire be'. Did you mean 'fire bee'"),
                                            ("p0 ant\np0 ant", "p0 twice")])
def test_a_wrong_label_table_is_explained(zoo: Path, text: str, told: str) -> None:
    (zoo / "labels.txt").write_text(text)
    with pytest.raises(InputError, match=told): data.open_folder(zoo)


def test_lists_with_paths_columns_and_windows_line_ends_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes("\ufeff/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\r\n\r\nb.v2 3 4\r\nc.PNG\r\n".encode())
    assert lists.read_ids(path) == ("2007_000032", "b.v2", "c")


@pytest.mark.parametrize(("text", "told"), [("", "names 0 classes"), ("background\n", "names 0"), ("a\nb\na\n", "a twice"),
                                            ("a,b\n", "comma"), ("\n".join(map(str, range(255))), "255 classes")])
def test_a_wrong_classes_file_is_explained(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(InputError, match=told): lists.read_classes(tmp_path / "classes.txt")


def test_background_on_the_first_line_is_implicit(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("Background\nant\nbee\n")
    assert lists.read_classes(tmp_path / "classes.txt") == ("ant", "bee")
