"""freqseg.data: names, masks, decoding, lists, label tables, layouts, samples, transforms."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from torch.utils.data import DataLoader

from freqseg import data, lists, pictures, prompts, transforms
from freqseg.data import Sample, SegmentationFolder
from freqseg.files import InputError, shipped
from freqseg.lists import IGNORE
from freqseg.transforms import TrainTransform

GREEN = (0, 200, 0)


# ---- folders to work on ---------------------------------------------------------------------------------------------

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


# ---- seen and unseen classes ----------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("short, scale, expected", [(512, (1, 1), (512, 768)), (100, (.5, .5), (50, 75)), (None, (1, 1), (200, 300))])
def test_the_short_side_is_where_a_factor_of_one_leads(short: int | None, scale: tuple, expected: tuple) -> None:
    assert transforms.RandomScale(*scale, short)(Image.new("RGB", (300, 200))).size == expected[::-1]


def test_crops_of_one_class_are_drawn_again_as_far_as_there_are_others() -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[:, 30:] = 1
    sample = Sample("a", Image.fromarray(noise(0, 40, 40)), mask, None)
    def most(largest: float) -> list[float]:
        torch.manual_seed(0)
        crops = [TrainTransform(16, (1, 1), 0, largest=largest)(sample).mask for _ in range(100)]
        return [float(crop.flatten().bincount().max()) / crop.numel() for crop in crops]
    free, varied = most(1.), most(.75)
    assert np.mean([share > .75 for share in free]) > .5 and np.mean([share > .75 for share in varied]) < .15
    alone = TrainTransform(16, largest=.5)(Sample("b", sample.image, np.zeros((40, 40), np.uint8), None))   # nothing else to be had
    assert alone.mask.shape == (16, 16)


def test_varied_colours_leave_mask_and_outside_alone() -> None:
    mask = np.random.default_rng(0).integers(0, 3, (24, 32)).astype(np.uint8)
    torch.manual_seed(1)
    sample, plain, coloured = Sample("a", Image.fromarray(noise()), mask, None), TrainTransform(48, (1, 1), 0), TrainTransform(48, (1, 1), 0, colours=True)
    changed = 0
    for seed in range(6):
        torch.manual_seed(seed); one = plain(sample)
        torch.manual_seed(seed); other = coloured(sample)
        assert torch.equal(one.mask, other.mask) and torch.equal(one.valid, other.valid) and (other.image[:, ~other.valid] == 0).all()
        changed += not torch.equal(one.image, other.image)
    assert changed


# ---- names ----------------------------------------------------------------------------------------------------------

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


def test_prompt_aliases_speak_of_classes_that_exist() -> None:
    assert set(prompts.VOC_PROMPT_ALIASES) < set(lists.VOC_CLASSES)
    assert set(prompts.COCO_PROMPT_ALIASES) < set(lists.COCO_CLASSES)
    assert set(prompts.BACKGROUND_PROMPTS) - set(prompts.COCO_BACKGROUND_PROMPTS) == {"keyboard", "sign"}


# ---- masks ----------------------------------------------------------------------------------------------------------

masks = arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@given(masks)
def test_a_colour_of_the_map_gives_its_value_back(mask: np.ndarray) -> None:
    values, unknown = pictures._values_of_colours(pictures.palette()[mask])
    assert (values == mask).all() and not unknown.any()


@settings(max_examples=20)
@given(mask=masks, mode=st.sampled_from(["palette", "grey", "colour", "colour with alpha"]))
def test_every_way_of_storing_a_mask_reads_alike(tmp_path_factory: pytest.TempPathFactory, mask: np.ndarray, mode: str) -> None:
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    if mode == "palette": pictures.write_mask(path, torch.from_numpy(mask))
    elif mode == "grey": Image.fromarray(mask).save(path)
    elif mode == "colour": Image.fromarray(pictures.palette()[mask]).save(path)
    else: Image.fromarray(pictures.palette()[mask]).convert("RGBA").save(path)
    assert (pictures.read_mask(path) == mask).all()


def test_a_written_mask_shows_its_classes_in_voc_colours(tmp_path: Path) -> None:
    mask = np.arange(21, dtype=np.uint8)[None]
    pictures.write_mask(tmp_path / "m.png", mask)
    shown = np.asarray(Image.open(tmp_path / "m.png").convert("RGB"))[0]
    assert shown[1].tolist() == [128, 0, 0] and shown[15].tolist() == [192, 128, 128] and shown[20].tolist() == [0, 64, 128]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_grey_mask_of_few_bits_is_not_stretched(tmp_path: Path, depth: int) -> None:
    mask = (np.arange(64, dtype=np.uint8) % 2 ** depth).reshape(8, 8)
    path = tmp_path / "few.png"
    path.write_bytes(grey_png(mask, depth))
    assert (pictures.read_mask(path, 16) == mask).all()


def grey_png(mask: np.ndarray, depth: int) -> bytes:
    "A grey-scale PNG of 1, 2 or 4 bits, written chunk by chunk: Pillow does not write these."
    import struct
    import zlib
    bits = (mask[..., None] >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.reshape(len(mask), -1), axis=1)
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", mask.shape[1], mask.shape[0], depth, 0, 0, 0, 0)
    scanlines = b"".join(b"\0" + row.tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")


def test_a_value_without_a_class_is_reported_with_file_value_and_count(tmp_path: Path) -> None:
    mask = np.zeros((5, 5), np.uint8)
    mask[0, :3], mask[1, :2], mask[2, 0] = 21, 200, IGNORE
    pictures.write_mask(tmp_path / "off.png", mask)
    with pytest.raises(InputError, match=r"off\.png: mask value 21 on 3 pixels, 200 on 2 pixels, but 21 classes allow 0..20"):
        pictures.read_mask(tmp_path / "off.png", 21)
    assert pictures.read_mask(tmp_path / "off.png", 201).max() == IGNORE


def test_an_unknown_colour_is_reported_with_its_count(tmp_path: Path) -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[0] = (1, 2, 3)
    Image.fromarray(picture).save(tmp_path / "odd.png")
    with pytest.raises(InputError, match=r"odd\.png: colour \(1, 2, 3\) .* \(4 pixels"):
        pictures.read_mask(tmp_path / "odd.png")


def test_sixteen_bit_and_lossy_masks_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.ones((4, 4), np.uint8)).save(tmp_path / "lossy.jpg")
    Image.fromarray(np.ones((4, 4), np.uint8)).convert("LA").save(tmp_path / "pair.png")
    for name, told in {"deep.png": "16 or more bits", "lossy.jpg": "lossy", "pair.png": "LA picture"}.items():
        with pytest.raises(InputError, match=told): pictures.read_mask(tmp_path / name)


@pytest.mark.parametrize("wrong", [np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2)), np.array([[-1]]), np.array([[256]]),
                                   np.zeros((0, 3), np.uint8)])
def test_what_is_not_a_mask_is_not_written(tmp_path: Path, wrong: np.ndarray) -> None:
    with pytest.raises(InputError): pictures.write_mask(tmp_path / "m.png", wrong)
    assert not list(tmp_path.iterdir())


# ---- pictures -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_shown_as_a_viewer_shows_it(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps
    note = Image.Exif()
    note[0x0112] = orientation
    Image.fromarray(noise()).save(tmp_path / "p.png", exif=note)
    ours, theirs = pictures.read_image(tmp_path / "p.png"), ImageOps.exif_transpose(Image.open(tmp_path / "p.png"))
    assert (np.asarray(ours) == np.asarray(theirs)).all()
    assert ours.size == ((24, 32) if orientation > 4 else (32, 24))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16": image = Image.fromarray(np.full((6, 6), 200 * 257, np.uint16))
    else: image = Image.fromarray(np.full((6, 6, 3), 200, np.uint8)).convert(mode, dither=Image.Dither.NONE, palette=Image.Palette.ADAPTIVE)
    path = tmp_path / ("p.jpg" if mode == "CMYK" else "p.png")
    image.save(path)
    shown = pictures.read_image(path)
    assert shown.mode == "RGB" and shown.size == (6, 6)
    assert np.abs(np.asarray(shown).astype(int) - (255 if mode == "1" else 200)).max() <= 3


def test_a_palette_picture_with_transparency_becomes_rgb_without_complaint(tmp_path: Path, recwarn) -> None:
    image = Image.fromarray(np.full((6, 6, 3), 200, np.uint8)).convert("P")
    image.save(tmp_path / "p.png", transparency=bytes(range(256)))
    assert pictures.read_image(tmp_path / "p.png").mode == "RGB"
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@settings(max_examples=150)
@given(cut=st.integers(0, 1500), spots=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=6),
       kind=st.sampled_from(["JPEG", "PNG"]))
def test_a_damaged_file_is_read_or_explained_but_never_anything_else(tmp_path_factory, cut: int, spots: list, kind: str) -> None:
    stream = io.BytesIO()
    note = Image.Exif()
    note[0x0112] = 6
    Image.fromarray(noise()).save(stream, kind, exif=note)
    content = bytearray(stream.getvalue())
    for place, value in spots: content[place % len(content)] = value
    path = tmp_path_factory.mktemp("damaged") / "p.jpg"
    path.write_bytes(content[:len(content) - cut])
    try: image = pictures.read_image(path)
    except InputError as error: assert str(path) in str(error)
    else: assert image.mode == "RGB"


def test_truncated_empty_and_missing_pictures_are_named(tmp_path: Path) -> None:
    Image.fromarray(noise()).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-200])
    (tmp_path / "empty.jpg").touch()
    for name, told in {"cut.jpg": "truncated", "empty.jpg": "cannot be decoded", "gone.jpg": "does not exist"}.items():
        with pytest.raises(InputError, match=f"{name}.*{told}"): pictures.read_image(tmp_path / name)


# ---- lists and labels -----------------------------------------------------------------------------------------------

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


names = st.lists(st.text("abcdefgh -", min_size=1, max_size=8).map(str.strip).filter(lambda name: name and name != "background"),
                 min_size=1, max_size=6, unique=True)


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


# ---- layouts --------------------------------------------------------------------------------------------------------

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


# ---- transforms and batches -----------------------------------------------------------------------------------------

def aligned_sample(seed: int, height: int, width: int) -> Sample:
    "A sample whose picture shows every mask value in its VOC colour, so that misalignment shows."
    mask = np.random.default_rng(seed).integers(0, 21, (height, width), dtype=np.uint8)
    return Sample("s", Image.fromarray(pictures.palette()[mask]), mask, torch.ones(20, dtype=torch.bool))


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_flip_pad_and_crop_move_picture_and_mask_together(seed: int, height: int, width: int, size: int) -> None:
    torch.manual_seed(seed)
    sample = TrainTransform(size, scale=(1, 1))(aligned_sample(seed, height, width))
    shown = (sample.image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    inside = sample.mask.numpy() != IGNORE
    assert sample.image.shape == (3, size, size) and sample.mask.shape == (size, size)
    assert (shown[inside] == pictures.palette()[sample.mask.numpy()[inside]]).all()
    assert not shown[~inside].any() and inside.sum() == min(size, height) * min(size, width)


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


def test_the_scale_factor_is_uniform_over_its_range() -> None:
    sizes = [transforms.RandomScale(0.5, 2.0)(Image.new("RGB", (100, 100))).width for _ in range(300)]
    assert 50 <= min(sizes) < 60 and 190 < max(sizes) <= 200 and abs(np.mean(sizes) - 125) < 8


def test_labels_and_id_pass_through_a_transform_and_masks_may_be_absent() -> None:
    sample = Sample("s", Image.fromarray(noise()), None, torch.tensor([True, False]))
    out = TrainTransform(16)(sample)
    assert out.id == "s" and out.mask is None and out.labels.tolist() == [True, False]
    assert type(out.image) is torch.Tensor and out.image.dtype == torch.float32 and 0 <= out.image.min() and out.image.max() <= 1


def test_a_fixed_seed_repeats_the_same_crops(zoo: Path) -> None:
    train = data.open_folder(zoo, transform=TrainTransform(20))
    torch.manual_seed(5)
    first = train[0]
    torch.manual_seed(5)
    assert torch.equal(first.image, train[0].image)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (2.0, 1.0)])
def test_impossible_scales_are_refused(scale: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="scales need"): TrainTransform(scale=scale)


def test_to_tensors_keeps_size_and_values() -> None:
    sample = aligned_sample(0, 7, 9)
    out = transforms.to_tensors(sample)
    assert torch.equal((out.image * 255).round().permute(1, 2, 0).byte(), torch.from_numpy(np.array(sample.image)))
    assert out.mask.dtype == torch.int64 and (out.mask.numpy() == sample.mask).all()


def test_one_pixel_is_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), GREEN).save(tmp_path / "p.png")
    pictures.write_mask(tmp_path / "m.png", np.ones((1, 1), np.uint8))
    sample = Sample("p", pictures.read_image(tmp_path / "p.png"), pictures.read_mask(tmp_path / "m.png", 2), None)
    for seed in range(10):
        torch.manual_seed(seed)
        out = TrainTransform(320)(sample)
        assert (out.mask == 1).sum() in (1, 4) and (out.mask == IGNORE).sum() >= 320 * 320 - 4


def test_twenty_megapixels_are_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (5000, 4000), GREEN).save(tmp_path / "p.jpg")
    pictures.write_mask(tmp_path / "m.png", np.ones((4000, 5000), np.uint8))
    sample = Sample("p", pictures.read_image(tmp_path / "p.jpg"), pictures.read_mask(tmp_path / "m.png", 2), None)
    out = TrainTransform(320, scale=(0.5, 0.5))(sample)
    assert sample.image.size == (5000, 4000) and (out.mask == 1).all()


@pytest.mark.slow
def test_twenty_megapixels_can_be_doubled() -> None:
    sample = Sample("p", Image.new("RGB", (5000, 4000), GREEN), np.ones((4000, 5000), np.uint8), None)
    assert (TrainTransform(320, scale=(2, 2))(sample).mask == 1).all()


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


# ---- real pictures --------------------------------------------------------------------------------------------------

def test_every_real_voc_picture_and_mask_can_be_read(real_data: Path) -> None:
    voc = data.open_voc(real_data / "voc12_mini", "val", masks=True)
    sample = voc[0]
    assert len(voc) == 60 and voc.labels.shape == (60, 20) and sample.mask.shape == sample.image.size[::-1]
    assert all(set(np.unique(voc[index].mask)) <= {*range(21), IGNORE} for index in range(0, 60, 6))


def test_the_voc_palette_is_the_one_in_real_masks(real_data: Path) -> None:
    path = next((real_data / "voc12_mini" / "SegmentationClass").glob("*.png"))
    theirs = np.array(Image.open(path).getpalette()).reshape(-1, 3)
    assert (theirs == pictures.palette()[:len(theirs)]).all()


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


@pytest.mark.parametrize("masked", [True, False])
def test_a_crop_knows_what_lies_outside_its_picture(masked: bool) -> None:
    picture = Image.fromarray(np.full((20, 30, 3), 200, np.uint8))
    mask = np.ones((20, 30), np.uint8) if masked else None
    torch.manual_seed(0)
    sample = TrainTransform(48, scale=(1, 1))(Sample("one", picture, mask, None))
    assert sample.valid.shape == (48, 48) and int(sample.valid.sum()) == 20 * 30
    assert torch.equal(sample.image.sum(0) > 0, sample.valid)
    if masked: assert torch.equal(sample.mask == IGNORE, ~sample.valid)
    batch = data.collate([sample, sample])
    assert torch.equal(batch.valid[1], sample.valid) and torch.equal(batch.to("cpu").valid, batch.valid)
