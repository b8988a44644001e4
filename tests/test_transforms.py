"""freqseg.transforms: picture and mask move together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toy_data import GREEN, noise, zoo  # noqa: F401 (fixtures)

from freqseg import data, pictures, transforms
from freqseg.data import Sample
from freqseg.files import InputError
from freqseg.lists import IGNORE
from freqseg.transforms import TrainTransform


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


@pytest.mark.slow
def test_twenty_megapixels_can_be_doubled() -> None:
    sample = Sample("p", Image.new("RGB", (5000, 4000), GREEN), np.ones((4000, 5000), np.uint8), None)
    assert (TrainTransform(320, scale=(2, 2))(sample).mask == 1).all()


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
