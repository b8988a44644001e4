"""freqseg.pictures: masks, decoding, damage that is named."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_data import GREEN, masks, noise  # noqa: F401 (fixtures)

from freqseg import data, pictures
from freqseg.data import Sample
from freqseg.files import InputError
from freqseg.lists import IGNORE
from freqseg.transforms import TrainTransform


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


def test_every_real_voc_picture_and_mask_can_be_read(real_data: Path) -> None:
    voc = data.open_voc(real_data / "voc12_mini", "val", masks=True)
    sample = voc[0]
    assert len(voc) == 60 and voc.labels.shape == (60, 20) and sample.mask.shape == sample.image.size[::-1]
    assert all(set(np.unique(voc[index].mask)) <= {*range(21), IGNORE} for index in range(0, 60, 6))


def test_the_voc_palette_is_the_one_in_real_masks(real_data: Path) -> None:
    path = next((real_data / "voc12_mini" / "SegmentationClass").glob("*.png"))
    theirs = np.array(Image.open(path).getpalette()).reshape(-1, 3)
    assert (theirs == pictures.palette()[:len(theirs)]).all()
