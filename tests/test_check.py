"""freqseg.work.check: what is wrong with a dataset folder, and a list of what is not."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from freqseg import data, lists, pictures
from freqseg.work import check
from freqseg.work.check import check_folder
from freqseg.files import InputError


def make_folder(root: Path, splits: dict[str, list[str]]) -> Path:
    "A whole custom folder: 6 x 8 pictures, class 1 (ant) in each mask and in the label table."
    ids = list(dict.fromkeys(name for listed in splits.values() for name in listed))
    for folder in ("JPEGImages", "ImageSets/Segmentation"): (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("ant\nbee\n")
    for split, listed in splits.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(listed))
    for index, name in enumerate(ids):
        picture = np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(picture).save(root / "JPEGImages" / f"{name}.jpg")
        pictures.write_mask(root / "SegmentationClass" / f"{name}.png", np.eye(6, 8, dtype=np.uint8))
    lists.write_labels(root / "labels.txt", ids, np.array([[True, False]] * len(ids)), ("ant", "bee"))
    return root


@pytest.fixture
def ants(tmp_path: Path) -> Path:
    "A whole folder with lists train (a, b, c) and val (d)."
    return make_folder(tmp_path / "ants", {"train": ["a", "b", "c"], "val": ["d"]})


def damage(root: Path, name: str, kind: str) -> None:
    "Do to picture `name` of the folder what `kind` says."
    picture, mask = root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png"
    labels = (root / "labels.txt").read_text()
    if kind == "missing picture": picture.unlink()
    elif kind == "damaged picture": picture.write_bytes(picture.read_bytes()[:-60])
    elif kind == "missing mask": mask.unlink()
    elif kind == "bad mask": pictures.write_mask(mask, np.full((6, 8), 9))
    elif kind == "size mismatch": pictures.write_mask(mask, np.eye(6, 7, dtype=np.uint8))
    elif kind == "missing labels": (root / "labels.txt").write_text(labels.replace(f"{name} ant\n", ""))
    elif kind == "label without mask": (root / "labels.txt").write_text(labels.replace(f"{name} ant", f"{name} ant,bee"))
    elif kind == "mask without label": pictures.write_mask(mask, np.eye(6, 8, dtype=np.uint8) * 2 + np.eye(6, 8, 1, dtype=np.uint8))


KINDS = ["missing picture", "damaged picture", "missing mask", "bad mask", "size mismatch", "missing labels",
         "label without mask", "mask without label"]


def test_a_whole_folder_is_ok_and_counted(ants: Path) -> None:
    report = check_folder(ants, progress=False)
    assert report.ok and not report.findings and (report.pictures, report.masks) == (4, 4)
    assert report.table().splitlines()[-1] == "ok" and "train 3, val 1" in report.table()


@pytest.mark.parametrize("kind", KINDS)
def test_each_damage_is_found_under_its_name_and_nothing_else(ants: Path, kind: str) -> None:
    damage(ants, "b", kind)
    report = check_folder(ants, progress=False)
    assert [(finding.id, finding.kind) for finding in report.findings] == [("b", kind)]
    assert report.ok == (kind in check.WARNINGS) and report.broken_ids == (frozenset() if report.ok else {"b"})
    assert kind in report.table() and ("warning" in report.table()) == report.ok


@settings(max_examples=25)
@given(st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(KINDS)))
def test_the_fixed_list_trains_and_the_broken_ones_are_exactly_those_left_out(tmp_path_factory, damages: dict[str, str]) -> None:
    root = make_folder(tmp_path_factory.mktemp("ants") / "ants", {"train": list("abcdefg")})
    for name, kind in damages.items(): damage(root, name, kind)
    report = check_folder(root, progress=False)
    report.write_fixed_list(root / "ImageSets" / "Segmentation" / "whole.txt")
    whole = data.open_folder(root, "whole", masks=True)
    assert all(whole[index].mask.shape == (6, 8) for index in range(len(whole)))
    assert set(whole.ids) == set("abcdefg") - {name for name, kind in damages.items() if kind in check.ERRORS}
    assert check_folder(root, "whole", progress=False).ok


def test_details_name_file_value_and_count(ants: Path) -> None:
    damage(ants, "a", "bad mask")
    damage(ants, "c", "bad mask")
    report = check_folder(ants, progress=False)
    assert "a.png: mask value 9 on 48 pixels" in report.table() and "c.png" not in report.table()
    assert "c.png" in report.table(every=True)


def test_a_split_without_masks_is_fine_and_one_with_some_is_not(ants: Path) -> None:
    for name in "abc": damage(ants, name, "missing mask")
    assert check_folder(ants, progress=False).ok
    assert check_folder(ants, "train", masks=True, progress=False).broken_ids == {"a", "b", "c"}
    damage(ants, "d", "bad mask")
    assert not check_folder(ants, progress=False).ok
    assert check_folder(ants, masks=False, progress=False).ok


def test_pictures_in_two_splits_are_looked_at_once_and_doubled_ids_are_reported(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "ants", {"train": ["a", "b", "b"], "trainval": ["a", "b", "c"]})
    damage(root, "a", "missing picture")
    report = check_folder(root, progress=False)
    assert report.pictures == 3
    assert sorted((finding.id, finding.kind) for finding in report.findings) == [("a", "missing picture"), ("b", "listed twice")]
    assert report.write_fixed_list(tmp_path / "new.txt", "train").read_text() == "b\n"


def test_the_fixed_list_needs_one_split_and_something_to_write(ants: Path, tmp_path: Path) -> None:
    report = check_folder(ants, progress=False)
    with pytest.raises(InputError, match="say which one"): report.write_fixed_list(tmp_path / "list.txt")
    with pytest.raises(InputError, match="was not checked"): report.write_fixed_list(tmp_path / "list.txt", "test")
    damage(ants, "d", "missing picture")
    with pytest.raises(InputError, match="no picture of split 'val' is whole"):
        check_folder(ants, "val", progress=False).write_fixed_list(tmp_path / "list.txt")
    assert not (tmp_path / "list.txt").exists()


def test_a_folder_without_layout_or_lists_is_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dataset folder"): check_folder(tmp_path)
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "classes.txt").write_text("ant\n")
    with pytest.raises(InputError, match="has no lists"): check_folder(tmp_path)


def test_progress_shows_how_far_it_is(ants: Path, capsys: pytest.CaptureFixture) -> None:
    check_folder(ants, "train")
    assert "checking train" in (told := capsys.readouterr().err) and "3/3" in told


@pytest.mark.slow
def test_many_processes_report_what_one_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "ants", {"train": [f"p{index:03d}" for index in range(70)]})
    for index, kind in enumerate(KINDS): damage(root, f"p{9 * index:03d}", kind)
    alone = check_folder(root, workers=1, progress=False)
    monkeypatch.setattr(check, "_SMALL", 10)
    assert check_folder(root, workers=2, progress=False).findings == alone.findings != ()


def test_real_voc_folders_are_whole(real_data: Path) -> None:
    report = check_folder(real_data / "voc12_mini", "val", progress=False)
    assert report.ok and report.dataset == "voc" and (report.pictures, report.masks) == (60, 60)


def test_a_truncated_real_picture_is_found(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "voc12_mini"
    (tmp_path / "JPEGImages").mkdir()
    name = lists.read_ids(source / "ImageSets" / "Segmentation" / "val.txt")[0]
    content = (source / "JPEGImages" / f"{name}.jpg").read_bytes()
    (tmp_path / "JPEGImages" / f"{name}.jpg").write_bytes(content[:-len(content) // 10])
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text(name)
    report = check_folder(tmp_path, progress=False)
    assert [finding.kind for finding in report.findings] == ["damaged picture"] and "truncated" in report.findings[0].detail
