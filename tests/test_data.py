"""freqseg.data: layouts, listings, samples, batches."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from toy_data import masks, noise, write_list, zoo  # noqa: F401 (fixtures)

from freqseg import data, lists, pictures, transforms
from freqseg.data import SegmentationFolder
from freqseg.files import InputError
from freqseg.lists import IGNORE
from freqseg.transforms import TrainTransform


def test_a_zero_shot_view_has_no_background_and_hides_unseen_classes(zoo: Path) -> None:
    listing, split = data.list_folder(zoo, "train"), lists.zero_shot_split(["ant", "fire bee"], ["fire bee"])
    plain, all_classes, training = (SegmentationFolder(one, masks=True) for one in (
        listing, data.zero_shot_view(listing, split), data.zero_shot_view(listing, split, lists.UNLABELLED)))
    assert (all_classes.num_classes, all_classes.listing.value_names) == (2, ("ant", "fire bee")) and len(training) == len(plain)
    for before, shown, hidden in zip(plain, all_classes, training):
        assert np.array_equal(shown.mask, np.array([255, 0, 1] + [9]*252 + [255])[before.mask])
        assert np.array_equal(hidden.mask, np.array([255, 0, 254] + [9]*252 + [255])[before.mask])
    assert all_classes.listing.labels is not None and training.listing.labels is None and training[0].labels is None


def test_a_zero_shot_view_renumbers_published_masks() -> None:
    listing = data.Listing(Path("."), "cocostuff", "val", lists.COCOSTUFF_CLASSES, False, (), (), (), None, None, data.COCOSTUFF_PUBLISHED)
    view = data.zero_shot_view(listing, lists.COCOSTUFF_ZERO_SHOT, IGNORE)
    assert view.mapping[0] == 0 and view.mapping[20] == IGNORE and view.mapping[181] == 170 and len(view.mapping) == 171   # value 20 is the cow


def test_smaller_shares_are_parts_of_larger_ones(zoo: Path) -> None:
    listing = data.list_folder(zoo, "train")
    one, two = data.thinned(listing, .1), data.thinned(listing, .67)
    assert len(one.ids) == 1 and len(two.ids) == 2 and set(one.ids) <= set(two.ids) and data.thinned(listing, 1).ids == listing.ids
    row = listing.ids.index(one.ids[0])
    assert one.images[0] == listing.images[row] and (one.labels[0] == listing.labels[row]).all() and SegmentationFolder(one, masks=True)[0].mask is not None
    for share in (0, 1.5):
        with pytest.raises(InputError, match="share="): data.thinned(listing, share)


def test_masks_are_numbered_as_in_the_files(zoo: Path) -> None:
    listing = data.list_folder(zoo, "train")
    view = data.zero_shot_view(listing, lists.zero_shot_split(listing.classes, ["ant"]))
    assert view.file_values(np.array([[0, 1, 255]])).tolist() == [[1, 2, 255]] and listing.file_values(np.array([[0, 2]])).tolist() == [[0, 2]]


def test_a_split_of_other_classes_is_refused(zoo: Path) -> None:
    with pytest.raises(InputError, match="aeroplane is in one"): data.zero_shot_view(data.list_folder(zoo, "train"), lists.VOC_ZERO_SHOT)


def test_a_custom_folder_opens_with_its_names_labels_and_masks(zoo: Path) -> None:
    train = data.open_folder(zoo)
    sample = train[1]
    assert (len(train), train.num_classes, train.classes) == (3, 3, ("ant", "fire bee"))
    assert sample.id == "p1" and sample.labels.tolist() == [False, True] and set(np.unique(sample.mask)) == {0, 2}
    assert train.labels.tolist() == [[True, False], [False, True], [True, False]] and train.listing.value_names[0] == "background"


def test_masks_are_never_opened_when_not_wanted(zoo: Path) -> None:
    for path in (zoo / "SegmentationClass").iterdir(): path.write_bytes(b"not a mask")
    assert [sample.mask for sample in (data.open_folder(zoo, masks=False)[index] for index in range(3))] == [None] * 3
    with pytest.raises(InputError, match="cannot be decoded"): data.open_folder(zoo)[0]


def test_labels_do_not_come_from_masks(zoo: Path) -> None:
    (zoo / "labels.txt").unlink()
    train = data.open_folder(zoo)
    assert train[0].labels is None and train[0].mask is not None
    with pytest.raises(InputError, match="labels_from_masks"): _ = train.labels


def test_a_label_table_can_be_made_from_masks_once_and_on_request(zoo: Path) -> None:
    with pytest.raises(InputError, match="exists"): data.labels_from_masks(zoo)
    data.labels_from_masks(zoo, overwrite=True)
    assert (zoo / "labels.txt").read_text().splitlines() == ["p0 ant", "p1 fire bee", "p2 ant", "p3 fire bee"]


@pytest.mark.parametrize("suffix", [".jpeg", ".JPG", ".png"])
def test_pictures_of_other_suffixes_are_found(zoo: Path, suffix: str) -> None:
    for path in list((zoo / "JPEGImages").iterdir()):
        Image.open(path).save(path.with_suffix(suffix))
        if suffix != ".JPG" or path.with_suffix(suffix) != path: path.unlink()
    assert len([sample for sample in (data.open_folder(zoo)[index] for index in range(3))]) == 3


def test_missing_files_are_counted_before_anything_starts(zoo: Path) -> None:
    (zoo / "JPEGImages" / "p1.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 3 ids of 'train' have no picture .*first: p1"): data.open_folder(zoo)
    (zoo / "SegmentationClass" / "p3.png").unlink()
    with pytest.raises(InputError, match="no mask"): data.open_folder(zoo, "val", masks=True)
    assert data.open_folder(zoo, "val")[0].mask is None


def test_a_partial_label_table_is_an_error_and_an_empty_match_is_none(zoo: Path) -> None:
    (zoo / "labels.txt").write_text("p0 ant\n")
    with pytest.raises(InputError, match="2 of 3 ids .* no line in the label table"): data.open_folder(zoo)
    assert data.open_folder(zoo, "val")[0].labels is None


def test_a_mask_of_another_size_is_an_error_and_a_turned_one_says_why(zoo: Path) -> None:
    pictures.write_mask(zoo / "SegmentationClass" / "p0.png", np.zeros((24, 30), np.uint8))
    with pytest.raises(InputError, match="30 x 24 but its picture 32 x 24. Export"): data.open_folder(zoo)[0]
    note = Image.Exif()
    note[0x0112] = 8
    Image.fromarray(noise(1)).save(zoo / "JPEGImages" / "p1.jpg", exif=note)
    with pytest.raises(InputError, match="32 x 24 but its picture 24 x 32. .*EXIF"): data.open_folder(zoo)[1]
    pictures.write_mask(zoo / "SegmentationClass" / "p1.png", np.zeros((32, 24), np.uint8))
    assert data.open_folder(zoo)[1].image.size == (24, 32)


@pytest.mark.parametrize(("opener", "told"), [
    (data.open_voc, "looked for JPEGImages/; found notes.txt, other/"), (data.open_folder, "no classes.txt; found notes.txt"),
    (data.open_coco, "looked for JPEGImages/train/.*found notes.txt"), (data.open_cocostuff, "looked for images/train2017/"),
    (data.open_dataset, "no dataset folder: looked for classes.txt .*found notes.txt"),
])
def test_a_folder_without_the_layout_is_told_what_was_sought_and_found(tmp_path: Path, opener, told: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=told): opener(tmp_path)
    with pytest.raises(InputError, match="not there"): opener(tmp_path / "absent")
    with pytest.raises(InputError, match="a file"): opener(tmp_path / "notes.txt")


def test_an_unknown_split_lists_the_known_ones(zoo: Path) -> None:
    with pytest.raises(InputError, match="split 'test': .*the folder has train, val"): data.open_folder(zoo, "test")


def make_voc(root: Path, ids: tuple[str, ...]) -> Path:
    "A VOC folder of small noise pictures with masks of class 7 (car)."
    (root / "JPEGImages").mkdir(parents=True)
    for name in ids:
        Image.fromarray(noise()).save(root / "JPEGImages" / f"{name}.jpg")
        pictures.write_mask(root / "SegmentationClass" / f"{name}.png", np.full((24, 32), 7, np.uint8))
    return root


def test_lists_in_a_voc_folder_come_before_the_shipped_ones(tmp_path: Path) -> None:
    ids = lists.shipped_ids("voc", "val")[:3]
    root = make_voc(tmp_path / "VOCdevkit" / "VOC2012", ids)
    with pytest.raises(InputError, match="1446 of 1449 ids"): data.open_voc(root, "val")
    write_list(root, "val", list(ids))
    voc = data.open_voc(tmp_path, "val", masks=True)
    assert voc.ids == ids and voc.num_classes == 21
    assert (voc.labels.numpy() == lists.shipped_labels("voc").lookup(ids)[0]).all()
    assert data.detect_dataset(tmp_path) == "voc" and data.dataset_splits(tmp_path) == ["val"]


def test_augmented_masks_come_before_plain_ones(tmp_path: Path) -> None:
    ids = lists.shipped_ids("voc", "train")[:2]
    root = make_voc(tmp_path, ids)
    pictures.write_mask(root / "SegmentationClassAug" / f"{ids[0]}.png", np.full((24, 32), 9, np.uint8))
    voc = data.open_voc(root, ids=ids)
    assert [sample.mask.max() for sample in (voc[0], voc[1])] == [9, 7]
    assert data.dataset_splits(root) == ["train_aug", "val"]


def test_voc_test_has_no_shipped_list_or_labels(tmp_path: Path) -> None:
    root = make_voc(tmp_path, ("2008_000006",))
    with pytest.raises(InputError, match="no list of split 'test'.*ships train, train_aug"): data.open_voc(root, "test")
    write_list(root, "test", ["2008_000006"])
    assert data.open_voc(root, "test")[0].labels is None


@pytest.mark.parametrize("folder", ["JPEGImages/train", "JPEGImages/train2014", "train2014", "JPEGImages"])
@pytest.mark.parametrize("short", [False, True])
def test_coco_is_found_under_every_spelling(tmp_path: Path, folder: str, short: bool) -> None:
    ids = lists.shipped_ids("coco", "train")[:2]
    (tmp_path / folder).mkdir(parents=True)
    for name in ids:
        Image.fromarray(noise()).convert("L").save(tmp_path / folder / f"{name[-12:] if short else name}.jpg")
        stem = name if short else name[-12:]
        pictures.write_mask(tmp_path / "SegmentationClass" / "train" / f"{stem}.png", np.full((24, 32), 80, np.uint8))
    coco = data.open_coco(tmp_path, "train", ids=ids, masks=True)
    assert coco.num_classes == 81 and coco[0].mask.min() == 80 and coco[0].image.mode == "RGB"
    assert coco.labels[0].nonzero().ravel().tolist() == [45, 49, 50]
    assert folder == "JPEGImages" or data.detect_dataset(tmp_path) == "coco"


def test_cocostuff_reads_published_and_converted_masks_alike(tmp_path: Path) -> None:
    (tmp_path / "images" / "val2017").mkdir(parents=True)
    name, published = lists.shipped_ids("cocostuff", "val")[0], np.array([[0, 12, 91, 181, 255]], np.uint8)
    Image.fromarray(noise(0, 1, 5)).save(tmp_path / "images" / "val2017" / f"{name}.jpg")
    pictures.write_mask(tmp_path / "stuffthingmaps" / "val2017" / f"{name}.png", published)
    stuff = data.open_cocostuff(tmp_path, "val", ids=[name])
    assert stuff[0].mask.tolist() == [[0, 11, 80, 170, 255]] and stuff.num_classes == 171 and stuff[0].labels is None
    converted = np.array([[1, 2, 3, 170, 255]], np.uint8)
    pictures.write_mask(tmp_path / "annotations" / "val2017" / f"{name}_labelTrainIds.png", converted)
    pictures.write_mask(tmp_path / "annotations" / "val2017" / f"{name}.png", published)
    assert (data.open_cocostuff(tmp_path, "val", ids=[name])[0].mask == converted).all()
    assert data.detect_dataset(tmp_path) == "cocostuff" and data.dataset_splits(tmp_path) == ["val"]


def test_cocostuff_refuses_the_dropped_values(tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    Image.fromarray(noise(0, 1, 2)).save(tmp_path / "train2017" / "000000000009.jpg")
    pictures.write_mask(tmp_path / "stuffthingmaps" / "train2017" / "000000000009.png", np.array([[11, 0]], np.uint8))
    stuff = data.open_dataset(tmp_path, "train")
    assert stuff.ids == ("000000000009",)
    with pytest.raises(InputError, match="value 11 on 1 pixels"): _ = stuff[0]


def test_datasets_are_told_apart(zoo: Path) -> None:
    assert data.detect_dataset(zoo) == "folder" and isinstance(data.open_dataset(zoo, "val"), SegmentationFolder)
    with pytest.raises(InputError, match="Did you mean 'folder'"): data.open_dataset(zoo, dataset="folders")


def scaled(values: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    "A random scale of an (H, W) uint8 array as picture and as mask."
    image, mask = transforms.RandomScale(0.5, 2.0)(Image.fromarray(values), transforms.tv_tensors.Mask(torch.from_numpy(values)))
    return image, mask.numpy()


@given(st.integers(1, 60), st.integers(0, 10**6))
def test_a_scaled_mask_takes_the_value_at_the_centre_of_each_new_pixel(width: int, seed: int) -> None:
    torch.manual_seed(seed)
    image, mask = scaled(np.arange(width, dtype=np.uint8)[None].repeat(2, 0))
    centre = (np.arange(image.width) + 0.5) * width / image.width
    assert mask.shape == (image.height, image.width) and mask.size > 0
    assert (np.abs(centre - (mask[0] + 0.5)) <= 0.5 + 1e-5).all()


def test_scaling_does_not_shift_the_boundary_of_a_mask_against_its_picture() -> None:
    gaps = []
    for seed in range(60):
        torch.manual_seed(seed)
        half = np.zeros((64, 64), np.uint8)
        half[:, 10 + seed % 37:] = 255
        image, mask = scaled(half)
        gaps.append(np.asarray(image)[0].sum() / 255 - (mask[0] > 0).sum())
    assert abs(np.mean(gaps)) < 0.1 and np.abs(gaps).max() <= 0.55


def test_samples_stack_into_a_batch_that_moves(zoo: Path) -> None:
    train = data.open_folder(zoo, transform=TrainTransform(16))
    batch = data.collate([train[0], train[1]]).to("cpu")
    assert batch.images.shape == (2, 3, 16, 16) and batch.masks.shape == (2, 16, 16) and batch.labels.dtype == torch.bool
    closed = data.open_folder(zoo, transform=TrainTransform(16), masks=False)
    assert data.collate([closed[0]]).masks is None
    with pytest.raises(InputError, match="do not stack"): data.collate([train[0], TrainTransform(8)(data.open_folder(zoo)[0])])


def test_loader_workers_read_the_same_samples(zoo: Path) -> None:
    train = data.open_folder(zoo, transform=transforms.to_tensors)
    loader = DataLoader(train, 3, num_workers=2, collate_fn=data.collate, multiprocessing_context="fork")
    batch = next(iter(loader))
    assert torch.equal(batch.images[2], train[2].image) and batch.ids == ("p0", "p1", "p2")


def test_datasets_and_transforms_pickle(zoo: Path) -> None:
    train = pickle.loads(pickle.dumps(data.open_folder(zoo, transform=TrainTransform(16))))
    assert train[0].image.shape == (3, 16, 16)


def test_augmented_real_voc_pictures_have_shipped_labels(real_data: Path) -> None:
    root = real_data / "voc12_extra"
    ids = sorted(path.stem for path in (root / "JPEGImages").iterdir())
    voc = data.open_voc(root, "extra", masks=True, ids=ids)
    assert len(voc) == 12 and voc.labels.any(1).all()


def test_real_coco_pictures_open_as_coco_2014(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "coco128_seg"
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "SegmentationClass").mkdir()
    (tmp_path / "JPEGImages" / "train").symlink_to(source / "images" / "train2017")
    (tmp_path / "SegmentationClass" / "train").symlink_to(source / "masks_coco80_derived")
    known = lists.shipped_labels("coco").rows
    ids = [path.stem for path in sorted((source / "images" / "train2017").iterdir()) if path.stem in known]
    coco = data.open_dataset(tmp_path, "train", ids=ids, masks=True)
    grey = [sample for sample in map(coco.__getitem__, range(len(coco))) if sample.image.mode != "RGB"]
    assert coco.listing.dataset == "coco" and len(coco) > 100 and not grey


def test_a_folder_tells_of_its_pictures_and_a_clip_of_the_same_classes_speaks_for_one_that_does_not(zoo: Path) -> None:
    silent, insects = data.list_folder(zoo, "train"), lists.Domain("insects", "painted", ("ant", "fire bee"))
    assert silent.title == "folder zoo" and silent.domain == lists.Domain()
    assert silent.with_domain(insects).title == "insects, folder zoo" and silent.with_domain(lists.Domain("cats", classes=("cat",))) is silent
    (zoo / "domain.json").write_text('{"title": "drawings", "caveat": "drawn", "unseen": ["ant"]}')
    listing = data.list_folder(zoo, "train")
    assert listing.title == "drawings, folder zoo" and listing.with_domain(insects) is listing
    assert lists.seen_and_unseen(listing.classes, domain=listing.domain).unseen == ("ant",)


@pytest.mark.parametrize(("text", "message"), [("{", "domain.json is damaged"), ("[]", "domain.json is damaged"), ('{"titel": "x"}', "Did you mean 'title'"),
                                               ('{"unseen": "ant"}', "unseen='ant' is str"), ('{"side": "large"}', "side='large' is str")])
def test_a_wrong_domain_is_explained(zoo: Path, text: str, message: str) -> None:
    (zoo / "domain.json").write_text(text)
    with pytest.raises(InputError, match=message): data.list_folder(zoo, "train")


def test_every_kind_of_data_set_has_a_title(tmp_path: Path) -> None:
    listing = data.Listing(tmp_path, "cocostuff", "val", lists.COCOSTUFF_CLASSES, False, (), (), (), None, None)
    assert [replace(listing, dataset=name).title for name in ("voc", "coco", "cocostuff")] == ["PASCAL VOC 2012", "COCO 2014", "COCO-Stuff 164K"]
